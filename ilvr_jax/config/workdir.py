"""The config in a workdir, and the check of another for resuming its run."""

import json
import os
from pathlib import Path
from typing import Any

from ilvr_jax.config.experiments import as_file, parse
from ilvr_jax.config.fields import BadConfig, flatten
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.errors import listed, quote
from ilvr_jax.files import read_object, write_text

ABSENT = "absent"


def has_begun(workdir: Path) -> bool:
    """Return whether a workdir holds a run that can resume: one with a checkpoint."""
    return any(is_checkpoint(path) for path in workdir.glob("checkpoints/*/*"))


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a complete checkpoint; one being written has another name."""
    return path.name.isascii() and path.name.isdigit() and str(int(path.name)) == path.name and path.is_dir()


def check_resumable(config: RunConfig, workdir: Path) -> None:
    """Raise BadConfig, naming the keys that differ, if the workdir holds a run of another config that has begun.

    Resumable keys may differ, and stages may be added after those in the workdir.
    """
    if not has_begun(workdir):
        return
    stored = read_config(workdir)
    theirs, ours = dict(_compared(stored)), dict(_compared(config))
    if list(config.stages)[: len(stored.stages)] != list(stored.stages):
        theirs["stages"], ours["stages"] = tuple(stored.stages), tuple(config.stages)
    added = tuple(f"stages.{name}." for name in config.stages if name not in stored.stages)
    differing = [
        f"{key.removeprefix('stages.')} ({quote(theirs.get(key, ABSENT))} there, {quote(ours.get(key, ABSENT))} here)"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, ABSENT) != ours.get(key, ABSENT)
        and not key.startswith(added)
        and not (key.endswith(".steps") and ours.get(key.removesuffix("steps") + "epochs"))  # from the records
    ]
    if differing:
        raise BadConfig(
            f"{workdir} was made with another config: {listed(differing)}; give these values, or another --workdir"
        )


def _compared(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value, resumable in flatten(config) if not resumable}


def write_config(config: RunConfig, workdir: Path) -> None:
    """Write config.json into the workdir. Raises as `files.write_text` does."""
    write_text(workdir / "config.json", to_json(config))


def to_json(config: RunConfig) -> str:
    """Return the text of config.json."""
    return json.dumps(as_file(config), indent=2) + "\n"


def read_config(workdir: Path) -> RunConfig:
    """Return the config of a workdir.

    Raises BadConfig if it is not the workdir of a run, or its config.json is damaged.
    """
    path = workdir / "config.json"
    if not os.path.lexists(path) and not has_begun(workdir):
        raise BadConfig(f"{workdir} must be the workdir of a training run, but has no config.json")
    try:
        return parse(_in_tokens(read_object(path, BadConfig), workdir), complete=True)
    except BadConfig as error:
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise BadConfig(
            f"{named}; to restore it, save what the training command prints with its flags and --config.print=true"
        ) from error


def _in_tokens(values: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Return a config with buckets in vision tokens; earlier versions counted attention windows."""
    buckets = values.get("data", {}).get("buckets", {}) if isinstance(values.get("data"), dict) else {}
    sections = [bucket for bucket in buckets.values() if isinstance(bucket, dict)] if isinstance(buckets, dict) else []
    for bucket in sections:
        for kind in ("image", "helper"):
            windows = bucket.pop(f"{kind}_windows", None)
            if isinstance(windows, int):
                bucket[f"{kind}_tokens"] = windows * _window_tokens(values, workdir)
    return values


def _window_tokens(values: dict[str, Any], workdir: Path) -> int:
    """Return the vision tokens of an attention window; each has 28 pixels a side."""
    published = workdir / "pretrained" / "config.json"
    vision = read_object(published, BadConfig).get("vision_config") if published.is_file() else None
    vision = vision or values.get("model", {}).get("vision", {})
    return (vision.get("window_size", 112) // 28) ** 2
