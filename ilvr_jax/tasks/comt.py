"""CoMT: multiple choice or free text about an image, told step by step; the final answer counts."""

from pathlib import Path

from ilvr_jax.data.formats import FORMATS, find_format
from ilvr_jax.data.pipeline import Source
from ilvr_jax.tasks import answers


def open_source(path: Path, root: Path | None, on_bad_record: str, follow_links: bool = True) -> Source:
    """Opens records in the format that the file is in; raises BadRecord for what cannot be read."""
    return FORMATS[find_format(path)](path, root, on_bad_record, for_evaluation=True, follow_links=follow_links)


check, find_answer, canonical, is_right = answers.check, answers.find_answer, answers.canonical, answers.is_right
