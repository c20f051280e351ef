r"""Where a text says its final answer."""

import re
from collections import deque

from ilvr_jax.data.records import Record, Text
from ilvr_jax.tasks.spelling import first_sentence

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is matched with its backslash
TAIL = 100_000  # characters at the end of a text in which statements are looked for
LAST = 20  # statements that are looked at, so that a model that repeats itself is read fast
LONGEST_LINE = 2_000  # characters of what a statement says
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
# What follows a denied answer in its place: "The answer is not A. It is B."
INSTEAD = re.compile(
    r"(?:,?\s+but(?:\s+rather|\s+instead)?|[.;,–—-]\s+(?:rather,?|instead,?|(?:it|that|this)(?:['’]s|\s+is|\s+must\s+be)))"
    r"\s+(?:rather\s+|actually\s+|instead\s+)?"
    r"|[，,；;。]?\s*(?:而是|应该是)\s*",
    re.IGNORECASE,
)


def answer_text(record: Record) -> str:
    """Returns the texts of a record's own answer, joined."""
    return "".join(step.content for step in record.steps if isinstance(step, Text))


def find_boxed(text: str) -> str | None:
    r"""Returns what stands in the last `\boxed{...}`, braces in it balanced; "" if it is not closed, None without one.

    `\fbox` counts as well. Braces that follow a backslash do not count.
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
    """Returns what stands in the last `<answer>...</answer>`, or behind an `<answer>` that nothing closes.

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
    """Returns the rest of the line behind each of the LAST "answer is", "Answer:" and their like, in their order.

    Beside it is whether its whole line is the answer, and not its first sentence alone. Denied answers are skipped;
    what is put in their place counts.
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
    r"""Returns the final answer that a text says; None if it says none, or an empty one.

    It is what stands in the last `\boxed{...}`; without a box, in the last `<answer>...</answer>`; without that, what
    follows the last "final answer:", "answer is" or "answer:". After "final answer:" that is the rest of the line,
    after the others the rest of the sentence, if that ends earlier. The answer may begin on a later line. What comes
    after `</think>` counts, if there is an answer in it.
    """
    return next(filter(None, map(stated_answer, parts(text))), None)


def stated_answer(text: str) -> str | None:
    """Returns the final answer that a text or a part of one says, as `find_final_answer` does."""
    answer = find_boxed(text)
    if answer is None:
        answer = find_tagged(text)
    if answer is None and (statements := find_statements(text)):
        line, whole = statements[-1]
        answer = line if whole else first_sentence(line)
    return (answer or "").strip().strip("*").strip() or None


def parts(text: str) -> list[str]:
    """Returns where to look for an answer, first what comes after the thoughts and then all of the text."""
    after = text.rpartition(THOUGHT_END)[2]
    return [after, text] if after.strip() and len(after) < len(text) else [text]


def last_line(text: str) -> str:
    """Returns the last line that is not empty."""
    return TAG.sub("", text).strip("` \t\n").rpartition("\n")[2].strip()
