r"""Free-text answers: where a text says its final answer, and when two of them are the same."""

import re
import unicodedata

from ilvr_jax.data.records import BadRecord, Record, Text

BOX = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is matched with its backslash
TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
STATEMENT = re.compile(
    r"\b(?:(?P<line>final\s+answer\**\s*:)|answer\b\**(?:\s*:|\s+is\b\s*:?))\**\s*",
    re.IGNORECASE,
)
# Up to a full stop before whitespace, so not that of 3.5; nor that of an option, "B. Because ...".
SENTENCE = re.compile(r"(?:[A-Za-z]\.\s)?.*?(?=[.!?](?:\s|$)|$)")

QUOTES = "\"'`“”‘’"
WRAPPED = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]")
LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"(?<![\w.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!\w|,[0-9])")
DECIMAL = re.compile(r"(?<![\w.])(0|[1-9][0-9]*)?\.([0-9]+)(?!\w|\.[0-9])")
POSITIVE = re.compile(r"\+([0-9]+(?:\.[0-9]+)?)")
OPTION_ALONE = re.compile(r"(?:option )?\(?([a-j])\)?[.:]?")
# "(a) and (b)" or "(a) + b" chooses no single option.
OPTION_WITH_TEXT = re.compile(r"(?:option )?\(?([a-j])(?:\)[.:]?|[.:]) (?!(?:and|or)\b|[&+=*/]|\([a-j]\)).+")


def find_boxed(text: str) -> str | None:
    r"""Returns what stands in the last `\boxed{...}`, braces in it balanced; "" if it is not closed, None without one.

    Braces that follow a backslash do not count.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip()
    return ""


def find_final_answer(text: str) -> str | None:
    r"""Returns the final answer that a text says; None if it says none, or an empty one.

    It is what stands in the last `\boxed{...}`; without a box, in the last `<answer>...</answer>`; without that, what
    follows the last "final answer:", "answer is" or "answer:". After "final answer:" that is the rest of the line,
    after the others the rest of the sentence, if that ends earlier. The answer may begin on a later line.
    """
    answer = find_boxed(text)
    if answer is None:
        tags = TAG.findall(text)
        answer = tags[-1] if tags else _stated(text)
    return answer.strip().strip("*").strip() or None


def _stated(text: str) -> str:
    statements = list(STATEMENT.finditer(text))
    if not statements:
        return ""
    line = text[statements[-1].end() :].partition("\n")[0]
    return line if statements[-1]["line"] else SENTENCE.match(line)[0]


def normalise(answer: str) -> str:
    r"""Returns one spelling for the ways to write an answer; "" if nothing is left of it.

    - Case, Unicode's compatibility forms and runs of whitespace make no difference.
    - Around the answer, whitespace, quotes, `$`, `*`, `\( \)`, `\[ \]` and final full stops are dropped; `\text{x}` is
      x, `\$` is $ and `\%` is %.
    - Numbers, in a text too: thousands commas are dropped, 3.0 is 3, .50 is 0.5; alone, +3 is 3 and -0 is 0. What
      has an exponent or begins with zeros is left as it is.
    - A letter from a to j that names an option is that letter alone: "(a)", "a.", "a)", "option a", and with the
      option's text behind it: "a: the red one", "a. the red one", "(a) the red one".
    """
    while (plainer := _normalise_once(answer)) != answer:
        answer = plainer
    return answer


def _normalise_once(text: str) -> str:
    text = _fold(text).replace("−", "-").replace("⁄", "/")
    text = " ".join(text.split()).lstrip(f"{QUOTES}$* ").rstrip(f"{QUOTES}$* .")
    if wrapped := WRAPPED.fullmatch(text):
        text = wrapped[1] or wrapped[2] or ""
    text = LATEX_TEXT.sub(r"\1", text)
    text = text.replace(r"\$", "$").replace(r"\%", "%")
    text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = DECIMAL.sub(lambda number: f"{number[1] or 0}.{number[2].rstrip('0')}".rstrip("."), text)
    if positive := POSITIVE.fullmatch(text):
        text = positive[1]
    elif text == "-0":
        text = "0"
    if option := OPTION_ALONE.fullmatch(text) or OPTION_WITH_TEXT.fullmatch(text):
        text = option[1]
    return text


def _fold(text: str) -> str:
    """Returns a text without differences of case and compatibility, as Unicode's D147 defines it."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return unicodedata.normalize("NFKC", folded.casefold())


def answer_text(record: Record) -> str:
    """Returns the texts of a record's own answer, joined."""
    return "".join(step.content for step in record.steps if isinstance(step, Text))


def right_answer(record: Record) -> str | None:
    """Returns the answer that is right, None if the record tells none.

    That is its final answer, read as if a text ended in it, so that who writes the same is right; for a record
    without one, the final answer that its own text says.
    """
    if record.answer is not None:
        return find_final_answer(f"Final answer: {record.answer}")
    return find_final_answer(answer_text(record))


def check_right_answer(record: Record) -> None:
    """Raises BadRecord, naming the record, if it tells no right answer, or one of several lines.

    A final answer ends with its line, and the first line of a list or of an explanation is not enough to compare.
    """
    answer = right_answer(record)
    if answer is None or not normalise(answer):
        raise BadRecord(f"{record.name}: tells no final answer, which evaluation needs to compare answers with")
    lines = len((record.answer or "").strip().splitlines())
    if lines > 1:
        raise BadRecord(f"{record.name}: has a final answer of {lines} lines; one line is accepted")


def is_right_answer(record: Record, answer: str) -> bool:
    """Says whether an answer is the record's own, in any spelling; the record must have passed the check."""
    return normalise(answer) == normalise(right_answer(record))
