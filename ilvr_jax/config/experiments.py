"""Experiments: Python files whose `get_config()` returns a ConfigDict, read once into a `RunConfig`."""

import contextlib
import dataclasses
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ilvr_jax.config.fields import BadConfig, Rule, as_dict, flatten, nearest, read, read_value
from ilvr_jax.config.schema import AUTO, RunConfig, StageConfig
from ilvr_jax.errors import listed, quote

PACKAGE = Path(__file__).resolve().parents[1]
# Where relative paths of a config are resolved: configs/ is beside the package in a checkout, inside it if installed.
ROOTS = (PACKAGE.parent, PACKAGE)
BASE = Path("configs/base.py")
OWN_DATA = Path("configs/plain_maps.py")  # what a config for data of one's own starts from
VSP_MAPS = "tests/data/vsp_planning/test.jsonl"  # 200 real maps, only for evaluation
DETOUR_MAPS = "tests/data/detours/test.jsonl"  # 200 generated maps with long detours, only for evaluation


def default_config() -> ConfigDict:
    """Return the defaults of all keys, unlocked: without stages, without buckets and without a model's shape."""
    values = as_dict(RunConfig(stages={}))
    del values["stages"]
    return ConfigDict(values)


def stage_config(objective: str, **changes: Any) -> ConfigDict:
    """Return the section of a stage: the defaults with changes. Raises KeyError for a key that no stage has."""
    stage = ConfigDict(as_dict(StageConfig(objective))).lock()
    stage.update(changes)
    return stage.unlock()


def load_config(experiment: str | Path) -> ConfigDict:
    """Return the result of an experiment's `get_config`; `FILE.py:VARIANT` passes the variant to it.

    Raises BadConfig if there is no such file, the file fails, or it returns something else.
    """
    name, _, variant = str(experiment).partition(":")
    path = resolve_path(name)
    if not path.is_file():
        raise BadConfig(f"--config must be a Python file such as {BASE}, but there is no file {name}")
    spec = importlib.util.spec_from_file_location("ilvr_jax_experiment", path)
    if spec is None or spec.loader is None:
        raise BadConfig(f"--config must be a Python file (.py) such as {BASE}, got {name}")
    module = importlib.util.module_from_spec(spec)
    try:
        with _importable(path):
            spec.loader.exec_module(module)
            function = getattr(module, "get_config", None)
            if variant and function and not inspect.signature(function).parameters:
                raise BadConfig(f"--config must be {name}, which has no variants, got {quote(str(experiment))}")
            config = function(*[variant] * bool(variant)) if function else None
    except BadConfig:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's code and may raise anything
        raise BadConfig(f"{name}{_error_line(error, path)}: {_first_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise BadConfig(f"{name} must have a function get_config() that returns an ml_collections.ConfigDict")
    return config


def parse(values: Mapping[str, Any] | ConfigDict, complete: bool = False) -> RunConfig:
    """Return the typed config of a file's values, checked.

    The stages are the sections named in `stages`; others with an `objective` are checked and dropped. With `complete`
    every key must be given, as in a workdir. Raises BadConfig, naming the key.
    """
    values = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    names = stage_names(values)
    sections = {name: read(StageConfig, values.pop(name), name, complete) for name in names}
    own = [field.name for field in dataclasses.fields(RunConfig)]
    for name in values:
        if name not in own:
            raise BadConfig(f"`{name}` must be a key of the config; the nearest is {nearest(name, [*own, *names])}")
    stages = read_value(tuple[str, ...], values.get("stages", ()), "stages", Rule("their order", nonempty=True))
    if len(set(stages)) != len(stages):
        raise BadConfig(f"`stages` must name each stage once, got {listed(stages)}")
    for name in stages:
        if name not in sections:
            raise BadConfig(f"`stages` must name only stages of the config ({listed(sections)}), got {quote(name)}")
    return read(RunConfig, values | {"stages": {name: sections[name] for name in stages}}, "", complete)


def stage_names(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the stages' sections in a file's values."""
    named, own = values.get("stages"), [field.name for field in dataclasses.fields(RunConfig)]
    named = named if isinstance(named, tuple | list) else ()
    return [
        name
        for name, section in values.items()
        if name not in own and (name in named or (isinstance(section, Mapping) and "objective" in section))
    ]


def as_file(config: RunConfig) -> dict[str, Any]:
    """Return the values in the form of a file: each stage a section of its own name, keys without a value absent."""
    values = as_dict(config)
    return values | {"stages": tuple(config.stages)} | values["stages"]


def by_key(config: RunConfig) -> dict[str, Any]:
    """Return the values that are set by the dotted keys that files and flags give them."""
    values = {key.removeprefix("stages."): value for key, value, _ in flatten(config)}
    return {"stages": tuple(config.stages)} | values


def evaluation_file(config: RunConfig) -> Path | None:
    """Return the file of `eval.data`, None without one: then records are held out, or nothing is evaluated."""
    path = config.eval.data
    if path == AUTO:
        path = VSP_MAPS if config.data.source == "frozen_lake" and not config.eval.fraction else ""
    return resolve_path(path) if path else None


def resolve_path(path: str | Path) -> Path:
    """Return a config's path: relative to the working directory if it exists there, else to the folder of configs/."""
    path = Path(path).expanduser()
    if path.is_absolute() or path.exists():
        return path
    return next((root / path for root in ROOTS if (root / path).exists()), path)


@contextlib.contextmanager
def config_errors(section: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Re-raise errors of a kind in the block as BadConfig, naming the section of the config."""
    try:
        yield
    except BadConfig:
        raise
    except kind as error:
        raise BadConfig(f"config section {section}: {error}") from error


@contextlib.contextmanager
def _importable(path: Path) -> Iterator[None]:
    """Make experiments beside a file importable, as `configs.base` or `base`."""
    folders = [str(path.resolve().parents[1]), str(path.resolve().parent)]
    sys.path.extend(folders)
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(folder)


def _error_line(error: BaseException, path: Path) -> str:
    """Return " line N", the last line of the file in the error's traceback, or an empty text."""
    path = path.resolve()
    if isinstance(error, SyntaxError) and error.filename and error.lineno and Path(error.filename).resolve() == path:
        return f" line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path]
    return f" line {lines[-1]}" if lines else ""


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if error.args else ""
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
