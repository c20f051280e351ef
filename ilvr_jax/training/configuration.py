"""The configuration of a run: read from a Python file, overridden by flags, kept beside the checkpoints."""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ilvr_jax.data.formats import FORMATS
from ilvr_jax.errors import InputError, listed, quote
from ilvr_jax.files import read_object, write_text
from ilvr_jax.method.layout import Layout
from ilvr_jax.method.objectives import OBJECTIVES
from ilvr_jax.method.selection import LatentSettings
from ilvr_jax.method.slots import SLOT_INPUTS
from ilvr_jax.models.lora import LoraConfig
from ilvr_jax.models.qwen2_5_vl.config import DTYPES, STORAGE, ModelConfig, VisionConfig
from ilvr_jax.models.qwen2_5_vl.rotary import RopeScaling
from ilvr_jax.models.sharding import AXES

REPOSITORY = Path(__file__).resolve().parents[2]
LARGEST = 2**31 - 1  # of numbers in a config: sizes, steps and seeds go into 32-bit integers
LONGEST = 2**20  # tokens, or parts of one batch's layout
VSP_MAPS = "tests/data/vsp_planning/test.jsonl"  # 200 real maps, for evaluation alone
AUTO = "auto"  # for eval.data: the maps above if data.source is frozen_lake, none for data of other kinds
# Keys that older workdirs lack, as they were run.
ADDED = {
    "data": {"follow_links": True, "accept_change": False},
    "latents": {"selection": "coverage"},
    "model": {"slot_input": "hidden"},
}

# What may differ when a run is continued: none of it changes what is learnt.
NO_EFFECT_ON_TRAINING = (
    "log_every",
    "checkpoint_every",
    "checkpoint_keep",
    "max_skipped",  # it says when a run ends, and a higher one lets that run go on
    "eval",
    "mesh",
    "data.workers",
    "data.follow_links",
    "data.feature_cache",
    "data.accept_change",
    # The fingerprint of the records is compared instead: they may be moved, and a new stage may have others.
    "data.path",
    "data.root",
)


class BadConfig(InputError):
    """A configuration that cannot be used; one sentence says why."""


