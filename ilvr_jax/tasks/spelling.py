"""Comparing free-text answers: by spelling in this file, by value with math-verify."""

import re
import unicodedata

from ilvr_jax.tasks import mathematics

LONGEST = 20_000  # characters; only the whitespace of longer answers is normalised
QUOTES = "\"'`“”‘’"

SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")  # before NFKC turns x² into x2
AFTER_DIGIT = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")  # and 3½ into 31/2
WRAPPED = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]")
LATEX_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|sf|it|tt|normal)|mbox|operatorname)\s*\{([^{}]*)\}"
)
LATEX_GROUP = re.compile(r"(?<=[0-9])\\[,;: ](?=[0-9]{3}(?![0-9]))|(?<=[0-9])[\u2009\u202f](?=[0-9]{3}(?![0-9]))")
LATEX_FONT = re.compile(r"\{\s*\\(?:rm|bf|it|tt|sf)\s+([^{}]*)\}")
LATEX_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|(?<!\\)~|\\q?quad(?![A-Za-z])|\\(?:thin|med|thick)space(?![A-Za-z])")
LATEX_SIZE = re.compile(
    r"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|rm|bf|it|tt|sf|bfseries|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])"
)
BOLD = re.compile(r"(?<!\w)\*\*|\*\*(?![\w(-])")  # of Markdown: 2**3 is a power
NEGATIVE = re.compile(r"(?:minus|negative) (?=[0-9])", re.IGNORECASE)
LATEX_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?:s|Celsius)?(?![A-Za-z])|[º˚])")

# "5 mW" is not "5 MW": the only prefix whose case matters.
MILLI = re.compile(r"(?<=[0-9])\s*m(?=(?:W|V|A|Hz|Pa|J|N|Ω)\b)")
THOUSANDS = re.compile(r"(?<![\w.,(\[])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!\w|,[0-9])")
DECIMAL = re.compile(r"(?<![\w.])(0|[1-9][0-9]*)?\.([0-9]+)(?!\w|\.[0-9])")
POSITIVE = re.compile(r"\+([0-9]+(?:\.[0-9]+)?)")
# "n \log n" is "n log n".
FUNCTION = re.compile(r"\\(?=(?:sin|cos|tan|log|ln|exp|min|max|angle|triangle)(?![a-z]))")
WORDS = str.maketrans({"∠": "angle ", "△": "triangle "})
SIGNS = {command.strip(): sign for sign, command in mathematics.SIGNS.items()}
SIGN = re.compile(r"\\(?:times|cdot|div|pi|infty|leq?|geq?|pm|theta|neq?|emptyset|varnothing)(?![a-z]) ?")
AROUND_OPERATOR = re.compile(r"(?<=[0-9])\s*([-:])\s*(?=[0-9])|\s*([×·÷=<>≤≥±+])\s*")
SUBSCRIPT = re.compile(r"(?<=[a-z])_(?:\{([0-9]{1,3})\}|([0-9]))")  # H_2O is H₂O, which is H2O
SUPERSCRIPT = re.compile(r"\^\{([^{}]|st|nd|rd|th)\}")
ORDINAL = re.compile(r"(?<=[0-9])\^(?=(?:st|nd|rd|th)\b)")
ACRONYM = re.compile(r"\b(?:[a-z]\.){2,}[a-z]?\b|\b(?:[a-z]\.)+[a-z]\b\.?")
TITLE = re.compile(r"\b(dr|mrs?|ms|st|mt|prof|jr|sr)\.")
POINT = re.compile(r"(?<=[a-z])([.:])\s*(?=[a-z]{2})")  # "E.coli"
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
COMMA = re.compile(r"\s*,\s*")
INSIDE_BRACKETS = re.compile(r"(?<=[(\[{])\s+|\s+(?=[)\]}])")
ARTICLE = re.compile(r"(?:the|an?) (?!and\b|or\b)(?=[^\W\d_]{2})")
INITIALS = re.compile(r"(?<=\b[a-z]\.) (?=[a-z]\.)")
CLOCK_ZERO = re.compile(r"(?<![\w:.])0(?=[0-9]:[0-5][0-9](?![0-9]))")
CLOCK = re.compile(r"(?<=[0-9])(?::00)?\s?([ap])\.?\s?m\b\.?")
UNIT_OF_NUMBER = re.compile(r"(?<=[0-9])(?=[^\W\d_])(?!e[+-]?[0-9]|st\b|nd\b|rd\b|th\b)")
UNITS = {
    "°": r"\s*(?:°|度|deg(?:ree)?s?\b\.?)",
    "%": r"\s*(?:%|per ?cent\b)",
    "": r"\s*(?:dollars?\b|usd\b|\$)",
    " €": r"\s*(?:€|euros?\b|eur\b)",
    " ¥": r"\s*(?:¥|yuan\b|yen\b|元|円)",
    **{
        f" {unit}": rf"\s*(?:{words})\b"
        for unit, words in {
            "cm": "centimet(?:er|re)s?",
            "mm": "millimet(?:er|re)s?",
            "km": "kilomet(?:er|re)s?",
            "m": "met(?:er|re)s?",
            "kg": "kilograms?|kilos?|kgs",
            "g": "grams?",
            "h": "hours?|hrs?",
            "min": "minutes?|mins",
            "s": "seconds?|secs?",
            "l": "lit(?:er|re)s?",
            "ml": "millilit(?:er|re)s?",
            "in": "inch(?:es)?",
            "ft": "feet|foot",
            "mi": "miles?",
            "yd": "yards?|yds",
            "lb": "pounds?|lbs",
            "oz": "ounces?",
            "n": "newtons?",
            "j": "joules?",
            "w": "watts?",
            "v": "volts?",
            "a": "amps?|amperes?",
            "ω": r"ohms?|\\omega",
        }.items()
    },
}
UNITS = {unit: re.compile(rf"(?<=[0-9}})]){pattern}") for unit, pattern in UNITS.items()}
POWERS = {"2": re.compile(r"(?<=[0-9}]) ?sq(?:uare|\.)? ([a-z]+)|(?<=[0-9}]) ?([a-z]+) squared\b")}
POWERS["3"] = re.compile(r"(?<=[0-9}]) ?cu(?:bic|\.)? ([a-z]+)|(?<=[0-9}]) ?([a-z]+) cubed\b")
POWER = re.compile(r"(?<=[0-9}) ])([kcdm]?m|ft|in)\^?\{?([23])\}?(?![\w^])")
PER = {"s": "second|sec|s", "h": "hour|hr|h", "min": "minute|min"}
PER = {unit: re.compile(rf" per (?:{words})\b") for unit, words in PER.items()}
CURRENCY = re.compile(r"(usd|[€£¥]) ?([0-9]+(?:\.[0-9]+)?)(?![\w.,])")
SCALE = re.compile(r"° ?(?:(c)(?:elsius)?|(f)(?:ahrenheit)?)\b")
# A number with a unit: the number is compared as mathematics, the unit by its name.
MEASURE = re.compile(
    r"(.*[0-9})π])\s*(°[cf]?|[kcmd]?m(?:\^[23])?|[km]?g|h|min|m?s|m?l|in|ft|mi|yd|lb|oz|k?n|m?[wvaj]|ω|[kmg]?hz|[nk]?pa"
    r"|[kcm]?m/(?:s(?:\^2)?|h|min)|mi/h)"
)
# A count with its noun, which a right answer may omit: "12 apples"
COUNTED = re.compile(
    r"([0-9]+) (?:square |cubic )?(?!(?:times|minus|plus|less|halves|thirds|quarters|tens|dozens|hundreds|thousands)\b"
    r"|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths\b|\w+llions\b)"
    r"(?:[a-z]{3,}s|people|children|[个只条块张本支人次])"
)

