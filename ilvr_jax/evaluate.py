"""python -m ilvr_jax.evaluate: how often a model answers right, for a task and a way of looking."""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ilvr_jax.checkpoints.trained import TrainedModel, load_model
from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.config.experiments import evaluation_file
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.data.examples import ExampleSettings, build_prompt, read_image
from ilvr_jax.data.pipeline import Source, fingerprint
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.errors import InputError, quote
from ilvr_jax.evaluation.results import Key, Results, figures, open_results
from ilvr_jax.files import check_output, write_json
from ilvr_jax.generation_flags import add_decoding_flags, blame_flags, check_sizes, how_to_decode
from ilvr_jax.inference.engine import Engine, fit_settings
from ilvr_jax.inference.requests import Answer, Picture, Request
from ilvr_jax.inference.sampling import check_whole
from ilvr_jax.inference.transcript import split_at_looks
from ilvr_jax.interrupts import stop_sentence
from ilvr_jax.tasks import TASKS
from ilvr_jax.training.progress import Progress

REPORT_SECONDS = 10.0  # between two lines of progress
MOST_SAMPLES, MOST_ROWS = 2**16, 2**16


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 done, 1 some records skipped, 2 bad input, 130 stopped."""
    options = make_parser().parse_args(arguments)
    check_flags(options)
    trained = load_model(options.checkpoint, options.stage, options.dtype)
    if not trained.looks and options.method != "text":
        print(f"{options.checkpoint} has no latent tokens; it is decoded as plain text", file=sys.stderr)
        options.method = "text"
    work = Work(options, trained, TASKS[options.task])
    summary_path = work.out.with_suffix(".summary.json")
    check_output(summary_path)
    with open_results(work.out, work.settings(), len(work.source)) as results, stop_sentence(lambda: stopped(results)):
        for sentence in results.damaged:
            print(sentence, file=sys.stderr)
        seconds = work.answer_all(results)
        summary = work.summary(results, seconds)
        show(summary, work.settings(), Console())
        write_json(summary_path, summary)
    print(f"Every answer: {results.path}; the figures: {summary_path}")
    return 1 if work.left_out else 0


def stopped(results: Results) -> str:
    return f"stopped; {len(results.lines)} answers are in {results.path}, and the same command asks the others"


def check_flags(options: argparse.Namespace) -> None:
    """Raises InputError, naming the flag, for a bad value of those that this command alone has."""
    with blame_flags():
        for name, most in (("samples_per_question", MOST_SAMPLES), ("batch_size", MOST_ROWS)):
            check_whole(name, getattr(options, name), 1, most)
        if options.limit is not None:
            check_whole("limit", options.limit, 1)
    if options.samples_per_question > 1 and not options.temperature:
        raise BadConfig("--temperature must be above 0 for --samples-per-question above 1, or all samples are alike")
    if options.out is not None and options.out.suffix != ".jsonl":
        raise BadConfig(f"--out must be a file whose name ends with .jsonl, got {quote(str(options.out))}")


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = ArgumentParser(prog="python -m ilvr_jax.evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="a run's workdir, a Qwen2.5-VL (folder or hub name), or ADAPTER[@BASE]")
    parser.add_argument("--task", choices=TASKS, required=True, help="what is asked and how answers are scored")
    parser.add_argument(
        "--data", type=path_flag, help="the records, in a format of the task (default: the run's eval.data)"
    )
    parser.add_argument("--root", type=path_flag, help="where paths of images begin (default: the folder of --data)")
    parser.add_argument(
        "--follow-links",
        action=argparse.BooleanOptionalAction,
        help="read images that links out of the data folder lead to (default: the run's data.follow_links, or yes)",
    )
    parser.add_argument("--question", help="in place of every record's own; empty: its own (default: the run's)")
    parser.add_argument(
        "--instruction", default="", help="text after every question, for models not trained on the task"
    )
    parser.add_argument("--samples-per-question", type=int, default=1, help="with a temperature above 0")
    parser.add_argument("--batch-size", type=int, default=16, help="answers decoded at once (default: 16)")
    parser.add_argument("--limit", type=int, help="ask the first records alone")
    parser.add_argument(
        "--out", type=path_flag, help="a .jsonl file for the answers; if it holds some, the rest is asked"
    )
    add_decoding_flags(parser)
    return parser


class Work:
    """One evaluation: its questions, options and results."""

    def __init__(self, options: argparse.Namespace, trained: TrainedModel, task: ModuleType):
        self.options, self.trained, self.task = options, trained, task
        if options.method == "pixels" and not hasattr(task, "draw_look"):
            drawn = ", ".join(name for name, module in TASKS.items() if hasattr(module, "draw_look"))
            raise BadConfig(f'--method must not be "pixels" for {options.task}, which has no pictures as {drawn} has')
        self.how = how_to_decode(options, trained.prompts, trained.max_new_tokens)
        self.data = options.data or self._data_of_run()
        self.source: Source = task.open_source(self.data, options.root, "skip", self._follow_links())
        for sentence in getattr(self.source, "remarks", ()):
            print(sentence, file=sys.stderr)
        self.count = min(len(self.source), options.limit or len(self.source))
        self.out = options.out or self._default_out()
        self.model_digest = trained.digest()
        self.left_out: dict[Any, str] = {}
        for number, sentence in enumerate(self.source.skipped):
            self._leave_out(("line", number), sentence)

    def _data_of_run(self) -> Path:
        config = self.trained.config
        path = evaluation_file(config) if config is not None else None
        if path is None:
            raise BadConfig(f"--data must be a file of records, since {self.options.checkpoint} names none")
        return path

    def _follow_links(self) -> bool:
        config = self.trained.config
        of_run = True if config is None else config.data.follow_links
        return of_run if self.options.follow_links is None else self.options.follow_links

    def _default_out(self) -> Path:
        name = f"{self.options.task}-{self.options.method}.jsonl"
        folder = Path(self.options.checkpoint)
        if self.trained.config is not None:
            return folder / "evaluations" / name
        return Path("evaluations") / f"{folder.absolute().name}-{name}"

    def _leave_out(self, key: Any, sentence: str) -> None:
        if key not in self.left_out:
            self.left_out[key] = sentence
            print(f"skipped: {sentence}", file=sys.stderr)

    def settings(self) -> dict[str, Any]:
        """Returns what makes an answer what it is, for the head of the results: not how many are asked for."""
        options = self.options
        names = ("task", "dtype", "question", "instruction", "seed")
        return {
            "checkpoint": str(options.checkpoint),
            "stage": self.trained.stage,
            "step": self.trained.step,
            "model": self.model_digest,
            "data": str(self.data),
            "root": None if options.root is None else str(options.root),
            "records": fingerprint(self.source),
            **{name: getattr(options, name) for name in names},
            **self.how,
        }

    def answer_all(self, results: Results) -> float:
        """Asks what the results lack and writes it down; returns the seconds that it took.

        Raises BadConfig if there is something to ask and no record can be.
        """
        began, trained = time.monotonic(), self.trained
        every = [key for key, _ in self.keys()]
        done = sum(key in results.lines for key in every)
        if every and done == len(every):
            return 0.0
        prompts = (request for _, _, request in self.requests(results.lines))  # made twice: all at once fill memory
        first_prompt = next(prompts, None)
        if first_prompt is None and done:  # the others were skipped, as they were when these were answered
            return 0.0
        if first_prompt is None:
            raise BadConfig(f"{self.data}: no record is left to ask")
        prompts = itertools.chain([first_prompt], prompts)
        settings = fit_settings(prompts, self.options.batch_size, trained.model.geometry)
        engine = Engine(trained.model, trained.params, trained.special, settings, trained.tokenizer)
        asked: list[tuple[Key, Record]] = []

        def taken() -> Iterator[Request]:
            for key, record, request in self.requests(dict(results.lines)):
                asked.append((key, record))
                yield request

        log = results.path.with_suffix(".log")
        with Progress(log) as progress, progress.stage(self.options.task, done, len(every)):
            progress.log(f"{done} of {len(every)} answers are there; {settings.rows} are decoded at once")
            new = 0
            for answer in engine.serve(taken()):
                key, record = asked[answer.number]
                if answer.stop_reason == "refused":
                    self._leave_out((key.number, key.form), f"{record.name}: {answer.error}")
                    continue
                results.add(self.line(key, record, answer))
                progress.advance()
                now, new = time.monotonic(), new + 1
                if new == 1:  # from here on: what was compiled before says nothing about the rate
                    first = reported = now
                elif now - reported > REPORT_SECONDS:
                    rate, reported = (new - 1) / (now - first), now
                    progress.report({}, rate, (len(every) - done - new) / rate)
        return time.monotonic() - began

    def keys(self) -> Iterator[tuple[Key, Record]]:
        """Yields all that there is to ask, but for records that cannot be; those are skipped."""
        for number in range(self.count):
            try:
                record = self.source[number]
                self.task.check(record)
                controls = self.task.controls(record) if hasattr(self.task, "controls") else {}
            except BadRecord as error:
                self._leave_out((number, ""), str(error))
                continue
            for form, variant in {"": record, **controls}.items():
                for sample in range(1 if form else self.options.samples_per_question):
                    yield Key(number, form, sample), variant

    def requests(self, done: dict[Key, Any]) -> Iterator[tuple[Key, Record, Request]]:
        """Yields what is not done, with its prompt; records whose prompt cannot be made are skipped."""
        trained, before, prompt = self.trained, None, None
        prompts = self.prompts()
        for key, record in self.keys():
            if key in done or {(key.number, ""), (key.number, key.form)} & self.left_out.keys():
                continue
            if before != (key.number, key.form):  # samples of one question share their prompt
                asked = dataclasses.replace(record, question=self.question(record))
                try:
                    prompt = build_prompt(asked, trained.tokenizer, trained.special, prompts, key.number)
                    check_sizes(self.options, prompt)
                except InputError as error:
                    named = str(error).startswith(record.name)
                    self._leave_out((key.number, key.form), str(error) if named else f"{record.name}: {error}")
                    continue
                before = key.number, key.form
            seed = np.random.SeedSequence((self.options.seed, key.number, key.sample)).generate_state(1)[0]
            draw_look = self.draw_look(record, prompts) if self.options.method == "pixels" else None
            yield key, record, Request(prompt, **self.how, seed=int(seed), draw_look=draw_look, name=record.name)

    def prompts(self) -> ExampleSettings:
        return dataclasses.replace(self.trained.prompts, question=None)

    def question(self, record: Record) -> str:
        """Returns what is asked about a record."""
        override = self.trained.prompts.question if self.options.question is None else self.options.question
        return (override or record.question) + self.options.instruction

    def draw_look(self, record: Record, prompts: ExampleSettings):
        """Returns the function that shows the engine a record's next picture, made ready as its images are."""

        def draw(tokens: list[int]) -> Picture:
            text = "".join(split_at_looks(tokens, self.trained.tokenizer, self.trained.special)[0])
            return read_image(self.task.draw_look(record, text), prompts)

        return draw

    def line(self, key: Key, record: Record, answer: Answer) -> dict[str, Any]:
        """Returns what is written down of an answer."""
        found = self.task.find_answer("".join(self._texts(answer)), record)
        return {
            **key._asdict(),
            "record": record.name,
            "answer": None if found is None else self.task.canonical(found),
            "right": found is not None and self.task.is_right(record, found),
            "text": answer.text,
            "tokens": len(answer.tokens),
            "looks": len(answer.looks),
            "slots": answer.slots,
            "picture_tokens": sum(look.picture_tokens for look in answer.looks),
            "stop_reason": answer.stop_reason,
            "error": answer.error,
            "seconds": round(answer.timings.total, 4),
        }

    def _texts(self, answer: Answer) -> list[str]:
        return split_at_looks(answer.tokens, self.trained.tokenizer, self.trained.special)[0]

    def summary(self, results: Results, seconds: float) -> dict[str, Any]:
        """Returns the figures of all answers, those of the task itself among them."""
        lines = list(results.lines.values())
        summary = {
            **self.settings(),
            **figures(lines),
            "left_out": len(self.left_out),
            "seconds": round(seconds, 2),
        }
        if hasattr(self.task, "figures"):
            answered = sorted({line["number"] for line in lines if not line["form"]})
            summary |= self.task.figures({number: self.source[number] for number in answered}, lines)
        return summary


def show(summary: dict[str, Any], settings: dict[str, Any], console: Console) -> None:
    """Prints the figures of a summary, without the settings that are in it, too."""
    table = Table(title=f"{settings['task']}, method {settings['method']}", show_header=False, box=box.SIMPLE)
    table.add_column()
    table.add_column(justify="right")
    for name in [name for name in summary if name not in settings]:
        table.add_row(name.replace("_", " "), _shown(summary[name]))
    console.print(table)


def _shown(value: Any) -> str:
    """Returns a figure as the table shows it."""
    if isinstance(value, dict):
        return "  ".join(f"{key}: {_shown(share)}" for key, share in value.items())
    if isinstance(value, list):
        return "–".join(map(_shown, value))
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
