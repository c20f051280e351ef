r"""Mathematical answers, compared by math-verify: \frac{1}{2}, 1/2 and 0.5 are the same.

math-verify parses LaTeX with sympy and may compute for ever on a short text such as 9^{9^{9}}, or use up memory; its
own time limits work only in the main thread. So it runs in a separate process, which is killed after SECONDS and
started again when it is needed next. That process runs this file, which therefore imports nothing of ilvr_jax.
"""

import atexit
import contextlib
import functools
import json
import re
import signal
import subprocess
import sys
import threading

SECONDS = 3  # for one comparison
LONGEST = 150  # characters of an answer that is compared as mathematics
# math-verify compares decimals rounded to this many places, 6 by default: 1e-7 would equal 2e-7.
PLACES = 15

COMMANDS = (
    "frac sqrt pi cdot times div pm mp infty sin cos tan cot sec csc arcsin arccos arctan log ln exp "
    "le leq ge geq lt gt ne neq cup cap in emptyset varnothing mathbb alpha beta gamma delta epsilon theta lambda mu "
    "rho sigma tau phi varphi omega Delta Theta Omega Phi binom"
).split()
TOKEN = (
    rf"\\(?:{'|'.join(sorted(COMMANDS, key=len, reverse=True))})(?![A-Za-z])"
    r"|\\(?:begin|end)\{[pbv]?matrix\}|\\\\|&|\\[{}|]|(?<![0-9.])(?:(?:0|[1-9][0-9]{0,29})(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?![0-9.])"
    r"|(?<![A-Za-z])(?:[A-Za-z]|[abxyz]{2,3})(?![A-Za-z0-9])|[-+*/^_=<>()\[\]{}|!, ]"
)
MATHEMATICS = re.compile(rf"(?>{TOKEN})++")
# Dates, ranges, scores and grids mean more than their value: "3-2", "1+2", "2 \times 3", "1/2/2020".
ARITHMETIC = re.compile(r"[\s0-9.]+(?:(?:[-+*]|\\times|\\cdot)[\s0-9.]+)+|[\s0-9.]*(?:/[\s0-9.]+){2,}")
APART = re.compile(r"[0-9.]\s+[0-9.]")  # two numbers with nothing between them
MIXED = re.compile(r"(?<![\w.])([0-9]+) ([0-9]+)/([0-9]+)(?![\w./])")
EXPONENT = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,4})(?!\w)")
NAMED = re.compile(r"\\?[A-Za-z][A-Za-z ]{0,30}(?:_\{?\w{1,5}\}?)?\s*=\s*(?!=)")
PERCENT = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?) ?\\?%")
SIGNS = {"×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge "}
SIGNS |= {"±": r"\pm ", "θ": r"\theta ", "≠": r"\ne ", "∅": r"\emptyset "}
ROOT = re.compile(r"(?:\\sqrt|√|(?<![A-Za-z\\])sqrt)\s*(?:\(([^()]*)\)|([0-9]+|[a-z](?![a-z])))")
SHORT_FRACTION = re.compile(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])")
OVER = re.compile(r"\{\s*([^{}\\]+)\\over(?![A-Za-z])\s*([^{}\\]+)\}")
PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")


def as_latex(answer: str) -> str | None:
    r"""Return an answer in LaTeX for math-verify, None if it is not mathematics or means more than its value.

    Mathematics is made of numbers, single letters, operators, brackets and COMMANDS, with at least one digit or
    command. A list at the top level is not mathematics: math-verify would compare it as a set, without its order.
    """
    if len(answer) > LONGEST:
        return None
    for sign, command in SIGNS.items():
        answer = answer.replace(sign, command)
    text = PI.sub(r"\\pi ", ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2] or ''}}}", answer))
    text = PERCENT.sub(r"\\frac{\1}{100}", MIXED.sub(r"\1\\frac{\2}{\3}", text))  # math-verify reads 50% as 50 as well
    text = EXPONENT.sub(r"\1 \\times 10^{\2}", OVER.sub(r"\\frac{\1}{\2}", SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)))
    text = re.sub(r"\^(-[0-9]+)", r"^{\1}", text).strip()
    if not re.search(r"[0-9]|\\[A-Za-z]", text) or not MATHEMATICS.fullmatch(text):
        return None
    if ARITHMETIC.fullmatch(text) or APART.search(text) or len(split_list(text)) > 1:
        return None
    return text


def split_list(text: str) -> list[str]:
    """Split a text at its commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


@functools.lru_cache(maxsize=4096)
def equal(right: str, answer: str) -> bool:
    """Return whether two answers are mathematics of the same value; False if comparing them takes too long."""
    first, second = as_latex(right), as_latex(answer)
    if first is None or second is None:
        return False
    if ("=" in first) != ("=" in second):  # "x = 5" is 5
        first, second = (NAMED.sub("", text, count=1) if NAMED.match(text) else text for text in (first, second))
    if ("=" in first) != ("=" in second) or ("=" in first and not re.search("[A-Za-z]", first)):
        return False
    return _calculator.ask(first, second) is True


@functools.lru_cache(maxsize=4096)
def canonical(answer: str) -> str | None:
    r"""Return one spelling for an answer's value, None if it is not mathematics or takes too long.

    It is sympy's: 1/2 for \frac12 and 0.5. Forms that need algebra to be equal, (x+1)^2 and x^2+2x+1, stay different.
    """
    text = as_latex(answer)
    return None if text is None else _calculator.ask(text)


class Calculator:
    """The process that compares, started at its first use; threads use it one at a time."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, *texts: str) -> bool | str | None:
        """Return whether two texts are equal, or the canonical spelling of one text; None if it takes too long."""
        with self._lock:
            if self._process is None:
                self._process = self._start()
            try:
                self._process.stdin.write(json.dumps(texts) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                self.close()
                return None
            return json.loads(line)

    def _start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the command, which ends this process itself
        )
        if process.stdout.readline() != "ready\n":
            process.kill()
            raise RuntimeError(f"math-verify must be installed for {sys.executable}, but cannot be imported there")
        return process

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # closing flushes, which fails for a killed process
                    pipe.close()
            self._process = None


_calculator = Calculator()


def serve() -> None:
    """Answer lines that hold a JSON list of one or two texts until the input ends; end at one that takes too long."""
    import logging

    import sympy
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig

    logging.disable(logging.CRITICAL)  # math-verify logs that its own time limits are off

    # By default math-verify drops units, and thereby the letters m, g, s and h: 7m would be 7.
    normalization = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True)
    reading = [LatexExtractionConfig(normalization_config=normalization)]

    def read(text: str) -> list:
        return parse(f"${text}$", reading, fallback_mode="no_fallback", parsing_timeout=None)

    def answer(first: str, second: str | None = None) -> bool | str | None:
        if second is not None:
            return verify(read(first), read(second), PLACES, PLACES + 5, timeout_seconds=None)
        values = read(first)
        if not values or not isinstance(values[0], sympy.Expr):  # points, intervals and sets keep their own spelling
            return None
        return str(sympy.nsimplify(values[0].doit(), rational=True))

    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(SECONDS)  # without a handler: the system ends the process
        try:
            result = answer(*json.loads(line))
        except Exception:  # sympy raises errors of every kind at odd input
            result = None
        signal.alarm(0)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    serve()
