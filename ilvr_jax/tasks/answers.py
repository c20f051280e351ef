"""Answers of every kind that a text can end in: an option of the question's, or free text."""

from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.tasks import spelling
from ilvr_jax.tasks.final_answer import answer_text, find_final_answer, last_line, parts, stated_answer
from ilvr_jax.tasks.options import LETTERS, find_option, options_of, read_option, right_option

LONGEST_BARE = 80  # characters of a last line that is an answer without saying so


def right_answer(record: Record) -> str | None:
    """Returns the answer that is right, None if the record has none: a letter where its question lists options.

    That is its final answer, read as if a text ended in it, so that who writes the same is right; for a record
    without one, the final answer that its own text says.
    """
    if options := options_of(record):
        return right_option(record, options)
    if record.answer is not None:
        return find_final_answer(f"Final answer: {record.answer}")
    return find_final_answer(answer_text(record))


def check(record: Record) -> None:
    """Raises BadRecord, naming the record, if it has no right answer, or one of several lines.

    A final answer ends with its line, and the first line of a list or of an explanation is not enough to compare.
    """
    answer = right_answer(record)
    if answer is None or not spelling.normalise(answer):
        raise BadRecord(f"{record.name}: must have a final answer, which evaluation compares answers with")
    lines = len((record.answer or "").strip().splitlines())
    if lines > 1 and not options_of(record):
        raise BadRecord(f"{record.name}: must have a final answer of one line, got {lines} lines")


def find_answer(text: str, record: Record | None = None) -> str | None:
    """Returns the answer that a text ends in: a letter where the record has options, else free text; None without one.

    Free text is the final answer that the text says, or else its last line, if that is short. Without a record, an
    option that a text names counts if it says no final answer.
    """
    options = options_of(record) if record is not None else {}
    if options:
        return find_option(text, options)
    for part in parts(text):
        letter = find_option(part, LETTERS) if record is None else None
        line = last_line(part).strip("*_ ")
        bare = line if len(line) <= LONGEST_BARE and line[-1:] not in "?:" else None
        if answer := stated_answer(part) or letter or bare:
            return answer
    return None


def canonical(answer: str) -> str:
    """Returns one spelling for all spellings of an answer, as `spelling.canonical` does."""
    return spelling.canonical(answer)


def is_right(record: Record, answer: str) -> bool:
    """Returns whether an answer is the record's own, in any spelling; the record must have passed the check."""
    right = right_answer(record)
    if options := options_of(record):
        return read_option(answer, options) == right
    return spelling.same(right, answer)
