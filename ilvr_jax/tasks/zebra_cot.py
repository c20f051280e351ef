"""Zebra-CoT: free text that ends in a final answer, which counts."""

from pathlib import Path

from ilvr_jax.data.formats import FORMATS
from ilvr_jax.data.pipeline import Source
from ilvr_jax.tasks.final_answer import check_right_answer, find_final_answer, is_right_answer, normalise


def open_source(path: Path, root: Path | None, on_bad_record: str) -> Source:
    """Opens a parquet file or a folder of them; raises BadRecord for what cannot be read, and if a root is given."""
    return FORMATS["zebra_cot"](path, root, on_bad_record)


check, find_answer, canonical, is_right = check_right_answer, find_final_answer, normalise, is_right_answer
