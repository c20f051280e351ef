"""The settings of a study in its workdir, study.json, which a later call must share."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilvr_jax.config.experiments import by_key
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.errors import quote
from ilvr_jax.files import read_object, write_json
from ilvr_jax.studies.runs import StudyRun

FILE = "study.json"
ABSENT = "absent"


def settings_of(name: str, file: str, runs: Sequence[StudyRun], quick: bool) -> dict[str, Any]:
    """Return the settings of a study as JSON values: name, config file, the base's config and the variants' changes.

    The first run must be the base's; the seeds are none of the settings.
    """
    variants = {run.name: {"variant": run.variant.variant, **run.changes} for run in runs}
    values = {key: value for key, value in by_key(runs[0].config).items() if key != "seed"}
    return json.loads(
        json.dumps({"study": name, "config": file, "quick": quick, "values": values, "variants": variants})
    )


def check_settings(workdir: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the variants that study.json has already.

    Raises BadConfig, naming the first key that differs, if that is another study's.
    """
    path = workdir / FILE
    stored = read_object(path, BadConfig) if path.exists() else {**settings, "variants": {}}
    variants = stored.get("variants")
    if not isinstance(variants, dict):
        raise BadConfig(f"{path} must hold the settings of a study, but has no `variants`; restore or delete it")
    known = {name: changes for name, changes in variants.items() if name in settings["variants"]}
    new = {name: changes for name, changes in settings["variants"].items() if name in known}
    theirs, ours = _by_key({**stored, "variants": known}), _by_key({**settings, "variants": new})
    for key in [*ours, *theirs]:
        if theirs.get(key, ABSENT) != ours.get(key, ABSENT):
            there, here = (quote(values.get(key, ABSENT)) for values in (theirs, ours))
            raise BadConfig(
                f"{workdir} was made by another study: {key.removeprefix('values.')} ({there} there, {here} here); "
                "give another --workdir"
            )
    return {**settings, "variants": {**variants, **settings["variants"]}}


def write_settings(workdir: Path, settings: Mapping[str, Any]) -> None:
    """Write study.json; raise as `write_text` does."""
    write_json(workdir / FILE, settings)


def _by_key(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of nested settings by dotted keys."""
    found = {}
    for key, value in settings.items():
        inside = _by_key(value) if isinstance(value, dict) and value else {"": value}
        found |= {f"{key}.{name}".removesuffix("."): part for name, part in inside.items()}
    return found
