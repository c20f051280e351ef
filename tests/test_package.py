"""The package as it is installed: built as a wheel, and used from a folder that is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
# A config file of one's own, beside nothing else.
CONFIG = """
from ml_collections import ConfigDict

from ilvr_jax.config.experiments import load_config


def get_config():
    config = load_config("configs/plain_maps.py")
    config.stages = ("warm_up",)
    config.warm_up.update(steps=2, batch_size=2)
    config.model.update(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.model.update(num_key_value_heads=1, mrope_section=(1, 1, 2))
    config.model.vision.update(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, fullatt_block_indexes=(0,))
    config.eval.update(data="", max_new_tokens=8)
    return config
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Returns what a command prints; it must end well."""
    finished = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install` makes of a copy of the files under version control, and no path to others."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    for name in ("ilvr_jax", "configs", "tests/data/detours", "tests/data/vsp_planning"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--target", folder / "site", source, cwd=folder)
    return folder / "site"


def test_training_evaluating_asking_and_converting_from_another_folder(installed, tmp_path):
    (tmp_path / "mine.py").write_text(CONFIG)

    def command(name: str, *arguments: object) -> str:
        return run(sys.executable, installed / "bin" / name, *arguments, cwd=tmp_path, PYTHONPATH=str(installed))

    shown = json.loads(command("ilvr-train", "--config=configs/base.py", "--config.print=true"))
    assert shown["stages"] == ["warm_up", "stage1", "guided"]
    assert "warm_up: 2 steps" in command("ilvr-train", "--config=mine.py")
    maps = installed / "ilvr_jax" / "tests" / "data" / "vsp_planning"
    command("ilvr-evaluate", "runs/mine", "--task=vsp_planning", f"--data={maps / 'test.jsonl'}", "--limit=2")
    assert (tmp_path / "runs" / "mine" / "evaluations" / "warm_up-vsp_planning-latent.jsonl").is_file()
    image = next((maps / "images").glob("*.png"))
    assert "tokens" in command("ilvr-generate", "runs/mine", f"--image={image}", "Which way?")
    command("ilvr-convert", "to-hf", "runs/mine", "published")
    assert json.loads((tmp_path / "published" / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    assert "3 usable" in command("ilvr-check-data", REPOSITORY / "tests/data/mirage/sample.jsonl")
    command("ilvr-export-data", "--config=mine.py", "--count=1", "--out=exported")
    assert (tmp_path / "exported" / "train.jsonl").is_file()


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent for path in (REPOSITORY / "ilvr_jax").rglob("*.py")}
    names = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    settings = PROJECT["tool"]["setuptools"]
    assert names | settings["package-dir"].keys() == set(settings["packages"])


def test_extras_are_those_of_the_requirements_files():
    for extra, name in (("dev", "requirements-dev.txt"), ("tpu", "requirements-tpu.txt")):
        lines = (re.sub("#.*", "", line).strip() for line in (REPOSITORY / name).read_text().splitlines())
        listed = {line for line in lines if line and not line.startswith("-r")}
        assert listed <= set(PROJECT["project"]["optional-dependencies"][extra])


def test_every_command_has_a_script():
    commands = {path.stem for path in (REPOSITORY / "ilvr_jax").glob("*.py") if "@command" in path.read_text()}
    scripts = PROJECT["project"]["scripts"]
    assert {target.split(":")[0].removeprefix("ilvr_jax.") for target in scripts.values()} == commands
    assert all(
        name == f"ilvr-{target.split('.')[1].split(':')[0].replace('_', '-')}" for name, target in scripts.items()
    )
