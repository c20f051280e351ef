"""VSP spatial reasoning: does a given plan reach the goal (A), fall into a hole (B) or stop short of both (C)?"""

from collections.abc import Mapping

from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.errors import quote
from ilvr_jax.tasks import answers
from ilvr_jax.tasks.options import find_option, find_options, read_option, right_option

OUTCOMES = {"A": "Action Success", "B": "Falling into a hole", "C": "Player safe but failed to reach the goal"}
open_source = answers.open_source


def check(record: Record) -> None:
    """Raise BadRecord, naming the record, if it has no right answer."""
    if right_answer(record) is None:
        got = "none" if record.answer is None else quote(record.answer)
        raise BadRecord(
            f"{record.name}: must have one of {', '.join(outcomes(record))} as final answer or at the end of its text, "
            f"got {got}"
        )


def find_answer(text: str, record: Record | None = None) -> str | None:
    """Return the letter of the outcome named by a decoded text; see `find_option`."""
    return find_option(text, OUTCOMES if record is None else outcomes(record))


def canonical(answer: str) -> str:
    """Return an answer unchanged: a letter has one spelling."""
    return answer


def is_right(record: Record, answer: str) -> bool:
    """Return whether an answer is right."""
    return read_option(answer, outcomes(record)) == right_answer(record)


def right_answer(record: Record) -> str | None:
    """Return the letter of the record's final answer, or else of its answer's text; None if neither names an option."""
    return right_option(record, outcomes(record))


def outcomes(record: Record) -> Mapping[str, str]:
    """Return the options that the record's question lists, or those of the task."""
    return find_options(record.question) or OUTCOMES
