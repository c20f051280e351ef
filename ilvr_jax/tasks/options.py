"""Multiple choice: the options of a question, and the one that an answer names, by letter or by text."""

import functools
import re
from collections.abc import Iterator, Mapping

from ilvr_jax.data.records import IMAGE_MARKER, Record
from ilvr_jax.tasks.final_answer import (
    TAIL,
    answer_text,
    find_boxed,
    find_final_answer,
    find_statements,
    find_tagged,
    last_line,
    parts,
)
from ilvr_jax.tasks.spelling import normalise, same, tidy

LETTER_OPTIONS = dict.fromkeys("ABCDEFGHIJ", "")
"""Options without texts, for a question that does not list its own."""

LONGEST = 300  # characters of an answer that names an option

# Styles of marking options; a question uses one of them throughout, from A on.
MARKERS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"[(\[（【]([A-J])[)\]）】][.:：]?",
        r"(?<![\w(（])([A-J])[)）]",
        r"(?<![\w.(])([A-J])[.．、](?![A-J]\.)",
        r"(?<![\w(])([A-J])\s?[:：]",
        r"[(\[]([a-j])[)\]]",
        r"(?<![\w(])([a-j])\)",
        r"^[ \t*-]*([a-j])\.(?=\s)",
    )
)
BEFORE_MARKER = re.compile(r"(?:\b(?:option|choice)|[-*•,;|]|\b(?:and|or))\s*$", re.IGNORECASE)

# "the correct option is", in front of a letter.
LEAD = re.compile(
    r"(?:(?:the|is|be|it's|it is)\s+){0,3}"
    r"(?:(?:most|final|correct|right|best|likely|probably|clearly|definitely|therefore|thus|indeed|simply|just)\s+){0,3}"
    r"(?:answer\s*(?:is\b|[:-])?\s*)?(?:the\s+)?(?P<named>(?:(?:option|choice|letter|outcome)\s*(?:is\b|[:-])?\s*|选项\s*){0,2})",
    re.IGNORECASE,
)
LETTER = re.compile(r"(?P<open>[(\[{<]\s*)?(?P<letter>[A-Ja-j])(?P<close>\s*[)\]}>])?(?![A-Za-z0-9_'^])", re.DOTALL)
LIST_MARK = re.compile(r"^[->•]\s+")  # of Markdown
ALONE = re.compile(r"[\s.!?。,;:)\]}-]*$")
POINTED = re.compile(r"\s*[.:。、](?=\s|[A-Z][a-z]|[^\x00-\x7f])\s*")  # "B. the second", "B: the second"
LISTED = re.compile(r"\s*(?:[,;。]|-(?=\s)|\s[-—]|—)\s*")  # "B, the second", "B - the second"
REASONED = re.compile(r"(?:because|since|as)\b")
ASSERTED = re.compile(
    r"(?:because|since|as|rather|instead|is (?:the )?(?:correct|right|best|answer|true))\b|\("
)  # behind "A" and "I", which are words as well
DENIED = re.compile(
    r"\W*(?:(?:is|was|would be|seems|must be)\s+(?:not|wrong|incorrect|false|impossible|out)|isn't|cannot|can't"
    r"|could be|may be|might be)\b"
    r"|\W*(?:选项)?\s*(?:是)?(?:错|不)"
)
# Another letter behind a first one: "(a) and (b)" and "A, B" do not name a single option.
ANOTHER = re.compile(
    r"\s*(?:(?:and(?! not\b)|or|nor|vs|versus|plus|minus|times|to|through)\b|[&/+=|∪∩]"
    r"|\\(?:cup|cap|land|lor|vee|wedge|neq?)\b"
    r"|[(\[]?[A-Ja-j][)\]]?\s*(?:$|[.,;:/&+=|]|and\b|or\b))"
)
BEHIND = re.compile(r"[^()]*\((?:option\s+|choice\s+)?([A-J])\)[\s.!]*", re.IGNORECASE)  # "the red ball (B)"
SINGLE = re.compile(r"(?:(?:option|choice)\s+)?[(\[]?[A-Ja-j][)\]]?[.:]?")
BRACKETED = re.compile(r"[(\[][A-J][)\]]\s*(?!and\b|or\b|[&+=*/,-]|[(\[][A-J][)\]])\S")
FORMULA = re.compile(r"\\[A-Za-z]+|[=<>^]")

