"""VSP spatial reasoning: will the given plan reach the goal (A), fall into a hole (B) or stop short of both (C)?"""

from collections.abc import Mapping
from pathlib import Path

from ilvr_jax.data.formats import FORMATS, find_format
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.errors import quote
from ilvr_jax.tasks.options import find_option, find_options, read_option, right_option

OUTCOMES = {"A": "Action Success", "B": "Falling into a hole", "C": "Player safe but failed to reach the goal"}


def open_source(path: Path, root: Path | None, on_bad_record: str, follow_links: bool = True) -> Source:
    """Opens records in the format that the file is in; raises BadRecord for what cannot be read."""
    return FORMATS[find_format(path)](path, root, on_bad_record, for_evaluation=True, follow_links=follow_links)


def check(record: Record) -> None:
    """Raises BadRecord, naming the record, if it has no right answer."""
    if right_answer(record) is None:
        got = "none" if record.answer is None else quote(record.answer)
        raise BadRecord(
            f"{record.name}: must have one of {', '.join(outcomes(record))} as final answer or at the end of its text, "
            f"got {got}"
        )


def find_answer(text: str, record: Record | None = None) -> str | None:
    """Returns the letter of the outcome that a decoded text ends in, as `find_option` reads it."""
    return find_option(text, OUTCOMES if record is None else outcomes(record))


def canonical(answer: str) -> str:
    """Returns an answer as it is: a letter has one spelling already."""
    return answer


def is_right(record: Record, answer: str) -> bool:
    """Returns whether an answer is the record's own."""
    return read_option(answer, outcomes(record)) == right_answer(record)


def right_answer(record: Record) -> str | None:
    """Returns the letter of the record's final answer, or of its answer's text if it has none; None if neither does."""
    return right_option(record, outcomes(record))


def outcomes(record: Record) -> Mapping[str, str]:
    """Returns the options that the record's question lists, or those of the task."""
    return find_options(record.question) or OUTCOMES
