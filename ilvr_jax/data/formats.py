"""The formats that files of records can be in, by name.

To add one, write a module beside this one with a source: an object with `__len__` and `__getitem__` that returns
Records (records.py) and can be pickled, since grain's workers get copies of it; ilvr_jax/data/mirage.py is the
shortest example. It raises BadRecord, one sentence that names the record, says what is wrong with it and what is
accepted; `skipped` is the list of such sentences for what it left out. Then give it a name in FORMATS: it can be
trained on as `data.source`.
"""

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path

from ilvr_jax.data.ilvr import IlvrSource
from ilvr_jax.data.json_lines import read_object
from ilvr_jax.data.mirage import MirageSource
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import BadRecord
from ilvr_jax.data.zebra_cot import ZebraCotSource


def open_ilvr(path: Path, root: Path | None, on_bad_record: str) -> Source:
    """Opens JSON lines with `sequence_plan`."""
    return IlvrSource(path, root, on_bad_record=on_bad_record)


def open_vsp(path: Path, root: Path | None, on_bad_record: str) -> Source:
    """Opens JSON lines of questions without answers: ILVR's fields, `sequence_plan` optional. For evaluation."""
    return IlvrSource(path, root, plan_required=False, on_bad_record=on_bad_record)


def open_zebra_cot(path: Path, root: Path | None, on_bad_record: str) -> Source:
    """Opens a parquet file or a folder of them; raises BadRecord if a root is given, since images are in the files."""
    if root is not None:
        raise BadRecord(f"{path}: has its images inside, and the root {root} was given for them; no root is accepted")
    return ZebraCotSource(path, on_bad_record)


# A function opens the records at `path`, paths of images being relative to `root` (None: the file's folder).
# `on_bad_record` is "error" or "skip". It raises BadRecord.
FORMATS: dict[str, Callable[[Path, Path | None, str], Source]] = {
    "ilvr": open_ilvr,
    "mirage": MirageSource,
    "vsp": open_vsp,
    "zebra_cot": open_zebra_cot,
}

# Fields that JSON lines of one format alone have.
FIELDS = {"sequence_plan": "ilvr", "text_output": "mirage"}
LINES_LOOKED_AT = 100  # some may be bad


def find_format(path: Path) -> str:
    """Returns the format of a file or folder, from what is in it; raises BadRecord if it is not there."""
    if path.is_dir() or path.suffix == ".parquet":
        return "zebra_cot"
    if not path.is_file():
        raise BadRecord(f"{path}: there is no such file; JSON lines, a parquet file or a folder of them is accepted")
    with path.open("rb") as file:
        for line in itertools.islice(file, LINES_LOOKED_AT):
            with contextlib.suppress(BadRecord):
                for field in FIELDS.keys() & read_object(line).keys():
                    return FIELDS[field]
    return "vsp"
