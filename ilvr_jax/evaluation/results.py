"""The results file of an evaluation, to which answers are appended as JSON lines, and the figures of its answers.

The first line holds the settings of the evaluation. A file with some of the answers is completed.
"""

import contextlib
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ilvr_jax.distributed import in_main, open_exchange
from ilvr_jax.errors import InputError, listed, one_line, quote
from ilvr_jax.evaluation.scores import majority, pass_at_k, wilson_interval
from ilvr_jax.files import check_output, lock, named_errors, read_text, write_text

FIELDS = {
    "number": int,  # the record's in its source
    "form": str,  # "" for the record itself, else the name of one of the task's controls
    "sample": int,
    "record": str,
    "answer": (str, type(None)),  # in its canonical spelling; null if the text has none
    "right": bool,
    "text": str,
    "tokens": int,  # of the answer, slots and markers included
    "looks": int,
    "slots": int,
    "picture_tokens": int,
    "stop_reason": str,
    "seconds": (int, float),
}
COUNT_LIMIT = 2**31  # counts are below it
UNREADABLE = ValueError, LookupError, TypeError, RecursionError  # raised for damaged lines


class BadResults(InputError):
    """A results file that cannot be completed; one sentence names it and the problem."""


class Key(NamedTuple):
    """The key of an answer: record, form and sample, as in FIELDS."""

    number: int
    form: str
    sample: int


def read_line(line: str | bytes, records: int) -> tuple[Key, dict[str, Any]]:
    """Return the answer in a line, about one of so many records, and its key; raises one of UNREADABLE."""
    fields = json.loads(line)
    for name, kind in FIELDS.items():
        value = fields[name]
        below = records if name == "number" else COUNT_LIMIT
        if not (type(value) is int and 0 <= value < below if kind is int else isinstance(value, kind)):
            raise ValueError(f"got {name} {quote(value)}")
    return Key(fields["number"], fields["form"], fields["sample"]), fields


def read_lines(path: Path, records: int) -> list[dict[str, Any]]:
    """Return the answers in a results file about so many records; raises InputError if it is missing or damaged."""
    try:
        return [read_line(line, records)[1] for line in read_text(path).splitlines()[1:]]
    except UNREADABLE as error:
        raise BadResults(f"{path} must hold answers, but a line cannot be read ({one_line(str(error))})") from error


