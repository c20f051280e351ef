"""The formats of files of records, by name.

To add one, write a module beside this one with a source: an object with `__len__` and `__getitem__` that returns
Records (records.py) and can be pickled, since grain's workers get copies of it; ilvr_jax/data/mirage.py is the shortest
example. Bad input raises BadRecord with one sentence that names the record, what it must be and what it was. `skipped`
lists these sentences for the records that were skipped, `remarks` sentences about records that are used. Then name it
in FORMATS, which makes it a value of `data.source`.
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
    """Open JSON lines of ILVR's fields."""
    return IlvrSource(path, root, on_bad_record=on_bad_record, **options)


def open_vsp(path: Path, root: Path | None, on_bad_record: str = "error", **options: bool) -> Source:
    """Open JSON lines of ILVR's fields without answers (`sequence_plan` is optional), for evaluation."""
    return IlvrSource(path, root, plan_required=False, on_bad_record=on_bad_record, **options)


# Each function opens the records at `path` and raises BadRecord; image paths are relative to `root` (None: the file's
# folder), and `on_bad_record` is "error" or "skip". Options by name: `for_evaluation` (read questions and final answers
# but no looks; default False) and `follow_links` (follow links out of the folder; default True).
FORMATS: dict[str, Callable[..., Source]] = {
    "ilvr": open_ilvr,
    "mirage": MirageSource,
    "vsp": open_vsp,
    "zebra_cot": ZebraCotSource,
}

FORMAT_OF_FIELD = {"sequence_plan": "ilvr", "text_output": "mirage"}  # fields that only one format of JSON lines has
RECORDS_READ = 100  # to find the format: some may be bad


def find_format(path: Path) -> str:
    """Return the format of a file or folder, found from its content; raise BadRecord if it cannot be read."""
    if os.path.isdir(path) or path.suffix == ".parquet":
        return "zebra_cot"
    with open_records(path) as file:
        for piece in itertools.islice(read_pieces(file, path), RECORDS_READ):
            with contextlib.suppress(BadRecord):
                for field in FORMAT_OF_FIELD.keys() & read_object(piece.content).keys():
                    return FORMAT_OF_FIELD[field]
    return "vsp"
