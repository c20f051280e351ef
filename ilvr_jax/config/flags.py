"""The flags of a config: --config=FILE.py[:VARIANT] and --config.section.key=value.

ml_collections.config_flags works with absl's flags alone; these are argparse's, with the types of the schema.
"""

import argparse
import ast
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ilvr_jax.config.experiments import as_file, load_config, parse, stage_names
from ilvr_jax.config.fields import KINDS, BadConfig, nearest
from ilvr_jax.config.schema import RunConfig, StageConfig
from ilvr_jax.errors import listed, quote


def read_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Add --config, --workdir and --config.section.key to a parser and read the command line.

    Return the namespace with `config` (a RunConfig) and `workdir` (a Path; by default runs/ and the name of the config
    file, with its variant). Raises as `read_config_flags` does.
    """
    parser.add_argument("--workdir", help="the folder of all output (default: runs/<config name>)")
    options = read_config_flags(parser, arguments)
    if options.workdir is None:
        name, _, variant = options.config_file.partition(":")
        options.workdir = Path("runs") / "_".join([Path(name).stem, *variant.replace("-", "_").split()])
    elif not options.workdir or "\0" in options.workdir:
        raise BadConfig(f"--workdir must be a folder, got {quote(options.workdir)}")
    options.workdir = Path(options.workdir)
    return options


def read_config_flags(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    default: Path | None = None,
    prepare: Callable[[argparse.Namespace, dict[str, Any]], None] | None = None,
) -> argparse.Namespace:
    """Add --config and --config.section.key to a parser and read the command line.

    Return the namespace with `config` (a RunConfig) and `config_file` (as given). With a `default` config --config may
    be omitted, and `config_file` is then None. `prepare` gets the namespace and the file's values, which it may change
    before those of flags are set. Raises BadConfig if the file, a key or a value is invalid. Exits with status 2, as
    argparse does, at an unknown flag, and with 0 after printing the config for --config.print=true.
    """
    parser.allow_abbrev = False
    parser.add_argument(
        "--config", required=default is None, help="a Python file with a function get_config(), or FILE.py:VARIANT"
    )
    parser.epilog = (
        "Any value of the config can be set with --config.section.key=value; --config.print=true prints the resulting "
        "config and exits."
    )
    options, others = parser.parse_known_args(arguments)
    overrides, unknown = _split_overrides(others)
    if unknown:
        parser.error(f"unrecognized arguments: {listed(unknown)}")
    if options.config == "":
        raise BadConfig("--config must be a Python file such as configs/base.py, got ''")
    options.config_file = options.config or None
    values = load_config(options.config_file or default).to_dict()
    if prepare:
        prepare(options, values)
    for key, text in overrides:
        if key != "print":
            override(values, key, text)
    options.config = parse(values)
    if parse_text("print", dict(overrides).get("print", "false"), bool):
        print(json.dumps(as_file(options.config), indent=2))
        sys.exit(0)
    return options


def override(values: dict[str, Any], key: str, text: str) -> None:
    """Set the value of a dotted key from text, in the key's type in the schema.

    Tuples are written (1, 2) or 1,2. Raises BadConfig for an unknown key, naming the nearest valid one, and for text
    that is not of the type.
    """
    known = dict(_keys(RunConfig, values)) | {
        f"{name}.{key}": kind for name in stage_names(values) for key, kind in _keys(StageConfig, values[name])
    }
    if key not in known:
        inside = sorted({name[len(key) + 1 :].split(".")[0] for name in known if name.startswith(f"{key}.")})
        if inside:
            raise BadConfig(f"--config.{key} must be one of the section's keys, such as {listed(inside)}")
        raise BadConfig(f"--config.{key} must be a key of the config; the nearest is {nearest(key, known)}")
    *parents, name = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
    section[name] = parse_text(key, text, known[key])


def parse_text(key: str, text: str, kind: Any) -> Any:
    """Return the text as a value of a type of the schema. Raises BadConfig, naming the key, if it is not one."""
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if kind is str:
        return text
    if typing.get_origin(kind) is tuple:
        return _parse_tuple(key, text, typing.get_args(kind)[0])
    value = text.lower() == "true" if text.lower() in ("true", "false") else _literal(text)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise BadConfig(f"`{key}` must be {KINDS[kind]}, got {quote(text)}")
    return value


def _parse_tuple(key: str, text: str, kind: type) -> tuple:
    if text[:1] in ("(", "["):
        items = _literal(text)
    else:
        words = [word.strip() for word in text.split(",") if word.strip()]
        items = words if kind is str else [_literal(word) for word in words]
    if not isinstance(items, tuple | list) or not all(
        type(item) in (kind, int if kind is float else kind) for item in items
    ):
        raise BadConfig(f"`{key}` must be a tuple of {kind.__name__}, got {quote(text)}")
    return tuple(float(item) if kind is float else item for item in items)


def _literal(text: str) -> Any:
    """Return a Python literal's value, or the text itself, which then fails the type check."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # the last two for deeply nested brackets
        return text


def _keys(schema: type, values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a schema and their types; named sections are those among the values."""
    kinds, values = typing.get_type_hints(schema), values if isinstance(values, Mapping) else {}
    for field in dataclasses.fields(schema):
        kind, key = kinds[field.name], f"{prefix}{field.name}"
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            yield from _keys(kind, values.get(field.name), f"{key}.")
        elif typing.get_origin(kind) is Mapping and schema is RunConfig:
            yield key, tuple[str, ...]  # the names of the stages
        elif typing.get_origin(kind) is Mapping:
            for name, section in (values.get(field.name) or {}).items():
                yield from _keys(typing.get_args(kind)[1], section, f"{key}.{name}.")
        else:
            yield key, kind


def _split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the keys and texts of `--config.key=value` and `--config.key value`, and all other arguments."""
    overrides, unknown, waiting = [], [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--config."):
            unknown.append(argument)
            continue
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise BadConfig(f"--config.{key} must have a value, got none; write --config.{key}=VALUE")
            text = waiting.pop(0)
        overrides.append((key, text))
    return overrides, unknown