MENTION = re.compile(
    r"""
    (?P<before>\b(?:not|nor|neither|than|eliminate[sd]?|exclude[sd]?|rules?\ out|ruling\ out|reject(?:s|ed)?)\s+
        (?:the\s+)?|n['’]t\s+)?
    (?:
        (?i:\b(?:answer|option|outcome|choice|choose|select|pick|go\s+with|it\s+is|it['’]s|must\s+be|should\s+be)\b
            (?:[\s*]*is\b)?)
        [\s:("'*$]{0,20}(?P<named>[A-J])\b(?![-'’]\w)
      | (?<![\w.])[(*]{0,3}(?P<judged>[A-J])[)*]{0,3}\s+(?:(?:is|must\s+be)\s+(?:the\s+)?
            (?:correct|right|best|true|(?:final\s+)?answer)|the\s+(?:correct|right|best)\s+(?:answer|option|choice))\b
      | (?:^|[.,;!]\s+)(?i:so|thus|hence|therefore)[,:]?\s+[(*]{0,3}(?P<concluded>[A-J])[)*]{0,3}(?=[.!]?\s*$)
      | 选(?:择|项)?\s*[:：]?\s*(?P<chosen>[A-J])(?![A-Za-z])
    )
    """,
    re.VERBOSE | re.MULTILINE,
)


@functools.lru_cache(maxsize=1024)
def find_options(question: str) -> Mapping[str, str]:
    """Return the texts of a question's options by letter, from A on; empty if it lists none.

    An option is marked as in "A. cat", "(A) cat", "A) cat" or "A: cat", on a line of its own or not; its text is the
    rest of its line, up to the next option. The text is "" for an option without one, such as an image.
    """
    question = question.replace("**", "").replace(IMAGE_MARKER, " ")
    longest: list[re.Match] = []
    for marker in MARKERS:
        run: list[re.Match] = []
        for match in marker.finditer(question):
            letter = match[1].upper()
            if letter == "A":
                run = [match]
            elif run and ord(letter) == ord("A") + len(run):
                run.append(match)
            if len(run) > max(1, len(longest)):
                longest = list(run)
    ends = [match.start() for match in longest[1:]] + [None]
    return {
        match[1].upper(): _option_text(question[match.end() : end]) for match, end in zip(longest, ends, strict=False)
    }


def _option_text(text: str) -> str:
    text = text.strip().partition("\n")[0].strip()
    while (shorter := BEFORE_MARKER.sub("", text).strip()) != text:
        text = shorter
    return text


def read_letter(answer: str, spaced: bool = True) -> str | None:
    """Return the letter from A to J of the option that an answer names, None if it names none or more than one.

    The letter comes first, alone or with text behind it: "B", "(b)", "option B", "B. the second", "B, because ...".
    With `spaced=False` punctuation must separate the two: "B the second" is then no option.
    """
    text = re.sub('[*`$"_]', "", LIST_MARK.sub("", tidy(answer[:LONGEST]))).strip()
    lead = LEAD.match(text)
    match, named = LETTER.match(text, lead.end()), bool(lead["named"])
    if not match or (match["close"] and "{<".find(match["close"].strip()) >= 0):
        behind = BEHIND.fullmatch(text)
        return behind[1].upper() if behind and not re.search(r"\b(?:not|nor|or)\b", text) else None
    letter, rest = match["letter"], text[match.end() :]
    plain = letter.islower() and not named  # "a red one" names no option
    if ALONE.match(rest):
        return letter.upper()
    if match["close"]:
        rest = rest.lstrip(" .:")
    elif pointed := POINTED.match(rest):
        rest = rest[pointed.end() :]
    elif listed := LISTED.match(rest):
        rest = rest[listed.end() :]
        if plain:
            return None
    elif rest[0].isspace():
        rest = rest.lstrip()
        if plain or not (spaced or named or REASONED.match(rest) or rest[0] == "("):
            return None
        if letter in "AI" and not named and not ASSERTED.match(rest):
            return None
    elif rest[0].isascii():
        return None
    return None if DENIED.match(rest) or ANOTHER.match(rest) else letter.upper()


