"""The answers of an evaluation, a JSON line each, in a file that grows as they come; and the figures made of them.

The first line says what was evaluated and how. A file that holds some of the answers is gone on with.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ilvr_jax.errors import InputError
from ilvr_jax.tasks.scores import majority, pass_at_k, wilson_interval

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


class BadResults(InputError):
    """A results file that cannot be gone on with; one sentence names it and says what is wrong."""


class Key(NamedTuple):
    """What was asked: the sample of a record in one of its forms."""

    number: int
    form: str
    sample: int


class Results:
    """A results file: the answers that it holds, by key, and a place for those to come.

    `damaged` names lines that could not be read; they are removed, and what they held is asked again. Raises
    BadResults if the first line cannot be read, or is of another evaluation; OSError if it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.damaged = path, []
        self.lines: dict[Key, dict[str, Any]] = {}
        header = json.dumps({"settings": settings}, ensure_ascii=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._read(json.loads(header)["settings"])
        unfinished = path.with_name(path.name + ".partial")
        whole = [header, *(json.dumps(line, ensure_ascii=False) for line in self.lines.values())]
        unfinished.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        unfinished.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def _read(self, settings: Mapping[str, Any]) -> None:
        first, *others = self.path.read_bytes().splitlines()
        try:
            theirs = json.loads(first)["settings"]
            differing = sorted(key for key in theirs.keys() | settings if theirs.get(key) != settings.get(key))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadResults(
                f"{self.path} line 1: does not say what was evaluated ({error}); the file of an evaluation, or a new "
                "one, is accepted"
            ) from error
        if differing:
            raise BadResults(
                f"{self.path} holds another evaluation: {', '.join(differing)} differ; the same settings, or another "
                "--out, are accepted"
            )
        for number, line in enumerate(others, start=2):
            try:
                fields = json.loads(line)
                wrong = [name for name, kind in FIELDS.items() if not isinstance(fields[name], kind)]
                if wrong:
                    raise ValueError(f"{wrong[0]} is {fields[wrong[0]]!r}")
                self.lines.setdefault(Key(fields["number"], fields["form"], fields["sample"]), fields)
            except (ValueError, LookupError, TypeError) as error:
                self.damaged.append(
                    f"{self.path} line {number}: cannot be read ({type(error).__name__}: {error}); it is asked again"
                )

    def add(self, line: dict[str, Any]) -> None:
        """Writes an answer down, for good."""
        self.lines[Key(line["number"], line["form"], line["sample"])] = line
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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
