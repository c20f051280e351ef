"""VSP spatial reasoning: will the given plan reach the goal (A), fall into a hole (B) or stop short of both (C)?"""

import re
from pathlib import Path

from ilvr_jax.data.formats import FORMATS, find_format
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.tasks.final_answer import answer_text, find_boxed, normalise

LETTERS = ("A", "B", "C")
# Only capitals after a word: "the answer is a success" names no option.
STATEMENT = re.compile(r"(?i:\b(?:answer|option|outcome)\b(?:[\s*]*is\b)?)[\s:(\"'*$]*([ABC])\b(?!['’]\w)")
BARE = re.compile(r"[\s(\"'*$]*([ABC])[\s).\"'*$]*", re.IGNORECASE)


def open_source(path: Path, root: Path | None, on_bad_record: str) -> Source:
    """Opens records in the format that the file is in; raises BadRecord for what cannot be read."""
    return FORMATS[find_format(path)](path, root, on_bad_record)


def check(record: Record) -> None:
    """Raises BadRecord, naming the record, if it does not say which answer is right."""
    if right_answer(record) is None:
        raise BadRecord(
            f"{record.name}: tells no right answer; A, B or C is accepted, as final answer or at the end of the text"
        )


def find_answer(text: str) -> str | None:
    r"""Returns A, B or C: what stands in the last `\boxed{}`, if there is one, and None if that is something else.

    Without a box it is the last statement such as "answer is B", "Answer: (B)" or "option C", and without one of
    these the letter that is alone on the last line.
    """
    boxed = find_boxed(text)
    if boxed is not None:
        letter = normalise(boxed).upper()
        return letter if letter in LETTERS else None
    statements = STATEMENT.findall(text)
    if statements:
        return statements[-1]
    bare = BARE.fullmatch(text.rstrip().rpartition("\n")[2])
    return bare[1].upper() if bare else None


def canonical(answer: str) -> str:
    """Returns an answer as it is: a letter has one spelling already."""
    return answer


def is_right(record: Record, answer: str) -> bool:
    """Says whether an answer is the record's own."""
    return answer == right_answer(record)


def right_answer(record: Record) -> str | None:
    """Returns the letter of the record's final answer, or of its answer's text if it has none; None if neither does."""
    if record.answer is not None:
        return find_answer(record.answer) or find_answer(f"Answer: {record.answer}")
    return find_answer(answer_text(record))
