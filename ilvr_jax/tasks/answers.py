"""Answers of every kind: one of the question's options, or free text."""

from pathlib import Path

from ilvr_jax.data.formats import FORMATS, find_format
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.tasks import spelling
from ilvr_jax.tasks.final_answer import answer_text, find_final_answer, last_line, parts, stated_answer
from ilvr_jax.tasks.options import LETTER_OPTIONS, find_option, options_of, read_option, right_option

LONGEST_BARE = 80  # characters of a last line that counts as the answer although nothing marks it as one


def open_source(path: Path, root: Path | None, on_bad_record: str, follow_links: bool = True) -> Source:
    """Open a file of records in any format; raise BadRecord if it cannot be read."""
    return FORMATS[find_format(path)](path, root, on_bad_record, for_evaluation=True, follow_links=follow_links)


def right_answer(record: Record) -> str | None:
    """Return the right answer of a record, None if it has none: a letter where its question lists options.

    It is the record's final answer, read like that of a decoded text, so that an answer in the same words is right;
    without one, it is the final answer stated in the record's own text.
    """
    if options := options_of(record):
        return right_option(record, options)
    if record.answer is not None:
        return find_final_answer(f"Final answer: {record.answer}")
    return find_final_answer(answer_text(record))


def check(record: Record) -> None:
    """Raise BadRecord, naming the record, if it has no right answer, or one of several lines.

    A decoded final answer ends with its line, so it could only match the first line of a list or an explanation.
    """
    answer = right_answer(record)
    if answer is None or not spelling.normalise(answer):
        raise BadRecord(f"{record.name}: must have a final answer to compare answers with, got none")
    lines = len((record.answer or "").strip().splitlines())
    if lines > 1 and not options_of(record):
        raise BadRecord(f"{record.name}: must have a final answer of one line, got {lines} lines")


def find_answer(text: str, record: Record | None = None) -> str | None:
    """Return the final answer of a text: a letter if the record has options, else free text; None without one.

    Free text is the final answer stated in the text, or else its last line, if that is short. Without a record, the
    letter of an option counts if no final answer is stated.
    """
    options = options_of(record) if record is not None else {}
    if options:
        return find_option(text, options)
    for part in parts(text):
        letter = find_option(part, LETTER_OPTIONS) if record is None else None
        line = last_line(part).strip("*_ ")
        bare = line if len(line) <= LONGEST_BARE and line[-1:] not in "?:" else None
        if answer := stated_answer(part) or letter or bare:
            return answer
    return None


def canonical(answer: str) -> str:
    """Return one spelling for all spellings of an answer; see `spelling.canonical`."""
    return spelling.canonical(answer)


def is_right(record: Record, answer: str) -> bool:
    """Return whether an answer is right, in any spelling; the record must have passed `check`."""
    right = right_answer(record)
    if options := options_of(record):
        return read_option(answer, options) == right
    return spelling.same(right, answer)
