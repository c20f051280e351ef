"""The settings of a study in its workdir, study.json, which a later call must share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilvr_jax.config.experiments import as_file, by_key, parse
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.errors import quote
from ilvr_jax.files import read_object, write_json
from ilvr_jax.studies.runs import StudyRun

FILE = "study.json"
ABSENT = "absent"


def settings_of(name: str, file: str, runs: Sequence[StudyRun], quick: bool) -> dict[str, Any]:
    """Return the settings of a study: name, config file, the base's config and the variants' changes.

    The first run must be the base's; the seeds are none of the settings.
    """
    variants = {run.name: {"variant": run.variant.variant, **run.changes} for run in runs}
    return {"study": name, "config": file, "quick": quick, "base": as_file(runs[0].config), "variants": variants}


def check_settings(workdir: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the variants that study.json has already.

    Raises BadConfig, naming the first key that differs, if that is another study's.
    """
    path = workdir / FILE
    if not path.exists():
        return dict(settings)
    stored = read_object(path, BadConfig)
    try:
        theirs, ours = _by_key(stored, settings), _by_key(settings, stored)
    except (BadConfig, LookupError, AttributeError) as error:
        raise BadConfig(f"{path} must hold the settings of a study, but is damaged ({error}); delete it") from error
    for key in [*ours, *theirs]:
        if theirs.get(key, ABSENT) != ours.get(key, ABSENT):
            there, here = (quote(values.get(key, ABSENT)) for values in (theirs, ours))
            raise BadConfig(
                f"{workdir} was made by another study: {key} ({there} there, {here} here); give another --workdir"
            )
    return {**settings, "variants": {**stored["variants"], **settings["variants"]}}


def _by_key(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted keys, with the variants that both settings have."""
    found = {key: settings[key] for key in ("study", "config", "quick")}
    found |= {key: value for key, value in by_key(parse(settings["base"], complete=True)).items() if key != "seed"}
    for name in settings["variants"].keys() & others["variants"].keys():
        found |= {f"variants.{name}.{key}": text for key, text in settings["variants"][name].items()}
    return found


def write_settings(workdir: Path, settings: Mapping[str, Any]) -> None:
    """Write study.json; raise as `write_text` does."""
    write_json(workdir / FILE, settings)