REASON = re.compile(
    r"(?:\s*[,;]?\s+(?:because|since|rather than|instead of|as (?:it|they|the|there|this|that|we|he|she|you))"
    r"|,\s+(?:not|which))\b.*",
    re.DOTALL,
)
# "So the length of AB is", in front of an answer.
SENTENCE = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b,?\s+)?"
    r"(?:(?:the|its?|this|that|there|they|he|she)\b(?:\s+(?!not\b|if\b|whether\b|that\b|other\b)[^\s,.;:!?=]+){0,8}?"
    r"(?:['’]s|\s+(?:is|are|was|were|shows?|equals?))\s+)?",
    re.IGNORECASE,
)
# "AB =" or "6 + 6 =", in front of the last value of an equation.
EQUATED = re.compile(
    r"(?:m?(?:∠|\\angle)?\s*[A-Za-z]{1,3}|[\d\s.(){}^]*(?:(?:[-+*/×÷·]|\\(?:times|cdot|div|frac|sqrt)(?![A-Za-z]))[\d\s.(){}^]*)+)"
    r"\s*=\s*(?=[^=]*$)"
)
VERDICT = re.compile(
    r"(yes|no|true|false)\s*(?:[,.;:!–—-]+\s*|(?=because\b|since\b)|(?=(?:it|they|he|she|there|this|that|the|we|you|i)\b)|$)(.*)",
    re.DOTALL,
)
UNDECIDED = re.compile(
    r"(?:or|and|but|maybe|perhaps|except|unless|if|only)\b|(?:yes|no|true|false)\b\W*(?:$|or\b|and\b)|[0-9]"
)
CONNECTIVE = re.compile(r",?\s+and\s+|\s*[;、]\s*")
# Words before whose full stop no sentence ends.
ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[A-Za-z]|St|Dr|Mrs?|Ms|Mt|Ft|Prof|Sr|Jr|No|vs|Fig|Eq|ca|cf|approx|Gen|Col|Capt|Lt|Rev|Hon|Sen|Rep|Gov"
    r"|(?:[A-Za-z]\.)+[A-Za-z])$"
)
STOP = re.compile(r"[.!?](?=[\s\"'*”’)]|$)")
NEW_SENTENCE = re.compile(
    r"[\s\"'*”’)]+(?:It|The|This|That|These|Those|We|So|Because|They|He|She|There|Thus|Hence|Therefore|In|As|And|But|I|You"
    r"|Since|Note|Here|My|If|When|For|Its|Their|Also)\b"
)


