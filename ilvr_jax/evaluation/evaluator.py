"""Evaluation of one task: a model answers the questions of a file of records, and the answers are scored."""

import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console

from ilvr_jax.checkpoints.trained import TrainedModel
from ilvr_jax.config.fields import BadConfig, rule_of
from ilvr_jax.config.schema import DataConfig, RunConfig, SamplingParams
from ilvr_jax.data.examples import ExampleSettings, build_prompt, read_image
from ilvr_jax.data.pipeline import Source, fingerprint
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.distributed import in_main, is_main, open_exchange
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.records import EvaluationRecords
from ilvr_jax.evaluation.results import Key, KnownAnswers, Results, read_lines, share_results, summarise
from ilvr_jax.files import check_output, read_object, write_json
from ilvr_jax.inference.engine import Engine
from ilvr_jax.inference.requests import Picture, Request, RequestOutput
from ilvr_jax.inference.sizes import fit_settings
from ilvr_jax.inference.transcript import split_at_looks
from ilvr_jax.interrupts import stop_sentence
from ilvr_jax.method.layout import Sample
from ilvr_jax.progress import Progress
from ilvr_jax.tasks import TASKS


@dataclasses.dataclass
class Evaluator:
    """The questions of a task for a model; `answer_all` fills a results file, `summary` reads the figures out of it.

    Records that cannot be asked are printed on stderr and skipped.
    """

    trained: TrainedModel
    task: str  # one of TASKS
    records: EvaluationRecords
    decoding: Mapping[str, Any]  # fields of Request: `method`, `latent_size`, `sampling`
    check_prompt: Callable[[Sample], None] = lambda prompt: None  # raises InputError for a prompt that is too large
    question: str | None = None  # in place of every record's own; None: the run's, if it has one; empty: the record's
    instruction: str = ""  # text after every question
    samples: int = 1  # answers per question; controls are asked once
    controls: bool = True  # whether the task's controls are asked
    rows: int = 16  # answers decoded in parallel
    limit: int = 0  # only the first records are asked; 0: all
    seed: int = 0
    skipped: dict[tuple[Any, str], str] = dataclasses.field(default_factory=dict)  # reasons, by number and form

    def __post_init__(self):
        lines = enumerate(getattr(self.source, "skipped", ()))
        self.skipped |= {("line", str(number)): sentence for number, sentence in lines}

    @property
    def source(self) -> Source:
        """The records by number."""
        return self.records.source

    @property
    def data(self) -> DataConfig:
        """The settings of the run's records; the defaults for a model of no run."""
        return self.trained.config.data if self.trained.config else DataConfig()

    @property
    def prompts(self) -> ExampleSettings:
        """The settings of prompts, in which records have the question that they are asked."""
        return dataclasses.replace(self.trained.prompts, question=None)

    @property
    def module(self) -> ModuleType:
        """The task's functions."""
        return TASKS[self.task]

    def skip(self, key: tuple[Any, str], sentence: str) -> None:
        """Print once why a record or control, by number and form, is not asked, and count it."""
        if key not in self.skipped:
            self.skipped[key] = sentence
            _print_skipped(sentence)

    def settings(self, model: str | None) -> dict[str, Any]:
        """Return everything that an answer depends on, for the first line of the results; `model` is its digest.

        A results file is completed only with the same settings; the number of questions is none of them.
        """
        return {
            "stage": self.trained.stage,
            "step": self.trained.step,
            "model": model,
            "data": self.records.name,
            "records": fingerprint(self.source),
            **{name: getattr(self, name) for name in ("task", "question", "instruction", "seed")},
            **{name: self.decoding[name] for name in ("method", "latent_size")},
            **_added(self.decoding),
            **_sampling_settings(self.decoding["sampling"]),
        }

    def answer_all(
        self, results: Results | KnownAnswers, progress: Progress, is_stopped: Callable[[], bool] = lambda: False
    ) -> float:
        """Ask the questions that have no answer in the results and add theirs; return the seconds that it took.

        Once `is_stopped()`, which is asked after each answer, it returns early. Raises InputError if no record can be
        asked and the results hold no answer either.
        """
        started = time.monotonic()
        keys = [key for key, _ in self.keys()]
        answered = sum(key in results.lines for key in keys)
        if keys and answered == len(keys):
            return 0.0
        requests = (request for _, _, request in self.requests(results.lines))  # made twice: all of them fill memory
        first_request = next(requests, None)
        if first_request is None and answered:  # what remains was skipped before as well
            return 0.0
        if first_request is None:
            raise BadConfig(f"{self.records.name} must have records that can be asked, got none")
        trained = self.trained
        settings = fit_settings(itertools.chain([first_request], requests), self.rows, trained.model.geometry)
        engine = Engine(trained.model, trained.params, trained.special, settings, trained.tokenizer)
        asked: list[tuple[Key, Record]] = []  # by the number of the request
        exchange = open_exchange()

        def asked_requests() -> Iterator[Request]:
            for key, record, request in self.requests(dict(results.lines)):
                asked.append((key, record))
                yield request

        with progress.stage(self.task, answered, len(keys)):
            progress.log(f"{answered} of {len(keys)} answers exist; the rest are decoded {settings.rows} at a time")
            for output in engine.serve(asked_requests()):
                key, record = asked[output.number]
                if output.stop_reason == "refused":
                    self.skip((key.number, key.form), f"{record.name}: {output.error}")
                    continue
                in_main(functools.partial(self._add, results, key, record, output), exchange)
                progress.advance_timed()
                if is_stopped():
                    break
        return time.monotonic() - started

    def keys(self) -> Iterator[tuple[Key, Record]]:
        """Yield everything to ask with its record or control; records that the task refuses are skipped."""
        for number in range(min(len(self.source), self.limit or len(self.source))):
            try:
                record = self.source[number]
                self.module.check(record)
                has_controls = self.controls and hasattr(self.module, "controls")
                controls = self.module.controls(record) if has_controls else {}
            except BadRecord as error:
                self.skip((number, ""), str(error))
                continue
            for form, variant in {"": record, **controls}.items():
                for sample in range(1 if form else self.samples):
                    yield Key(number, form, sample), variant

    def requests(self, answered: Mapping[Key, Any]) -> Iterator[tuple[Key, Record, Request]]:
        """Yield a request for everything that is not in `answered`; records that make no prompt are skipped."""
        previous, prompt = None, None
        for key, record in self.keys():
            number_and_form = key.number, key.form
            if key in answered or {(key.number, ""), number_and_form} & self.skipped.keys():
                continue
            if previous != number_and_form:  # the samples of a question share their prompt
                try:
                    prompt = self.prompt(record, key.number)
                except InputError as error:
                    self.skip(number_and_form, str(error))
                    continue
                previous = number_and_form
            yield key, record, self.request(key, record, prompt)

    def asked(self, record: Record) -> Record:
        """Return a record with the question that it is asked."""
        question = self.trained.prompts.question if self.question is None else self.question
        return dataclasses.replace(record, question=(question or record.question) + self.instruction)

    def prompt(self, record: Record, number: int) -> Sample:
        """Return the prompt of a record or control; raise InputError, naming it, if there is none or a too large one.

        `number` is that of the record.
        """
        trained = self.trained
        try:
            prompt = build_prompt(self.asked(record), trained.tokenizer, trained.special, self.prompts, number)
            self.check_prompt(prompt)
        except InputError as error:
            named = str(error).startswith(record.name)
            raise InputError(str(error) if named else f"{record.name}: {error}") from error
        return prompt

    def request(self, key: Key, record: Record, prompt: Sample) -> Request:
        """Return the request of an answer to a record or control with that prompt."""

        def draw_look(tokens: list[int]) -> Picture:
            texts, _ = split_at_looks(tokens, self.trained.tokenizer, self.trained.special)
            return read_image(self.module.draw_look(record, texts[:-1] or texts, self.data), self.prompts)

        seed = np.random.SeedSequence((self.seed, key.number, key.sample)).generate_state(1)[0]
        draw = draw_look if self.decoding["method"] == "pixels" else None
        return Request(prompt, **self.decoding, seed=int(seed), draw_look=draw, name=record.name)

    def _add(self, results: Results, key: Key, record: Record, output: RequestOutput) -> None:
        results.add(self.line(key, record, output))

    def line(self, key: Key, record: Record, output: RequestOutput) -> dict[str, Any]:
        """Return the line of the results file for an answer, scored."""
        final_answer = self.module.find_answer(output.plain_text, record)
        return {
            **key._asdict(),
            "record": record.name,
            "answer": None if final_answer is None else self.module.canonical(final_answer),
            "right": final_answer is not None and self.module.is_right(record, final_answer),
            "text": output.text,
            "tokens": len(output.tokens),
            "looks": len(output.looks),
            "slots": output.slots,
            "picture_tokens": sum(look.picture_tokens for look in output.looks),
            "stop_reason": output.stop_reason,
            "error": output.error,
            "seconds": round(output.timings.total, 4),
        }

    def counted(self, lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the lines of a results file that are asked for: others stem from a higher limit or more samples."""
        most = self.limit or len(self.source)
        return [line for line in lines if line["number"] < most and line["sample"] < self.samples]

    def summary(self, lines: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
        """Return the figures of the answers in lines of a results file, with the task's own."""
        summary = {**summarise(lines), "skipped": len(self.skipped), "seconds": round(seconds, 2)}
        if hasattr(self.module, "figures"):
            numbers = sorted({line["number"] for line in lines if not line["form"]})
            summary |= self.module.figures({number: self.source[number] for number in numbers}, lines)
        return summary


def run_evaluation(
    evaluator: Evaluator,
    path: Path,
    console: Console | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
    replace: bool = False,
) -> dict[str, Any]:
    """Complete the results file at `path`, write summary and log beside it, and return the summary.

    With `replace`, answers of other settings or of another model are deleted first; otherwise they raise BadResults.
    The summary has the settings and the figures; its `seconds` include those of earlier calls that were complete. If
    the evaluation `is_stopped()`, its figures are of the answers until then, and are not written. Of several processes
    all call it, and the main one writes.
    """
    settings = evaluator.settings(evaluator.trained.digest())
    summary_path = summary_file(path)
    in_main(lambda: check_output(summary_path))
    with (
        share_results(path, settings, len(evaluator.source), replace) as results,
        stop_sentence(lambda: f"stopped; {path} holds {results.stop()} answers, and the same command resumes it"),
        Progress(path.with_suffix(".log") if is_main() else None, console) as progress,
    ):
        for sentence in evaluator.skipped.values():
            _print_skipped(sentence)
        for sentence in results.damaged:
            print(sentence, file=sys.stderr)
        seconds = evaluator.answer_all(results, progress, is_stopped)
        summary: dict[str, Any] = {}

        def write() -> None:
            before = _summary_in_file(evaluator, path, settings["model"]) or {}
            lines = evaluator.counted(results.lines.values())
            figures = evaluator.summary(lines, seconds + before.get("seconds", 0))
            summary.update(settings, limit=evaluator.limit, samples=evaluator.samples, **figures)
            if not is_stopped():
                write_json(summary_path, summary)

        in_main(write)
        return open_exchange()(summary)[0]


def read_summary(evaluator: Evaluator, path: Path) -> dict[str, Any] | None:
    """Return the summary of a complete evaluation with these settings, of any model; None without one.

    None as well if the answers, in the file at `path`, are damaged or others.
    """
    summary = _summary_in_file(evaluator, path)
    asked = {"limit": evaluator.limit, "samples": evaluator.samples}
    if summary is None or not asked.items() <= summary.items():
        return None
    try:
        figures = summarise(evaluator.counted(read_lines(path, len(evaluator.source))))
    except InputError:
        return None
    return summary if figures.items() <= summary.items() else None


def _summary_in_file(evaluator: Evaluator, path: Path, model: str | None = None) -> dict[str, Any] | None:
    """Return the summary beside a results file if it has the evaluator's settings; without `model` of any model."""
    with contextlib.suppress(InputError):
        summary = read_object(summary_file(path))
        settings = evaluator.settings(model or summary.get("model"))
        if settings.items() <= summary.items():
            return summary
    return None


def _print_skipped(sentence: str) -> None:
    if is_main():
        print(f"skipped: {sentence}", file=sys.stderr)


def summary_file(path: Path) -> Path:
    """Return the file of the summary of the answers at `path`."""
    return path.with_suffix(".summary.json")


def results_file(workdir: Path, config: RunConfig, stage: str, step: int, task: str, method: str = "latent") -> Path:
    """Return the file in a run's workdir for the answers of a stage after a step; at its end the step is not named."""
    place = stage if step == config.stages[stage].steps else f"{stage}-step{step}"
    return workdir / "evaluations" / f"{place}-{task}-{method}.jsonl"


def _added(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of later versions that do not have their defaults."""
    defaults = {"image_visibility": "all", "slot_positions": "text"}
    return {name: decoding[name] for name, default in defaults.items() if decoding.get(name, default) != default}


def _sampling_settings(sampling: SamplingParams) -> dict[str, Any]:
    """Return the parameters as JSON values, without those of later versions that have their defaults."""
    fields = {field.name: field for field in dataclasses.fields(sampling)}
    values = {name: getattr(sampling, name) for name in fields}
    kept = {name for name, field in fields.items() if not rule_of(field).added or values[name] != field.default}
    return {name: list(value) if name == "stop" else value for name, value in values.items() if name in kept}
