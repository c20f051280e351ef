"""The structure of the package: imports run one way, files and functions stay short, sentences are plain."""

import ast
import graphlib
import re

import pytest

from tests.paths import REPOSITORY

PACKAGE = REPOSITORY / "ilvr_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each folder, and each module beside the folders, imports only from those before it.
ORDER = (
    "interrupts",
    "errors",
    "files",
    "progress",
    "config",
    "models",
    "method",
    "data",
    "tasks",
    "distributed",
    "checkpoints",
    "inference",
    "evaluation",
    "reports",
    "training",
    "analysis",
    "studies",
    "command",
    "generation_flags",
    "commands",
)
COMMANDS = ("aot", "check_data", "convert", "evaluate", "export_data", "generate", "study", "train")
LONGEST_FILE, LONGEST_FUNCTION = 450, 80  # lines
# Sentences that a native reader trips on; design.md of the project has the rules.
ODD = (
    r"\bis accepted\b",
    r"\bare accepted\b",
    r"\bgoes on\b",
    r"\bgo on\b",
    r"\bleft out\b",
    r"\bof no account\b",
    r"\bby turns\b",
    r"\bis no good\b",
    r'"""Says\b',
    r'"""What\b',
    r'"""Within it\b',
    r'"""Tells\b',
)


def module_of(path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path) -> set[str]:
    """Returns the modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("ilvr_jax")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ilvr_jax"):
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inside or {node.module}
    return found


def room(module: str) -> str:
    name = module.split(".")[1] if "." in module else "interrupts"  # the package itself only handles Ctrl-C
    return "commands" if name in COMMANDS else name


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    for other in imports(MODULES[module]):
        here, there = ORDER.index(room(module)), ORDER.index(room(other))
        assert there <= here, f"{module} imports {other}"


def test_no_modules_import_each_other():
    list(graphlib.TopologicalSorter({name: imports(path) - {name} for name, path in MODULES.items()}).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


@pytest.mark.parametrize("module", MODULES)
def test_sentences_are_plain(module):
    for number, line in enumerate(MODULES[module].read_text().splitlines(), start=1):
        assert not any(re.search(pattern, line) for pattern in ODD), f"{MODULES[module]}:{number}: {line.strip()}"


def test_no_test_imports_another():
    for path in (REPOSITORY / "tests").rglob("*.py"):
        assert not re.search(r"^\s*from tests\.(\w+\.)*test_", path.read_text(), re.MULTILINE), path