def first_sentence(line: str) -> str:
    """Return the first sentence of a line, without its full stop; the stop of an abbreviation ends no sentence."""
    for stop in STOP.finditer(line):
        before, after = line[max(0, stop.start() - 20) : stop.start()], line[stop.end() : stop.end() + 40]
        option = stop.start() == 1 and line[0].isalpha()  # "B. It is the red one" is one answer
        lower = after.lstrip("\"'*”’) \t")[:1].islower()
        if stop[0] == "." and after.strip():
            if lower or option or (ABBREVIATION.search(before) and not NEW_SENTENCE.match(after)):
                continue
        elif stop[0] == "." and ABBREVIATION.search(before):
            return line  # "7 p.m."
        return line[: stop.start()]
    return line


def tidy(answer: str) -> str:
    r"""Remove typesetting from an answer: LaTeX's spaces, sizes and text, Markdown, quotes around it."""
    text = SUPERSCRIPTS.sub(lambda digits: f"^{{{unicodedata.normalize('NFKC', digits[0])}}}", answer)
    text = LATEX_GROUP.sub("", AFTER_DIGIT.sub(" ", BOLD.sub("", text)))
    text = DEGREES.sub("°", text)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").replace("’", "'").replace("‘", "'")
    text = re.sub("[−‐‑]", "-", text).replace("–", "-").replace("{,}", ",").replace("<=", "≤").replace(">=", "≥")
    text = LATEX_TEXT.sub(r"\1", LATEX_FONT.sub(r"\1", LATEX_SPACE.sub(" ", text)))
    text = LATEX_FRACTION.sub(r"\\frac", LATEX_SIZE.sub("", text))
    text = re.sub(r"\\([$%#&])", r"\1", text)
    text = " ".join(text.split()).lstrip(f"{QUOTES}$* ").rstrip(f"{QUOTES}$* .。,;")
    if wrapped := WRAPPED.fullmatch(text):
        text = wrapped[1] or wrapped[2] or ""
    return NEGATIVE.sub("-", text, count=1) if NEGATIVE.match(text) else text


def normalise(answer: str) -> str:
    r"""Return one spelling for the ways to write an answer; "" if nothing of it remains.

    - Case, Unicode's compatibility forms, runs of whitespace and articles in front are normalised away.
    - Around the answer, whitespace, quotes, `$`, `*`, `\( \)`, `\[ \]` and final full stops and commas are dropped;
      `\text{x}` is x, `\$` is $, `\%` is %, `\dfrac` is `\frac`, and LaTeX's spaces are spaces.
    - In numbers, alone or in a text, thousands commas are dropped, 3.0 is 3 and .50 is 0.5; alone, +3 is 3 and -0 is 0.
      Numbers with an exponent or with leading zeros stay as they are.
    - Commas between words become spaces; one beside a digit is followed by one space: "1, 234" is not "1,234".
    - Units behind numbers: "15cm" and "15 centimeters" are "15 cm", "60^{\circ}" and "60 degrees" are "60°".
    """
    if len(answer) > LONGEST:
        return " ".join(answer.split())
    while (plainer := _normalise_once(answer)) != answer:
        answer = plainer
    return answer


