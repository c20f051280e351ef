"""A page of every answer: what its slots point at, and what probes read out of them."""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8
from rich.console import Console

from ilvr_jax.analysis.slot_probes import ProbePlan, plan_probes, read_states, split_vectors
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.data.images import load_image
from ilvr_jax.data.records import BadRecord, ImageSource, Look
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.evaluator import Evaluator, run_evaluation
from ilvr_jax.evaluation.results import Key, read_lines
from ilvr_jax.evaluation.slot_maps import SlotMaps, measure_maps
from ilvr_jax.evaluation.slot_vectors import Question, gather_vectors, own_answers
from ilvr_jax.files import check_output
from ilvr_jax.inference.requests import RequestOutput
from ilvr_jax.inference.transcript import LOOK, cut_texts, split_at_looks
from ilvr_jax.progress import Progress
from ilvr_jax.reports.trace import LookTrace, Trace, write_trace_page

DIFFERS = "When its slots were recorded, this answer came out differently because of rounding. Its looks have no maps."
NO_MAPS = "No look of this answer is complete, or its slots could not be measured."
TURNED = "The slots, states and helper image of every second look are turned by half a turn against the input image."

States = Mapping[int, tuple[Shaped[np.ndarray, "looks slots"], Shaped[np.ndarray, "looks slots"]]]


class PageFigures(NamedTuple):
    """The figures of a page.

    Attributes:
        answers: on the page.
        differing: of these, answers that came out differently when their slots were recorded, which have no maps.
        read: the share of states that probes read right, None without any.
        no_states: why no states are read, "" if they are.
        megabytes: of the file.
        seconds: for the page alone, without the ordinary evaluation.
    """

    answers: int
    differing: int
    read: float | None
    no_states: str
    megabytes: float
    seconds: float


def report_files(path: Path) -> dict[str, Path]:
    """Return the files of the page beside the results file at `path`, by kind."""
    return {"html": path.with_name(f"{path.stem}-trace.html")}


def run_traces(evaluator: Evaluator, count: int, path: Path, console: Console | None = None) -> PageFigures:
    """Complete the results file at `path` and write a page of its answers beside it; return the page's figures.

    Answers are those of the ordinary evaluation, the first of each question. All are given once more, to record their
    slots. Where the task has states, probes are fitted on up to `count` records, as --probes does. Raises as
    `run_evaluation` does.
    """
    page = report_files(path)["html"]
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(page)
    run_evaluation(evaluator, path, console)
    started = time.monotonic()
    evaluator = dataclasses.replace(evaluator, controls=False, samples=1)
    lines = {Key(line["number"], line["form"], line["sample"]): line for line in _lines(evaluator, path)}
    with Progress(path.with_name(f"{path.stem}-trace.log"), console) as progress:
        plan, no_states = _probe_plan(evaluator, count)
        fitted, shown = plan.fitted if plan else [], _questions(evaluator, plan, lines)
        fresh = [question for question in fitted if question.evaluator.records is not evaluator.records]
        asked = [*fresh, *shown]
        progress.log(f"the slots of {len(asked)} answers are recorded")
        outputs = own_answers(asked, progress)
        states: States = {}
        if plan:
            try:
                states = _read(plan, asked, outputs, evaluator.seed, progress)
            except BadConfig as error:
                no_states = str(error)
        again = {number: output for number, output in outputs.items() if number >= len(fresh)}
        same = {number: output for number, output in again.items() if output.text == lines[asked[number].key]["text"]}
        progress.log(f"the slots of {len(same)} answers are measured")
        maps = measure_maps(asked, same, evaluator.rows)
    traces = (
        trace_of(
            question,
            lines[question.key],
            same.get(number),
            maps.get(number),
            states.get(question.key.number),
            DIFFERS if number in again else NO_MAPS,
        )
        for number, question in enumerate(shown, start=len(fresh))
    )
    write_trace_page(page, traces, f"Answers of {evaluator.task}", remark(evaluator, len(shown), plan, no_states))
    right = [value for true, read in states.values() for value in (true == read)[read != ""].tolist()]
    return PageFigures(
        answers=len(shown),
        differing=len(again) - len(same),
        read=fmean(right) if right else None,
        no_states=no_states,
        megabytes=page.stat().st_size / 1e6,
        seconds=round(time.monotonic() - started, 2),
    )


def _lines(evaluator: Evaluator, path: Path) -> list[Mapping[str, Any]]:
    return [line for line in evaluator.counted(read_lines(path, len(evaluator.source))) if not line["form"]]


def _probe_plan(evaluator: Evaluator, count: int) -> tuple[ProbePlan | None, str]:
    """Return the questions of probes, or None and why states cannot be read."""
    try:
        # Records without states are on the page as well: they are skipped by the probes alone.
        return plan_probes(dataclasses.replace(evaluator, skipped=dict(evaluator.skipped)), count), ""
    except BadConfig as error:
        return None, str(error)


def _questions(evaluator: Evaluator, plan: ProbePlan | None, lines: Mapping[Key, Any]) -> list[Question]:
    """Return the questions that have answers, with the steps of their records and with states where these are known."""
    planned = plan.questions if plan else []
    known = {question.key: question for question in planned if question.evaluator.records is evaluator.records}
    questions = []
    for key, record in evaluator.keys():
        if key not in lines:
            continue
        if key in known:
            questions.append(known[key]._replace(evaluator=evaluator))
            continue
        with contextlib.suppress(BadRecord):  # of a record that has no such steps
            if hasattr(evaluator.module, "with_steps"):
                record = evaluator.module.with_steps(record, evaluator.data)
        questions.append(Question(evaluator, key, record, None))
    return questions