def read_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Adds --config, --workdir and --config.section.key to a parser and reads the command line.

    Returns the namespace with `config` (a locked ConfigDict) and `workdir` (a Path; by default runs/ and the
    name of the config file). Raises as `read_config_flags` does.
    """
    parser.add_argument("--workdir", help="where everything is written (default: runs/<config name>)")
    options = read_config_flags(parser, arguments)
    if options.workdir is None:
        options.workdir = Path("runs") / options.config_file.stem
    elif not options.workdir or "\0" in options.workdir:
        raise BadConfig(f"--workdir must be a folder, got {quote(options.workdir)}")
    options.workdir = Path(options.workdir)
    return options


def read_config_flags(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    default: Path | None = None,
    prepare: Callable[[argparse.Namespace], None] | None = None,
) -> argparse.Namespace:
    """Adds --config and --config.section.key to a parser and reads the command line.

    Returns the namespace with `config` (a locked ConfigDict) and `config_file`. With a `default` config --config may
    be omitted, and `config_file` is None then. `prepare` gets the namespace before the values given as flags are set
    and may change `config`: those of other flags, say. Raises BadConfig if the file, a key
    or a value is invalid; leaves the process with status 2, as argparse does, at an unknown flag, and with 0 after
    --config.print=true, which prints the config.
    """
    parser.allow_abbrev = False
    parser.add_argument("--config", required=default is None, help="a Python file with a function get_config()")
    parser.epilog = (
        "Any value of the config can be given as --config.section.key=value; --config.print=true shows the whole "
        "config that results, and ends."
    )
    options, others = parser.parse_known_args(arguments)
    overrides, unknown = _split_overrides(others)
    if unknown:
        parser.error(f"unrecognized arguments: {listed(unknown)}")
    if options.config == "":
        raise BadConfig("--config must be a Python file such as configs/base.py, got ''")
    options.config_file = Path(options.config) if options.config else None
    options.config = load_config(options.config_file or default)
    if prepare:
        prepare(options)
    shown = parse_value("print", dict(overrides).get("print", "false"), False)
    for key, text in overrides:
        if key != "print":
            override(options.config, key, text)
    check_config(options.config)
    if shown:
        print(to_json(options.config), end="")
        sys.exit(0)
    return options


def load_config(path: Path) -> ConfigDict:
    """Returns the locked ConfigDict that the file's get_config() returns; raises BadConfig if it gives none."""
    resolved = resolve_path(path)
    if not resolved.is_file():
        raise BadConfig(f"--config must be a Python file such as configs/base.py, but there is no file {path}")
    spec = importlib.util.spec_from_file_location("ilvr_jax_config", resolved)
    if spec is None or spec.loader is None:
        raise BadConfig(f"--config must be a Python file (.py) such as configs/base.py, got {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except (Exception, SystemExit) as error:  # the file is the user's code: whatever it raises is what is wrong with it
        raise BadConfig(f"{path}{_error_line(error, resolved)}: {_first_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise BadConfig(f"{path} must have a function get_config() that returns an ml_collections.ConfigDict")
    return config.lock()


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets config's value at a dotted key from its text, in the type that the value has already.

    Tuples are written (1, 2) or 1,2. Raises BadConfig for an unknown key, naming the nearest valid one, and for
    text that is not of the type.
    """
    values = dict(flatten(config))
    if key not in values:
        if any(name.startswith(key + ".") for name in values):
            inside = {name[len(key) + 1 :].split(".")[0] for name in values if name.startswith(key)}
            raise BadConfig(f"--config.{key} must be one of the section's keys, such as {listed(sorted(inside))}")
        last = key.split(".")[-1]
        near = difflib.get_close_matches(key, values, n=1, cutoff=0.0) if values else []
        near = [name for name in values if name.split(".")[-1] == last][:1] or near
        raise BadConfig(f"--config.{key} must be a key of the config; the nearest is {near[0] if near else 'none'}")
    section = config
    *parents, name = key.split(".")
    for parent in parents:
        section = section[parent]
    section[name] = parse_value(key, text, values[key])


def parse_value(key: str, text: str, current: Any) -> Any:
    """Returns the text as a value of the type of `current`; raises BadConfig, naming the key, if it is not one."""
    if isinstance(current, str):
        return text
    if isinstance(current, tuple):
        value = _parse_tuple(text, current)
    elif text.lower() in ("true", "false"):
        value = text.lower() == "true"
    else:
        value = _literal(text)
    if type(current) is float and type(value) is int:
        value = float(value)
    if kind := _needed_kind(value, current):
        raise BadConfig(f"`{key}` must be {kind}, got {quote(text)}")
    return value


def _needed_kind(value: Any, like: Any) -> str:
    """Returns what a value must be to have the type of another one, empty if it has."""
    if isinstance(like, tuple) and isinstance(value, tuple):
        kinds = {type(item) for item in like} | ({int} if any(type(item) is float for item in like) else set())
        if not kinds or all(type(item) in kinds for item in value):
            return ""
        return "a tuple of " + " or ".join(sorted(kind.__name__ for kind in kinds))
    if like is None or type(value) is type(like):
        return ""
    names = {bool: "true or false", int: "an integer", float: "a number", tuple: "a tuple", str: "text"}
    return names.get(type(like), f"a value of type {type(like).__name__}")


def check_config(config: ConfigDict) -> None:
    """Raises BadConfig for a key that is unknown or missing, stages that do not fit together and numbers too small."""
    check_keys(config)
    check_numbers(config)
    if not config.stages:
        raise BadConfig("`stages` must be the names of the stages to run, got none")
    if len(set(config.stages)) != len(config.stages):
        raise BadConfig(f"`stages` must name each stage once, got {listed(config.stages)}")
    for name in config.stages:
        sections = [key for key, value in config.items() if isinstance(value, ConfigDict) and "objective" in value]
        if name not in sections:
            raise BadConfig(f"`stages` must be of the config's stages {listed(sections)}, got {quote(name)}")
        stage = config[name]
        _one_of(f"{name}.objective", stage.objective, OBJECTIVES)
        objective = OBJECTIVES[stage.objective]
        where = f" with objective {stage.objective}"
        _one_of(f"{name}.helper_images", stage.helper_images, objective.helper_images, where)
        for part in stage.train:
            _one_of(f"{name}.train", part, ("vision", decoder_part(config)))
        if not stage.train:
            raise BadConfig(f"`{name}.train` must be vision, {decoder_part(config)} or both, got none")
        if objective.teacher and "vision" in stage.train:  # which the teacher shares
            raise BadConfig(
                f"`{name}.train` must be {decoder_part(config)} alone with objective {stage.objective}, "
                f"got {stage.train}"
            )
        for key in ("steps", "batch_size", "accumulation"):
            _at_least(1, f"{name}.{key}", stage[key])
        _at_least(0, f"{name}.epochs", stage.epochs)
    for key in ("min_pixels", "max_pixels"):
        _at_least(0, f"data.{key}", config.data[key])
    for key in ("log_every", "checkpoint_every", "checkpoint_keep", "max_skipped"):
        _at_least(1, key, config[key])
    _at_least(0, "seed", config.seed)
    _at_least(1, "data.records", config.data.records)
    _at_least(0, "data.workers", config.data.workers)
    if not config.data.buckets:
        raise BadConfig("`data.buckets` must hold at least one bucket, got none")
    for name, bucket in config.data.buckets.items():
        for key, value in bucket.items():
            _at_least(0, f"data.buckets.{name}.{key}", value)
            _at_most(LONGEST, f"data.buckets.{name}.{key}", value)
    _at_most(LONGEST, "latents.latent_size", config.latents.latent_size)
    _one_of("data.on_bad_record", config.data.on_bad_record, ("error", "skip"))
    _one_of("model.frozen_dtype", config.model.frozen_dtype, DTYPES)
    _one_of("model.slot_input", config.model.get("slot_input", "hidden"), SLOT_INPUTS)
    _one_of("data.source", config.data.source, ("frozen_lake", *FORMATS))
    if config.data.source == "frozen_lake" and config.data.feature_cache:
        raise BadConfig(
            "`data.feature_cache` must be empty with data.source frozen_lake, which draws other images all the time, "
            f"got {quote(config.data.feature_cache)}"
        )
    if config.data.source != "frozen_lake" and not config.data.path:
        raise BadConfig(f"`data.path` must be a file of the format {config.data.source}, got none")


def check_keys(config: ConfigDict) -> None:
    """Raises BadConfig, naming the nearest, for a key that nothing reads, and for a missing one.

    The keys are those of configs/base.py, with any names for stages and buckets, and those of the dataclasses that
    sections are read into; data.frozen_lake has its own check.
    """
    base = load_config(REPOSITORY / "configs" / "base.py")
    if kind := _needed_kind(config.get("stages", ()), base.stages):
        raise BadConfig(f"`stages` must be {kind}, got {quote(config.stages)}")
    stages = [key for key, value in config.items() if isinstance(value, ConfigDict) and "objective" in value]
    stages += [key for key in config.get("stages", ()) if key in config and key not in stages]
    _check_section(config, "", [key for key in base if key not in base.stages], stages)
    for name in stages:
        _check_section(config[name], f"{name}.", list(base[base.stages[0]]))
        _check_kinds(config[name], base[base.stages[0]], f"{name}.")
    _check_kinds(config, base, "")
    _check_section(config.data, "data.", list(base.data))
    _check_section(config.eval, "eval.", list(base.eval))
    _check_section(config.mesh, "mesh.", AXES)
    sections = [
        ("latents.", config.latents, LatentSettings, ()),
        *((f"data.buckets.{name}.", bucket, Layout, ("latent_size",)) for name, bucket in config.data.buckets.items()),
    ]
    fields = [field for field in dataclasses.fields(ModelConfig) if field.name != "vocab_size"]
    _check_section(config.model, "model.", STORAGE, [field.name for field in fields])
    if config.model.init_from:  # the rest of the shape is the checkpoint's own
        _check_section(config.model, "model.", STORAGE, ("dtype", "remat_policy", "attention", "lora", "slot_input"))
    else:
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        _check_section(config.model, "model.", required, [*STORAGE, *(field.name for field in fields)])
    if "vision" in config.model:
        sections.append(("model.vision.", config.model.vision, VisionConfig, ("out_hidden_size",)))
    for name, settings in (("lora", LoraConfig), ("rope_scaling", RopeScaling)):
        if name in config.model:
            sections.append((f"model.{name}.", config.model[name], settings, ()))
    for prefix, section, settings, elsewhere in sections:
        fields = [field for field in dataclasses.fields(settings) if field.name not in elsewhere]
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        _check_section(section, prefix, required, [field.name for field in fields])


def decoder_part(config: ConfigDict) -> str:
    """Returns the part of the parameters that learns to decode: the decoder, or with LoRA its adapters."""
    return "adapters" if config.model.get("lora", {}).get("rank", 0) else "decoder"


@contextlib.contextmanager
def blame(section: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Within it errors of a kind are about the values of a config section: raises BadConfig, which names it."""
    try:
        yield
    except kind as error:
        raise BadConfig(f"config section {section}: {error}") from error


def evaluation_file(config: ConfigDict) -> Path | None:
    """Returns the file of `eval.data`, None if stages are not evaluated."""
    path = config.eval.data
    if path == AUTO:
        path = VSP_MAPS if config.data.source == "frozen_lake" else ""
    return resolve_path(path) if path else None


def resolve_path(path: str | Path) -> Path:
    """Finds a path of the config: relative to the working directory if it exists there, else to the repository."""
    path = Path(path).expanduser()
    if path.is_absolute() or path.exists() or not (REPOSITORY / path).exists():
        return path
    return REPOSITORY / path


def has_begun(workdir: Path) -> bool:
    """Says whether a workdir holds a run to go on with: one that has saved a checkpoint."""
    return any(is_checkpoint(path) for path in workdir.glob("checkpoints/*/*"))


def is_checkpoint(path: Path) -> bool:
    """Says whether a folder is a complete checkpoint: one being written has another name."""
    return path.name.isascii() and path.name.isdigit() and str(int(path.name)) == path.name and path.is_dir()


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Raises BadConfig, naming the keys that differ, if the workdir holds a run of another config that has begun.

    Keys without effect on training may differ, and stages may be added after those that were there.
    """
    if has_begun(workdir):
        theirs, ours = dict(flatten(read_config(workdir))), dict(flatten(from_json(to_json(config))))
        if ours["stages"][: len(theirs["stages"])] == theirs["stages"]:
            theirs["stages"] = ours["stages"]
        missing = "absent"
        differing = [
            f"{key} ({quote(theirs.get(key, missing))} there, {quote(ours.get(key, missing))} here)"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key, missing) != ours.get(key, missing)
            and not any(key == name or key.startswith(name + ".") for name in NO_EFFECT_ON_TRAINING)
            and not (key.endswith(".steps") and ours.get(key.removesuffix("steps") + "epochs"))  # follow from records
        ]
        if differing:
            raise BadConfig(
                f"{workdir} was made with another config: {listed(differing)}; give these values, or another --workdir"
            )


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json into the workdir; raises as `files.write_text` does."""
    write_text(workdir / "config.json", to_json(config))


def read_config(workdir: Path) -> ConfigDict:
    """Returns the config that a workdir was made with.

    Raises BadConfig if it is not the workdir of a run, or its config.json is damaged.
    """
    path = workdir / "config.json"
    if not os.path.lexists(path) and not has_begun(workdir):
        raise BadConfig(f"{workdir} must be the workdir of a training run, but has no config.json")
    restore = "restore it: the training command and its flags print it with --config.print=true"
    try:
        config = _as_config(read_object(path, BadConfig))
        with config.unlocked():
            for name, added in ADDED.items():
                if isinstance(config.get(name), ConfigDict):
                    config[name] = ConfigDict(added | dict(config[name].items()))
        check_config(config.lock())
    except BadConfig as error:
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise BadConfig(f"{named}; {restore}") from error
    return config


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the config that `to_json` wrote; lists become tuples again."""
    return _as_config(json.loads(text))


def _as_config(values: dict[str, Any]) -> ConfigDict:
    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restore(item) for key, item in value.items()}
        return tuple(restore(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(restore(values)).lock()


def _split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Sorts `--config.key=value` and `--config.key value` from what is neither."""
    overrides, unknown, waiting = [], [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--config."):
            unknown.append(argument)
            continue
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise BadConfig(f"--config.{key} has no value; write --config.{key}=VALUE")
            text = waiting.pop(0)
        overrides.append((key, text))
    return overrides, unknown


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of a config with their dotted keys; an empty section is a value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _literal(text: str) -> Any:
    """Reads a Python literal; anything else is a string, which the type check then judges."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # of brackets within brackets, say
        return text


def _parse_tuple(text: str, current: tuple) -> Any:
    if text[:1] in ("(", "["):
        value = _literal(text)
        return tuple(value) if isinstance(value, list) else value
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    return words if current and isinstance(current[0], str) else tuple(_literal(word) for word in words)


def check_numbers(config: ConfigDict) -> None:
    """Raises BadConfig, naming the key, for a number that no 32-bit integer holds and one that is not finite."""
    for key, value in flatten(config):
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) > LARGEST:
                raise BadConfig(f"`{key}` must be from {-LARGEST} to {LARGEST}, got {quote(number)}")
            if isinstance(number, float) and not math.isfinite(number):
                raise BadConfig(f"`{key}` must be a finite number, got {number}")


def _check_kinds(section: ConfigDict, like: ConfigDict, prefix: str) -> None:
    """Raises BadConfig, naming the key, for a value that is not of the type of the same key in `like`."""
    for key in section:
        value, theirs = section[key], like.get(key)
        if isinstance(theirs, ConfigDict) != isinstance(value, ConfigDict) and theirs is not None:
            kind = "a section" if isinstance(theirs, ConfigDict) else "a value, no section"
        elif isinstance(value, ConfigDict):
            _check_kinds(value, theirs or ConfigDict(), f"{prefix}{key}.")
            continue
        else:
            kind = "" if type(theirs) is float and type(value) is int else _needed_kind(value, theirs)
        if kind:
            raise BadConfig(f"`{prefix}{key}` must be {kind}, got {quote(value)}")


def _check_section(section: Any, prefix: str, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    if not isinstance(section, ConfigDict):
        raise BadConfig(f"`{prefix[:-1]}` must be a section with {listed(required)}, got {quote(section)}")
    names = [*required, *optional]
    for key in section:
        if key not in names:
            nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise BadConfig(f"`{prefix}{key}` must be a key that is read; the nearest is {prefix}{nearest}")
    for key in required:
        if key not in section:
            raise BadConfig(f"`{prefix}{key}` must be given, but is missing; see configs/base.py")


def _one_of(key: str, value: str, accepted: Sequence[str], where: str = "") -> None:
    if value not in accepted:
        raise BadConfig(f"`{key}` must be one of {', '.join(accepted)}{where}, got {quote(value)}")


def _at_least(least: int, key: str, value: int) -> None:
    if type(value) is not int or value < least:
        raise BadConfig(f"`{key}` must be at least {least}, got {quote(value)}")


def _at_most(most: int, key: str, value: int) -> None:
    if value > most:
        raise BadConfig(f"`{key}` must be at most {most}, got {quote(value)}")


def _error_line(error: BaseException, path: Path) -> str:
    """Returns " line N" for the last line of the file that the error passed through."""
    path = path.resolve()
    if isinstance(error, SyntaxError) and error.filename and error.lineno and Path(error.filename).resolve() == path:
        return f" line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path]
    return f" line {lines[-1]}" if lines else ""


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if error.args else ""
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