def _normalise_once(text: str) -> str:
    text = INITIALS.sub("", _fold(MILLI.sub(" milli", tidy(text))).translate(WORDS))
    text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = DECIMAL.sub(lambda number: f"{number[1] or 0}.{number[2].rstrip('0')}".rstrip("."), text)
    text = COMMA.sub(_comma, INSIDE_BRACKETS.sub("", text))
    text = SIGN.sub(_sign, FUNCTION.sub(" ", text))
    text = AROUND_OPERATOR.sub(lambda sign: sign[1] or sign[2], " ".join(text.split()))
    text = ORDINAL.sub("", SUPERSCRIPT.sub(r"^\1", SUBSCRIPT.sub(lambda digits: digits[1] or digits[2], text)))
    text = CURRENCY.sub(r"\2 \1", CLOCK.sub(r" \1m", CLOCK_ZERO.sub("", text)))
    text = TITLE.sub(r"\1 ", ACRONYM.sub(lambda letters: letters[0].replace(".", ""), text))
    text = " ".join(POINT.sub(r"\1 ", text).split())
    for power, pattern in POWERS.items():
        text = pattern.sub(lambda unit, power=power: f" {unit[1] or unit[2]}^{power}", text)
    for unit, pattern in UNITS.items():
        text = pattern.sub(unit, text)
    for unit, pattern in PER.items():
        text = pattern.sub(f"/{unit}", text)
    text = SCALE.sub(lambda scale: f"°{scale[1] or scale[2]}", UNIT_OF_NUMBER.sub(" ", POWER.sub(r"\1^\2", text)))
    text = ARTICLE.sub("", re.sub(r"(?<=[^\W\d_]{2})!+$", "", text), count=1) if ARTICLE.match(text) else text
    if positive := POSITIVE.fullmatch(text):
        text = positive[1]
    if text in NUMBERS:
        text = str(NUMBERS.index(text))
    return "0" if text == "-0" else text


def _sign(command: re.Match) -> str:
    name = command[0].strip()
    return SIGNS[{r"\leq": r"\le", r"\geq": r"\ge", r"\neq": r"\ne", r"\varnothing": r"\emptyset"}.get(name, name)]


def _comma(comma: re.Match) -> str:
    around = comma.string[max(0, comma.start() - 1) : comma.start()] + comma.string[comma.end() : comma.end() + 1]
    return ", " if any(character.isdigit() for character in around) else " "


def _fold(text: str) -> str:
    """Return the caseless compatibility form of a text (Unicode's definition D147)."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return unicodedata.normalize("NFKC", folded.casefold())


def canonical(answer: str) -> str:
    """Return one spelling for all spellings of an answer, for majority votes: its value if it is mathematics.

    Some answers that `same` calls equal stay different: those with a reason behind them or terms in another order.
    """
    return mathematics.canonical(tidy(answer)) or normalise(answer)


def same(right: str, answer: str) -> bool:
    """Return whether an answer is the right one, in another spelling or with a reason behind it."""
    readings = dict.fromkeys([answer, REASON.sub("", answer, count=1), first_sentence(answer)])
    readings |= {reading[SENTENCE.match(reading).end() :]: None for reading in readings}
    if "=" not in right:
        readings |= {_value(tidy(reading)): None for reading in readings if len(reading) < LONGEST}
    return any(_same(right, reading) for reading in readings) or _same_verdict(right, answer)


def _value(text: str) -> str:
    """Return the last value of an equation; any other text unchanged."""
    equated = EQUATED.match(text)
    return text[equated.end() :] if equated else text


def _same(right: str, answer: str) -> bool:
    if normalise(answer) == normalise(right):
        return bool(normalise(right))
    first, second = (THOUSANDS.sub(lambda number: number[0].replace(",", ""), tidy(text)) for text in (right, answer))
    if max(len(first), len(second)) > mathematics.LONGEST:
        return False
    items, others = (mathematics.split_list(CONNECTIVE.sub(", ", text)) for text in (first, second))
    if len(items) == len(others) > 1:
        return all(map(_same_value, items, others))
    return _same_value(first, second)


def _same_value(right: str, answer: str) -> bool:
    """Return whether two texts that are not lists have the same spelling, or the same value and unit."""
    first, second = normalise(right), normalise(answer)
    if first == second or mathematics.equal(right, answer):
        return True
    measured, other = MEASURE.fullmatch(first), MEASURE.fullmatch(second)
    if measured and other:
        return measured[2] == other[2] and mathematics.equal(measured[1], other[1])
    other = other or COUNTED.fullmatch(second)
    if other:  # the right answer omits the unit
        return first == other[1] or mathematics.equal(first, other[1])
    return bool(measured) and measured[2] == "°" and (second == measured[1] or mathematics.equal(measured[1], second))


def _same_verdict(right: str, answer: str) -> bool:
    """Return whether both are the same yes, no, true or false, at most one of them followed by a clause."""
    verdicts = [VERDICT.fullmatch(_fold(tidy(text))) for text in (right, answer[: mathematics.LONGEST * 10])]
    if not all(verdicts) or verdicts[0][1] != verdicts[1][1]:
        return False
    clauses = [verdict[2] for verdict in verdicts]
    return "" in clauses and not any(UNDECIDED.match(clause) for clause in clauses)
