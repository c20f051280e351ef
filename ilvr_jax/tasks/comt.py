"""CoMT: multiple choice or free text about an image, told step by step; the final answer counts."""

from pathlib import Path

from ilvr_jax.data.formats import FORMATS, find_format
from ilvr_jax.data.pipeline import Source
from ilvr_jax.tasks.final_answer import check_right_answer, find_final_answer, is_right_answer, normalise


def open_source(path: Path, root: Path | None, on_bad_record: str) -> Source:
    """Opens records in the format that the file is in; raises BadRecord for what cannot be read."""
    return FORMATS[find_format(path)](path, root, on_bad_record)


check, find_answer, canonical, is_right = check_right_answer, find_final_answer, normalise, is_right_answer
