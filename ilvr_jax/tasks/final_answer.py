"""Finding the final answer in a text."""

import re
from collections import deque

from ilvr_jax.data.records import Record, Text
from ilvr_jax.tasks.spelling import first_sentence

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is matched with its backslash
TAIL = 100_000  # characters at the end of a text that are searched for statements
LAST = 20  # statements that are read, so that the text of a model that repeats itself is read fast
LONGEST_LINE = 2_000  # characters of a statement
TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
THOUGHT_END = "</think>"
STATEMENT = re.compile(
    r"""
    (?:
        (?<![\w-])(?P<line>
            (?:final\s+answer|^[ \t#>*_]*(?:(?:final|correct)\s+)?answer(?=[ \t*_]*$))[*_]*(?:\s*[:：]|[ \t*_]*$))
      | (?<![\w-])(?:answer|ans|my\s+(?:best\s+)?guess|(?:correct|right|best)\s+(?:choice|option|answer))\b["'*_]*
        (?:\s(?:to|for|of|in)\s[^.:：\n]{1,80}?|\shere)?
        (?:\s*[:：]|\s*(?:->|=>?|[→⇒])|\s+[-–—](?=\s)
          |\s+(?P<verb>is|was|(?:will|would|must|should)\s+be|(?:seems|appears)\s+to\s+be)(?P<negated>n['’]t)?\b\s*[:：]?)
      | (?<![\w-])ans\.\s*[:：]?
      | (?<!\w)(?:antwort|lösung|réponse|respuesta|risposta|resposta|ответ|답|정답|答え|正解)[*_]*\s?[:：]
      | (?:答案|正确选项)[\s*】\]]*(?:[:：]|(?:应该是|应为|是|为|选|(?P<denied>(?:应该)?不是))\s*[:：]?|(?<=[】\]]))
    )
    [*_\s]*
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
NEGATION = re.compile(
    r"(?:(?:\w{2,20}ly\s+)?not|neither|never|no longer)\b"
    r"(?! (?:enough|given|possible|applicable|determin|defined|mentioned|visible))(?=\s+\S)",
    re.IGNORECASE,
)
# The correction behind a denied answer: "The answer is not A. It is B."
INSTEAD = re.compile(
    r"(?:,?\s+but(?:\s+rather|\s+instead)?|[.;,–—-]\s+(?:rather,?|instead,?|(?:it|that|this)(?:['’]s|\s+is|\s+must\s+be)))"
    r"\s+(?:rather\s+|actually\s+|instead\s+)?"
    r"|[，,；;。]?\s*(?:而是|应该是)\s*",
    re.IGNORECASE,
)


def answer_text(record: Record) -> str:
    """Return the texts of a record's own answer, joined."""
    return "".join(step.content for step in record.steps if isinstance(step, Text))


def find_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` with balanced braces; "" if it is not closed, None without one.

    `\fbox` counts as well; escaped braces do not.
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


def find_tagged(text: str) -> str | None:
    """Return the content of the last `<answer>...</answer>`, or the text behind an `<answer>` that is not closed.

    None without one.
    """
    tags = list(TAG.finditer(text))
    opened = [number for number, tag in enumerate(tags) if not tag[1]]
    if not opened:
        return None
    last = opened[-1]
    end = tags[last + 1].start() if last + 1 < len(tags) else len(text)
    return text[tags[last].end() : end].strip()


def find_statements(text: str) -> list[tuple[str, bool]]:
    """Return the rest of the line behind each of the last `LAST` "answer is", "Answer:" and similar, in their order.

    The second value is true if the whole line is the answer, false if only its first sentence is. Denied answers are
    skipped; a correction behind one counts.
    """
    statements = []
    for statement in deque(STATEMENT.finditer(text, max(0, len(text) - TAIL)), maxlen=LAST):
        line = text[statement.end() : statement.end() + LONGEST_LINE].partition("\n")[0]
        if statement["negated"] or statement["denied"] or (statement["verb"] and NEGATION.match(line)):
            instead = INSTEAD.search(line)
            if not instead:
                continue
            line = line[instead.end() :]
        statements.append((line, statement["line"] is not None))
    return statements


def find_final_answer(text: str) -> str | None:
    r"""Return the final answer stated in a text, or None if there is none or it is empty.

    It is the content of the last `\boxed{...}`; without a box, of the last `<answer>...</answer>`; without either, the
    text behind the last "final answer:", "answer is" or "answer:". After "final answer:" it is the rest of the line,
    after the others the rest of the sentence, if that ends earlier. The answer may begin on a later line. If there is
    an answer after `</think>`, it counts alone.
    """
    return next(filter(None, map(stated_answer, parts(text))), None)


def stated_answer(text: str) -> str | None:
    """Return the final answer stated in one part of a text; see `find_final_answer`."""
    answer = find_boxed(text)
    if answer is None:
        answer = find_tagged(text)
    if answer is None and (statements := find_statements(text)):
        line, whole = statements[-1]
        answer = line if whole else first_sentence(line)
    return (answer or "").strip().strip("*").strip() or None


def parts(text: str) -> list[str]:
    """Return the texts to search for an answer: first the one behind the thoughts, then all of it."""
    after = text.rpartition(THOUGHT_END)[2]
    return [after, text] if after.strip() and len(after) < len(text) else [text]


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return TAG.sub("", text).strip("` \t\n").rpartition("\n")[2].strip()
