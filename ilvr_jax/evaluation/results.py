"""The answers of an evaluation, a JSON line each, in a file that grows as they come; and the figures made of them.

The first line holds what was evaluated and how. A file with some of the answers is completed.
"""

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ilvr_jax.errors import InputError, listed, one_line, quote
from ilvr_jax.evaluation.scores import majority, pass_at_k, wilson_interval
from ilvr_jax.files import check_output, lock, named_errors, write_text

FIELDS = {
    "number": int,  # of the record in its source
    "form": str,  # empty: the record itself; else the name of one of the task's controls
    "sample": int,
    "record": str,
    "answer": (str, type(None)),  # in its one spelling; null if none could be read
    "right": bool,
    "text": str,
    "tokens": int,  # written, slots and markers included
    "looks": int,
    "slots": int,
    "picture_tokens": int,
    "stop_reason": str,
    "seconds": (int, float),
}
LARGEST = 2**31  # counts are below


class BadResults(InputError):
    """A results file that cannot be completed; one sentence names it and what is wrong."""


class Key(NamedTuple):
    """What was asked: the sample of a record in one of its forms."""

    number: int
    form: str
    sample: int


class Results:
    """A results file: the answers that it holds, by key, and a place for those to come.

    `damaged` names lines that could not be read, or are of none of so many `records`; they are removed, and what they
    held is asked again. Raises BadResults if the first line cannot be read, or is of another evaluation; OSError if it
    cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], records: int):
        self.path, self._records, self.damaged = path, records, []
        self.lines: dict[Key, dict[str, Any]] = {}
        header = json.dumps({"settings": settings}, ensure_ascii=False)
        check_output(path)
        content = path.read_bytes() if path.exists() else b""
        if content:
            self._read(content, json.loads(header)["settings"])
        if self.damaged or not (path.exists() and content.endswith(b"\n")):
            whole = [header, *(json.dumps(line, ensure_ascii=False) for line in self.lines.values())]
            write_text(path, "".join(f"{line}\n" for line in whole))
        self._file = path.open("ab", buffering=0)

    def _read(self, content: bytes, settings: Mapping[str, Any]) -> None:
        first, *others = content.splitlines()
        try:
            theirs = dict(json.loads(first)["settings"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise BadResults(
                f"{self.path} line 1: must hold the settings of an evaluation, but cannot be read ({error}); name "
                "another --out or delete the file"
            ) from error
        differing = [name for name in settings | theirs if theirs.get(name) != settings.get(name)]
        if differing and not others:  # it was stopped before its first answer
            self.path.unlink()
        elif differing:
            was, now = ([f"{name} {quote(of.get(name))}" for name in differing] for of in (theirs, settings))
            raise BadResults(
                f"{self.path} must hold answers of this evaluation ({listed(now)}), but holds those of another "
                f"({listed(was)}); name another --out or delete the file"
            )
        for number, line in enumerate(others, start=2):
            try:
                fields = json.loads(line)
                wrong = [name for name, kind in FIELDS.items() if not self._fits(name, fields[name], kind)]
                if wrong:
                    raise ValueError(f"{wrong[0]} is {quote(fields[wrong[0]])}")
                self.lines.setdefault(Key(fields["number"], fields["form"], fields["sample"]), fields)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                problem = one_line(f"{self.path} line {number}: cannot be read ({type(error).__name__}: {error})")
                self.damaged.append(f"{problem}; it is asked again")

    def _fits(self, name: str, value: Any, kind: type | tuple[type, ...]) -> bool:
        if kind is int:
            return type(value) is int and 0 <= value < (self._records if name == "number" else LARGEST)
        return isinstance(value, kind)

    def add(self, line: dict[str, Any]) -> None:
        """Writes an answer down, for good; a line that does not fit on the disk leaves the file as it was."""
        text = memoryview(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        end = self._file.seek(0, os.SEEK_END)
        try:
            with named_errors(self.path):
                while text:
                    text = text[self._file.write(text) :]
        except OSError:
            self._file.truncate(end)
            raise
        self.lines[Key(line["number"], line["form"], line["sample"])] = line

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def open_results(path: Path, settings: Mapping[str, Any], records: int) -> Iterator[Results]:
    """Opens a results file for one writer.

    Raises InUse, naming the process that writes it, BadResults and OSError as `Results` does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    beside = path.with_name(f".{path.name[:200]}.lock")
    with lock(beside, str(path)), contextlib.closing(Results(path, settings, records)) as results:
        yield results


def figures(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the figures of an evaluation's answers to records themselves, controls left out.

    Accuracy is the mean over all samples; its 95 % interval is Wilson's for as many trials as there are questions,
    since samples of one question are no further trials. `pass_at` is by k (powers of two, and all samples), and
    `majority` the share of questions whose most frequent answer is right; both need every question to have as many
    samples, and are left out while some are missing.
    """
    by_question: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for line in sorted((line for line in lines if not line["form"]), key=lambda line: line["sample"]):
        by_question[line["number"]].append(line)
    questions = list(by_question.values())
    every = [line for question in questions for line in question]
    right = sum(line["right"] for line in every)
    unparsed = sum(line["answer"] is None for line in every)
    result: dict[str, Any] = {
        "questions": len(questions),
        "answers": len(every),
        "right": right,
        "wrong": len(every) - right - unparsed,
        "unparsed": unparsed,
        "cut_off": sum(line["stop_reason"] != "end" for line in every),
    }
    if every:
        means = [fmean(line["right"] for line in question) for question in questions]
        result["accuracy"] = right / len(every)
        result["accuracy_interval"] = list(wilson_interval(sum(means), len(questions)))
    samples = {len(question) for question in questions}
    if len(samples) == 1 and (count := samples.pop()) > 1:
        ks = sorted({1 << power for power in range(count.bit_length())} | {count})
        result["pass_at"] = {
            str(k): fmean(pass_at_k(sum(line["right"] for line in question), count, k) for question in questions)
            for k in ks
        }
        result["majority"] = fmean(map(majority_is_right, questions))
    for name in ("looks", "slots", "picture_tokens", "tokens"):
        result[name] = sum(line[name] for line in every)
    return result


def majority_is_right(question: Sequence[Mapping[str, Any]]) -> bool:
    """Says whether the most frequent answer among the samples of a question is right; one that is missing is not."""
    chosen = majority([line["answer"] for line in question])
    return chosen is not None and any(line["right"] for line in question if line["answer"] == chosen)
