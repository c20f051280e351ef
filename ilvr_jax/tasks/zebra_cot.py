"""Zebra-CoT: free text or multiple choice, scored by the final answer."""

from pathlib import Path

from ilvr_jax.data.formats import FORMATS
from ilvr_jax.data.pipeline import Source
from ilvr_jax.tasks import answers


def open_source(path: Path, root: Path | None, on_bad_record: str, follow_links: bool = True) -> Source:
    """Open a parquet file or a folder of them; raise BadRecord if one cannot be read."""
    return FORMATS["zebra_cot"](path, root, on_bad_record, for_evaluation=True, follow_links=follow_links)


check, find_answer, canonical, is_right = answers.check, answers.find_answer, answers.canonical, answers.is_right