def read_option(answer: str, options: Mapping[str, str], spaced: bool = True) -> str | None:
    """Return the letter of the option that an answer names by text or letter; it may be a letter without an option."""
    return _named_by_text(answer, options) or read_letter(answer, spaced)


def _named_by_text(answer: str, options: Mapping[str, str]) -> str | None:
    if not any(options.values()) or len(answer) > LONGEST or SINGLE.fullmatch(tidy(answer)):
        return None
    texts = {letter: text for letter, text in options.items() if normalise(text)}
    letters = (
        [letter for letter, text in texts.items() if normalise(text) == normalise(answer)]
        or [letter for letter, text in texts.items() if same(text, answer)]
        # The other way round: the option's text has a unit that the answer omits.
        or [letter for letter, text in texts.items() if same(answer, text)]
    )
    return letters[0] if len(letters) == 1 else None


def find_option(text: str, options: Mapping[str, str]) -> str | None:
    r"""Return the letter of the option that a text chooses, None if it chooses none of `options` or several.

    The choice is read from the last `\boxed{...}`, unless it holds a formula; else from the last `<answer>`; else from
    the last statement such as "the answer is B" that names an option; else from the last mention such as "option B" or
    "B is correct"; else from the last line, if it holds nothing but an option. If there is an answer after `</think>`,
    it counts alone.
    """
    for part in parts(text):
        letter = next(_named(part, options), None)
        if letter is not None:
            return letter if letter in options else None
    return None


def _named(text: str, options: Mapping[str, str]) -> Iterator[str]:
    """Yield the letters that a text names, the one that counts most first; "" for something that is not an option."""
    boxed = find_boxed(text)
    if boxed is not None:
        if (letter := read_option(boxed, options)) or not FORMULA.search(tidy(boxed)):
            yield letter or ""
            return
    if (tagged := find_tagged(text)) is not None:
        yield read_option(tagged, options) or ""
        return
    for line, _ in reversed(find_statements(text)):
        if letter := read_option(line, options):
            yield letter
            return
    if boxed is not None:
        return
    mentions = [mention for mention in MENTION.finditer(text, max(0, len(text) - TAIL)) if _affirmed(mention)]
    if mentions:
        yield next(filter(None, mentions[-1].group("named", "judged", "concluded", "chosen")))
        return
    line = last_line(text)
    if "\n" in text.strip() and not SINGLE.fullmatch(tidy(line)):
        letter = _named_by_text(line, options)
    else:
        letter = read_option(line, options, spaced=False)
    if letter:
        yield letter


def _affirmed(mention: re.Match) -> bool:
    rest = mention.string[mention.end() : mention.end() + 40]
    return not (
        mention["before"]
        or DENIED.match(rest)
        or re.match(r"[)*]*\s*(?:\?|(?:[,/&+]|or\b|and\b)\s*(?:option\s+)?[(*]*[A-J]\b)", rest)
    )


def right_option(record: Record, options: Mapping[str, str]) -> str | None:
    """Return the letter of the right option, from the record's final answer or else from the end of its text."""
    if record.answer is None:
        return find_option(answer_text(record), options)
    return find_option(record.answer, options) or find_option(f"Final answer: {record.answer}", options)


def options_of(record: Record) -> Mapping[str, str]:
    """Return the options of a record by letter; empty if its answer is free text.

    They are those that its question lists, if the right answer names one of them; else the letters, if the right answer
    is a letter.
    """
    options = find_options(record.question)
    if options and right_option(record, options):
        return options
    answer = record.answer if record.answer is not None else answer_text(record)
    stated = find_final_answer(answer) or (answer if record.answer is not None else "")
    plain = tidy(stated[:LONGEST])
    return LETTER_OPTIONS if SINGLE.fullmatch(plain) or (BRACKETED.match(plain) and read_letter(plain)) else {}
