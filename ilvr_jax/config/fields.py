"""The generic reader of config sections: a mapping becomes a frozen dataclass, or one sentence names what is wrong.

A schema is a dataclass whose fields are made by `setting`: the type, default, range and meaning of a key are in one
place.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ilvr_jax.errors import InputError, listed, quote

LARGEST = 2**31 - 1  # of whole numbers: sizes, steps and seeds go into 32-bit integers
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", tuple: "a tuple"}


class BadConfig(InputError):
    """A configuration that cannot be used; the sentence names the key, what it must be and what it is."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """The meaning and the range of a key."""

    meaning: str
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: Sequence[str] = ()  # of a text, or of each item of a tuple
    nonempty: bool = False  # of a text or tuple
    resumable: bool = False  # a run may resume with another value: nothing learned depends on it
    added: bool = False  # workdirs of earlier versions lack the key, and used the default
    partial: bool = False  # of a section: its keys may be absent, even in workdirs

    @property
    def must_be(self) -> str:
        """The range in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        least = f"above {self.above}" if self.above is not None else f"at least {self.least}"
        most = f"below {self.below}" if self.below is not None else f"at most {self.most}"
        if self.most is None and self.below is None:
            return least
        if self.least is None and self.above is None:
            return most
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        return f"{least} and {most}"

    def accepts(self, value: float | str) -> bool:
        """Return whether a value of the right type is in the range."""
        if self.choices:
            return value in self.choices
        if isinstance(value, str) or isinstance(value, bool):
            return True
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def setting(meaning: str, default: Any = dataclasses.MISSING, **rule: Any) -> Any:
    """Return the dataclass field of a config key; `rule` as in `Rule`. Without a default the key must be given."""
    metadata = {"rule": Rule(meaning, **rule)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def rule_of(field: dataclasses.Field) -> Rule:
    """Return the rule of a schema's field."""
    return field.metadata["rule"]


def read(schema: type, values: Any, key: str = "", complete: bool = False) -> Any:
    """Return the schema's instance with a mapping's values; lists become tuples, and integers floats where needed.

    With `complete` every key must be given, except those added by later versions. A schema may have a method
    `conflicts()` that yields (field name, what it must be) for fields that contradict others. Raises BadConfig.
    """
    if isinstance(values, schema):
        return values
    fields = {field.name: field for field in dataclasses.fields(schema)}
    if not isinstance(values, Mapping):
        raise BadConfig(f"`{key}` must be a section with {listed(fields)}, got {quote(values)}")
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in fields:
            raise BadConfig(
                f"`{prefix}{name}` must be a key of the config; the nearest is {prefix}{nearest(name, fields)}"
            )
    kinds, read_values = typing.get_type_hints(schema), {}
    for name, field in fields.items():
        rule, required = rule_of(field), not has_default(field)
        if name in values:
            strict = complete and not rule.partial
            read_values[name] = read_value(kinds[name], values[name], f"{prefix}{name}", rule, strict)
        elif required or (complete and not rule.added and field.default is not None):
            raise BadConfig(f"`{prefix}{name}` must be given, but is missing: {rule.meaning}")
    instance = schema(**read_values)
    for name, must_be in getattr(instance, "conflicts", tuple)():
        raise BadConfig(f"`{prefix}{name}` must be {must_be}, got {quote(getattr(instance, name))}")
    return instance


def has_default(field: dataclasses.Field) -> bool:
    """Return whether a schema's field has a default."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def read_value(kind: Any, value: Any, key: str, rule: Rule, complete: bool = False) -> Any:
    """Return a value in its declared type, its range checked. Raises BadConfig, naming the key."""
    if dataclasses.is_dataclass(kind):
        return read(kind, value, key, complete)
    if isinstance(kind, types.UnionType):  # T | None
        return None if value is None else read_value(typing.get_args(kind)[0], value, key, rule, complete)
    origin = typing.get_origin(kind) or kind
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise BadConfig(f"`{key}` must be a section, got {quote(value)}")
        if rule.nonempty and not value:
            raise BadConfig(f"`{key}` must hold at least one section, got none")
        item_kind = typing.get_args(kind)[1]
        return {name: read_value(item_kind, item, f"{key}.{name}", rule, complete) for name, item in value.items()}
    if isinstance(value, Mapping):
        raise BadConfig(f"`{key}` must be a value, not a section, got {quote(value)}")
    if origin is tuple:
        return _read_tuple(typing.get_args(kind)[0], value, key, rule)
    return _read_scalar(kind, value, key, rule)


def _read_tuple(kind: type, value: Any, key: str, rule: Rule) -> tuple:
    if not isinstance(value, tuple | list):
        raise BadConfig(f"`{key}` must be a tuple, got {quote(value)}")
    items = tuple(float(item) if kind is float and type(item) is int else item for item in value)
    if not all(type(item) is kind for item in items):
        raise BadConfig(f"`{key}` must be a tuple of {kind.__name__}, got {quote(value)}")
    if rule.nonempty and not items:
        raise BadConfig(f"`{key}` must name at least one{f' of {listed(rule.choices)}' * bool(rule.choices)}, got none")
    for item in items:
        _read_scalar(kind, item, key, rule)
    return items


def _read_scalar(kind: type, value: Any, key: str, rule: Rule) -> Any:
    if type(value) is int and abs(value) > LARGEST:
        raise BadConfig(f"`{key}` must be from {-LARGEST} to {LARGEST}, got {quote(value)}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise BadConfig(f"`{key}` must be {KINDS[kind]}, got {quote(value)}")
    if kind is float and not math.isfinite(value):
        raise BadConfig(f"`{key}` must be a finite number, got {value}")
    if rule.nonempty and value == "":
        raise BadConfig(f"`{key}` must not be empty")
    if not rule.accepts(value):
        raise BadConfig(f"`{key}` must be {rule.must_be}, got {quote(value)}")
    return value


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """Return a table's entry. Raises BadConfig, listing the entries, if there is none of that name."""
    if name not in table:
        raise BadConfig(f"`{key}` must be one of {', '.join(table)}, got {quote(name)}")
    return table[name]


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the most similar of `names`, first those that end in the same key."""
    names = list(names)
    ends = [other for other in names if other.split(".")[-1] == name.split(".")[-1]]
    return (ends or difflib.get_close_matches(name, names, n=1, cutoff=0.0) or ["none"])[0]


def flatten(section: Any, prefix: str = "", resumable: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """Yield the dotted key of each value of a section, the value, and whether a run may resume with another."""
    if isinstance(section, Mapping):
        for name, item in section.items():
            yield from flatten(item, f"{prefix}{name}.", resumable)
        return
    for field in dataclasses.fields(section):
        value, may_differ = getattr(section, field.name), resumable or rule_of(field).resumable
        if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{field.name}.", may_differ)
        elif value is not None:
            yield f"{prefix}{field.name}", value, may_differ


def as_dict(section: Any) -> dict[str, Any]:
    """Return a section as nested dicts, without keys whose value is None."""
    if isinstance(section, Mapping):
        return {name: as_dict(item) for name, item in section.items()}
    values = ((field.name, getattr(section, field.name)) for field in dataclasses.fields(section))
    return {
        name: as_dict(value) if dataclasses.is_dataclass(value) or isinstance(value, Mapping) else value
        for name, value in values
        if value is not None
    }
