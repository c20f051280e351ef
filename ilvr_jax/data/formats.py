"""The formats that files of records can be in, by name.

To add one, write a module beside this one with a source: an object with `__len__` and `__getitem__` that returns
Records (records.py) and can be pickled, since grain's workers get copies of it; ilvr_jax/data/mirage.py is the
shortest example. It raises BadRecord, one sentence that names the record, what it must be and what it was; `skipped` is
the list of such sentences for the records it skipped, `remarks` one of sentences about records that are used. Then give
it a name in FORMATS: it can be trained on as `data.source`.
"""

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from ilvr_jax.data.ilvr import IlvrSource
from ilvr_jax.data.json_lines import open_records, read_object, read_pieces
from ilvr_jax.data.mirage import MirageSource
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import BadRecord
from ilvr_jax.data.zebra_cot import ZebraCotSource


def open_ilvr(path: Path, root: Path | None, on_bad_record: str = "error", **options: bool) -> Source:
    """Opens JSON lines with `sequence_plan`."""
    return IlvrSource(path, root, on_bad_record=on_bad_record, **options)


def open_vsp(path: Path, root: Path | None, on_bad_record: str = "error", **options: bool) -> Source:
    """Opens JSON lines of questions without answers: ILVR's fields, `sequence_plan` optional. For evaluation."""
    return IlvrSource(path, root, plan_required=False, on_bad_record=on_bad_record, **options)


# A function opens the records at `path`, paths of images being relative to `root` (None: the file's folder).
# `on_bad_record` is "error" or "skip". Options by name: `for_evaluation` (questions and final answers are needed, looks
# are not read; default False) and `follow_links` (out of the folder; default True). It raises BadRecord.
FORMATS: dict[str, Callable[..., Source]] = {
    "ilvr": open_ilvr,
    "mirage": MirageSource,
    "vsp": open_vsp,
    "zebra_cot": ZebraCotSource,
}

# Fields that JSON lines of one format alone have.
FIELDS = {"sequence_plan": "ilvr", "text_output": "mirage"}
RECORDS_LOOKED_AT = 100  # some may be bad


def find_format(path: Path) -> str:
    """Returns the format of a file or folder, from what is in it; raises BadRecord if it cannot be read."""
    if os.path.isdir(path) or path.suffix == ".parquet":
        return "zebra_cot"
    with open_records(path) as file:
        for piece in itertools.islice(read_pieces(file, path), RECORDS_LOOKED_AT):
            with contextlib.suppress(BadRecord):
                for field in FIELDS.keys() & read_object(piece.content).keys():
                    return FIELDS[field]
    return "vsp"