class Results:
    """A results file, open for appending.

    Opening it removes damaged lines: those that cannot be read or whose record is not among the `records` of the
    evaluation, by number. Their questions are asked again. Raises BadResults if the first line cannot be read or holds
    other settings, OSError if the file cannot be written.

    Attributes:
        path: the file.
        lines: the answers that it holds, as dictionaries of FIELDS, by key.
        damaged: a sentence for each line that was removed.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], records: int):
        self.path, self._records, self.damaged = path, records, []
        self._writing = threading.RLock()
        self.lines: dict[Key, dict[str, Any]] = {}
        header = json.dumps({"settings": settings}, ensure_ascii=False)
        check_output(path)
        content = path.read_bytes() if path.exists() else b""
        if content:
            self._read(content, json.loads(header)["settings"])
        if self.damaged or not (path.exists() and content.endswith(b"\n")):
            lines = [header, *(json.dumps(line, ensure_ascii=False) for line in self.lines.values())]
            write_text(path, "".join(f"{line}\n" for line in lines))
        self._file = path.open("ab", buffering=0)

    def _read(self, content: bytes, settings: Mapping[str, Any]) -> None:
        first, *others = content.splitlines()
        try:
            in_file = dict(json.loads(first)["settings"])
        except UNREADABLE as error:
            raise BadResults(
                f"{self.path} line 1 must hold the settings of an evaluation, but cannot be read ({error}); choose "
                "another --out or delete the file"
            ) from error
        differing = [name for name in settings | in_file if in_file.get(name) != settings.get(name)]
        if differing and not others:  # that evaluation was stopped before its first answer
            self.path.unlink()
        elif differing:
            theirs, ours = (
                [f"{name} {quote(values.get(name))}" for name in differing] for values in (in_file, settings)
            )
            raise BadResults(
                f"{self.path} must hold answers of this evaluation ({listed(ours)}), but holds those of another "
                f"({listed(theirs)}); choose another --out or delete the file"
            )
        for number, line in enumerate(others, start=2):
            try:
                self.lines.setdefault(*read_line(line, self._records))
            except UNREADABLE as error:
                problem = one_line(f"{self.path} line {number} cannot be read ({type(error).__name__}: {error})")
                self.damaged.append(f"{problem}; its question is asked again")

    def add(self, line: dict[str, Any]) -> None:
        """Append an answer; a line that does not fit on the disk leaves the file unchanged."""
        text = memoryview(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        with self._writing:
            end = self._file.seek(0, os.SEEK_END)
            try:
                with named_errors(self.path):
                    while text:
                        text = text[self._file.write(text) :]
            except OSError:
                self._file.truncate(end)
                raise
            self.lines[Key(line["number"], line["form"], line["sample"])] = line

    def stop(self) -> int:
        """Return the number of answers; another thread that adds one waits forever, so that the number stays true."""
        self._writing.acquire()
        return len(self.lines)

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def open_results(path: Path, settings: Mapping[str, Any], records: int, replace: bool = False) -> Iterator[Results]:
    """Open a results file for one writer; with `replace`, a file that cannot be completed is deleted first.

    Raises InUse, naming the process that writes it, if there is another; BadResults and OSError as `Results` does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    lock_path = path.with_name(f".{path.name[:200]}.lock")
    with lock(lock_path, str(path)):
        try:
            results = Results(path, settings, records)
        except BadResults:
            if not replace:
                raise
            path.unlink()
            results = Results(path, settings, records)
        with contextlib.closing(results):
            yield results


class KnownAnswers:
    """The part of Results for processes that do not write: `lines` has the keys in the file when it was opened."""

    def __init__(self, keys: Iterable[Sequence[Any]]):
        self.lines, self.damaged = {Key(*key): {} for key in keys}, []

    def stop(self) -> int:
        return len(self.lines)


@contextlib.contextmanager
def share_results(
    path: Path, settings: Mapping[str, Any], records: int, replace: bool = False
) -> Iterator[Results | KnownAnswers]:
    """Open a results file in the main process, as `open_results` does, and its keys in the others; all may raise."""
    opened: list[Results] = []
    with contextlib.ExitStack() as stack:
        in_main(lambda: opened.append(stack.enter_context(open_results(path, settings, records, replace))))
        keys = open_exchange()([list(key) for results in opened for key in results.lines])[0]
        yield opened[0] if opened else KnownAnswers(keys)


def summarise(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of an evaluation's answers, without those to controls.

    `accuracy` is the mean over all samples. Its 95 % interval is Wilson's, with the questions as trials, since samples
    of one question are not independent. `pass_at` holds pass@k for powers of two and for all samples, `majority` is the
    share of questions whose most frequent answer is right; both are present only if every question has the same number
    of samples, more than one.
    """
    by_question: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for line in sorted((line for line in lines if not line["form"]), key=lambda line: line["sample"]):
        by_question[line["number"]].append(line)
    questions = list(by_question.values())
    answers = [line for question in questions for line in question]
    right = sum(line["right"] for line in answers)
    unparsed = sum(line["answer"] is None for line in answers)
    result: dict[str, Any] = {
        "questions": len(questions),
        "answers": len(answers),
        "right": right,
        "wrong": len(answers) - right - unparsed,
        "unparsed": unparsed,
        "cut_off": sum(line["stop_reason"] not in ("end", "stop") for line in answers),
    }
    if answers:
        means = [fmean(line["right"] for line in question) for question in questions]
        result["accuracy"] = right / len(answers)
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
        result[name] = sum(line[name] for line in answers)
    return result


def majority_is_right(question: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the most frequent answer among the samples of a question is right; without answers it is not."""
    answer = majority([line["answer"] for line in question])
    return answer is not None and any(line["right"] for line in question if line["answer"] == answer)