def _read(
    plan: ProbePlan, asked: Sequence[Question], outputs: Mapping[int, RequestOutput], seed: int, progress: Progress
) -> States:
    """Return the true states and those that probes read, by number of the record.

    Records that probes are fitted on have none. Raises BadConfig if no answer has a look.
    """

    def identity(question: Question) -> tuple[int, Key]:
        return id(question.evaluator.records), question.key

    given = {identity(asked[number]): output for number, output in outputs.items()}
    places = {place: identity(question) for place, question in enumerate(plan.questions)}
    known = {place: given[name] for place, name in places.items() if name in given}
    rows, vectors = gather_vectors(plan.questions, progress, known)
    to_fit, to_score = split_vectors(plan, rows, vectors)
    read = read_states(to_fit, to_score, seed)
    scored = [plan.questions[row].key.number for row in rows if row >= len(plan.fitted)]
    return {number: (to_score.states[row], read[row]) for row, number in enumerate(scored)}


def remark(evaluator: Evaluator, answers: int, plan: ProbePlan | None, no_states: str) -> str:
    """Return the paragraph under the title of the page."""
    sentences = [f"{answers} answers to {evaluator.records.name}."]
    if plan and not no_states:
        sentences.append(
            f"States are read from slots by linear probes, fitted on {len(plan.fitted)} records ({plan.fitted_on})."
        )
    if no_states:
        sentences.append(f"No states are read from slots, as by --probes: {no_states}.")
    if evaluator.decoding.get("slot_positions") == "turning_grid":
        sentences.append(TURNED)
    return " ".join(sentences)


def trace_of(
    question: Question,
    line: Mapping[str, Any],
    output: RequestOutput | None,
    maps: SlotMaps | None,
    states: tuple[Shaped[np.ndarray, "looks slots"], Shaped[np.ndarray, "looks slots"]] | None,
    reason: str,
) -> Trace:
    """Return an answer for the page.

    `output` is the answer once more, None if it came out differently or not at all: its looks then have no maps, for
    this `reason`.
    """
    evaluator, record, module = question.evaluator, question.record, question.evaluator.module
    if output is None:
        texts, missing = LOOK.split(line["text"]), reason
        sizes = [int(re.search(r"\d+", mark)[0]) for mark in LOOK.findall(line["text"])]
    else:
        texts, sizes = split_at_looks(output.tokens, evaluator.trained.tokenizer, evaluator.trained.special)
        texts = cut_texts(texts, len(output.plain_text)) if output.stop_reason == "stop" else texts
        missing = NO_MAPS if maps is None and any(sizes) else ""
    grids = [(1, 1)] * len(record.images) if maps is None else maps.grids
    helpers = [step.helper_image for step in record.steps if isinstance(step, Look)]
    return Trace(
        number=question.key.number,
        name=record.name,
        question=evaluator.asked(record).question,
        texts=texts,
        answer=line["answer"],
        right=line["right"],
        tokens=line["tokens"],
        level=module.level(record) if hasattr(module, "level") else "",
        groups=module.groups(record) if hasattr(module, "groups") else (),
        images=[_pixels(image, grid, evaluator) for image, grid in zip(record.images, grids, strict=True)],
        grids=grids,
        looks=[look_trace(evaluator, number, sizes[number], maps, helpers, states) for number in range(len(sizes))],
        remark=missing,
    )


def look_trace(
    evaluator: Evaluator,
    number: int,
    slots: int,
    maps: SlotMaps | None,
    helpers: Sequence[ImageSource],
    states: tuple[Shaped[np.ndarray, "looks slots"], Shaped[np.ndarray, "looks slots"]] | None,
) -> LookTrace:
    """Return a look of an answer, by number; one that was cut off has no maps."""
    if maps is None or number >= len(maps.cosines):
        return LookTrace(slots, slots)
    grid, true, read = maps.helper_grids[number], (), ()
    if states is not None and number < len(states[0]) and (states[0][number] != "").any():
        true, read = states[0][number].tolist(), states[1][number].tolist()
    return LookTrace(
        slots=slots,
        columns=slot_columns(evaluator, slots, grid),
        cosines=maps.cosines[number],
        attention=maps.attention[number],
        helper_image=None if grid is None else _pixels(helpers[number], grid, evaluator),
        helper_grid=grid or (0, 0),
        helper_cosines=maps.helper_cosines[number],
        states=true,
        read=read,
    )


def slot_columns(evaluator: Evaluator, slots: int, helper_grid: tuple[int, int] | None) -> int:
    """Return the columns in which slots are shown: as they stand for a helper image, or all in a row."""
    config = evaluator.trained.config
    if (config.latents if config else LatentsConfig()).selection != "dense":
        return slots
    if helper_grid is not None and math.prod(helper_grid) == slots:
        return helper_grid[1]
    on_grid = evaluator.decoding.get("slot_positions", "text") != "text"
    return math.isqrt(slots) if on_grid else slots


def _pixels(source: ImageSource, grid: tuple[int, int], evaluator: Evaluator) -> UInt8[np.ndarray, "height width 3"]:
    """Return an image as the model sees it; a grey square for each token if it cannot be read any more."""
    settings = evaluator.prompts
    try:
        return load_image(source, settings.image_scale, settings.min_pixels, settings.max_pixels)
    except InputError:
        return np.full((*grid, 3), 128, np.uint8)
