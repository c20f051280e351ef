"""The content of slots: probes that read states from them, and the retrieval of their own helper images."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped
from rich.console import Console

from ilvr_jax.analysis.slots import cosine_with_own, probe, retrieval, side_by_side
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.evaluation.evaluator import Evaluator
from ilvr_jax.evaluation.slot_vectors import Question, SlotVectors, fresh_records, gather_vectors, questions_of
from ilvr_jax.files import check_output, write_json
from ilvr_jax.progress import Progress
from ilvr_jax.reports.probes import READERS, write_probes_page
from ilvr_jax.tasks import TASKS

FEWEST = 10  # records to fit on, of which a place has a state
CANDIDATES = 100  # helper images among which a look finds its own


class ProbePlan(NamedTuple):
    """The questions whose slots probes are fitted on, those whose slots they are scored on, and the first in words."""

    fitted: list[Question]
    scored: list[Question]
    fitted_on: str

    @property
    def questions(self) -> list[Question]:
        """All questions, those to fit on first."""
        return [*self.fitted, *self.scored]


def check_probes(evaluator: Evaluator) -> None:
    """Raise BadConfig if the evaluator's task or run has slots without states of their own to read."""
    if not hasattr(evaluator.module, "slot_states"):
        known = ", ".join(name for name, module in TASKS.items() if hasattr(module, "slot_states"))
        raise BadConfig(f"--task must be one whose slots have states ({known}) for --probes, got {evaluator.task}")
    config = evaluator.trained.config
    selection = (config.latents if config else LatentsConfig()).selection
    if selection != "dense":
        raise BadConfig(
            "`latents.selection` must be dense for --probes, since other slots have no place of the helper image of "
            f"their own, got {selection}"
        )


def plan_probes(evaluator: Evaluator, count: int) -> ProbePlan:
    """Return the questions to fit probes on, up to `count`, and those to score them on.

    Those to fit on are of generated records or, for a run on files, every second one of the evaluator's. Raises
    BadConfig if there are too few, and as `check_probes` and `questions_of` do.
    """
    check_probes(evaluator)
    fresh, scored = fresh_records(evaluator, count), questions_of(evaluator)
    if fresh is None:
        plan = ProbePlan(scored[::2][:count], scored[1::2], f"every second one of {evaluator.records.name}")
    else:
        plan = ProbePlan(questions_of(fresh), scored, fresh.records.name)
    if min(len(plan.fitted), len(plan.scored)) < FEWEST:
        raise BadConfig(
            f"--probes must have {FEWEST} records or more to fit on, and as many to score, got {len(plan.fitted)} and "
            f"{len(plan.scored)}"
        )
    return plan


def split_vectors(plan: ProbePlan, numbers: Sequence[int], vectors: SlotVectors) -> tuple[SlotVectors, SlotVectors]:
    """Return the vectors to fit on and those to score, of all vectors, which belong to questions of these numbers.

    Raises BadConfig if no answer has a look.
    """
    if not vectors.valid.any():
        raise BadConfig(f"--probes must be used with a model that looks, got none in {len(numbers)} answers")
    fitted, scored = (
        vectors.take([row for row, number in enumerate(numbers) if (number < len(plan.fitted)) == is_fitted])
        for is_fitted in (True, False)
    )
    return fitted, scored


def run_probes(evaluator: Evaluator, count: int, path: Path, console: Console | None = None) -> dict[str, Any]:
    """Fit probes on up to `count` records, score them on the evaluator's, write summary and page, return the summary.

    Raises BadConfig if no answer has a look, and as `plan_probes` does.
    """
    started, files = time.monotonic(), report_files(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in files.values():
        check_output(file)
    plan = plan_probes(evaluator, count)
    with Progress(path.with_name(f"{path.stem}-probes.log"), console) as progress:
        progress.log(f"probes are fitted on {len(plan.fitted)} records and scored on {len(plan.scored)}")
        numbers, vectors = gather_vectors(plan.questions, progress)
    to_fit, to_score = split_vectors(plan, numbers, vectors)
    summary = {
        **evaluator.settings(evaluator.trained.digest()),
        "limit": evaluator.limit,
        "fitted_on": plan.fitted_on,
        "fitted_records": len(to_fit.text),
        "scored_records": len(to_score.text),
        "skipped": len(evaluator.skipped),
        "looks": [look_figures(to_fit, to_score, look, evaluator.seed) for look in range(vectors.states.shape[1])],
    }
    summary["seconds"] = round(time.monotonic() - started, 2)
    write_json(files["summary"], summary)
    write_probes_page(files["html"], summary, f"Probes of {evaluator.task}")
    return summary


def report_files(path: Path) -> dict[str, Path]:
    """Return the files of the report on probes beside the results file at `path`, by kind."""
    kinds = {"summary": ".summary.json", "html": ".html"}
    return {kind: path.with_name(f"{path.stem}-probes{suffix}") for kind, suffix in kinds.items()}


def look_figures(to_fit: SlotVectors, to_score: SlotVectors, look: int, seed: int) -> dict[str, Any]:
    """Return the figures of one look, from 0: those of `probe_figures` and of `retrieval_figures`."""
    return {**probe_figures(to_fit, to_score, look, seed), "retrieval": retrieval_figures(to_score, look, seed)}


def probe_figures(to_fit: SlotVectors, to_score: SlotVectors, look: int, seed: int) -> dict[str, Any]:
    """Return how well the state of each place of a look is read, from each kind of vectors of READERS.

    `accuracy` is the mean over places, each with a probe of its own, on the scored samples; `macro` is the mean over
    states of the share that is read right. Places with a single state, with fewer than FEWEST samples to fit on or with
    none to score are skipped, and both are None if all are. "majority" is the most frequent state of the place.
    """
    accuracies: dict[str, list[float]] = {name: [] for name in READERS}
    read: dict[str, list[np.ndarray]] = {name: [] for name in READERS}
    shown, places = [], to_fit.states.shape[2]
    for place in range(places):
        task = probe_task(to_fit, to_score, look, place)
        if task is None:
            continue
        shown.append(task.names[task.true])
        for name in READERS:
            predicted = task.predict(to_fit, to_score, name, seed)
            accuracies[name].append(float((predicted == task.true).mean()))
            read[name].append(task.names[predicted])
    return {
        "places": len(shown),
        "skipped_places": places - len(shown),
        "accuracy": {name: fmean(values) if values else None for name, values in accuracies.items()},
        "macro": {name: _macro(shown, values) for name, values in read.items()},
    }


class ProbeTask(NamedTuple):
    """The states of one place of a look, for a probe.

    Attributes:
        look, place: from 0.
        names: of the states.
        fitted, scored: the samples that have a state, of those to fit on and of those to score.
        labels, true: the numbers of their states among the names.
    """

    look: int
    place: int
    names: Shaped[np.ndarray, " names"]
    fitted: Bool[np.ndarray, " fitted_samples"]
    scored: Bool[np.ndarray, " scored_samples"]
    labels: Int[np.ndarray, " labels"]
    true: Int[np.ndarray, " true"]

    def predict(self, to_fit: SlotVectors, to_score: SlotVectors, name: str, seed: int) -> Int[np.ndarray, " true"]:
        """Return the numbers of the states that are read from the vectors of that name, one of READERS."""
        if name == "majority":
            return np.full(len(self.true), np.bincount(self.labels).argmax())
        inputs = _vectors(to_fit, name, self.look, self.place)[self.fitted]
        tests = _vectors(to_score, name, self.look, self.place)[self.scored]
        return probe(inputs, self.labels[:, None], tests, self.true[:, None], seed=seed).predicted[:, 0]


def probe_task(to_fit: SlotVectors, to_score: SlotVectors, look: int, place: int) -> ProbeTask | None:
    """Return the states of a place; None with a single one, too few samples to fit on or none to score."""
    fitted, scored = (vectors.states[:, look, place] != "" for vectors in (to_fit, to_score))
    names, (labels, true) = _labels(to_fit.states[fitted, look, place], to_score.states[scored, look, place])
    if fitted.sum() < FEWEST or not len(true) or len(np.unique(labels)) < 2:
        return None
    return ProbeTask(look, place, names, fitted, scored, labels, true)


def read_states(to_fit: SlotVectors, to_score: SlotVectors, seed: int) -> Shaped[np.ndarray, "samples looks slots"]:
    """Return the names of the states that probes read from own slots; "" where there is no state or no probe."""
    names = to_fit.states.dtype, to_score.states.dtype
    read = np.zeros(to_score.states.shape, np.result_type(*names))
    for look, place in np.ndindex(*read.shape[1:]):
        task = probe_task(to_fit, to_score, look, place)
        if task is not None:
            read[task.scored, look, place] = task.names[task.predict(to_fit, to_score, "slots", seed)]
    return read


def _labels(
    fitted: Shaped[np.ndarray, " fitted"], scored: Shaped[np.ndarray, " scored"]
) -> tuple[Shaped[np.ndarray, " names"], tuple[Int[np.ndarray, " fitted"], Int[np.ndarray, " scored"]]]:
    """Return the names of states, and the number of each sample's."""
    names, numbers = np.unique(np.concatenate([fitted, scored]), return_inverse=True)
    return names, (numbers[: len(fitted)], numbers[len(fitted) :])


def _vectors(vectors: SlotVectors, name: str, look: int, place: int) -> np.ndarray:
    """Return one vector of a sample, [samples, channels], from which the state of a place is read."""
    array = getattr(vectors, name)
    return array if name == "text" else array[:, look, place]


def _macro(shown: list[np.ndarray], read: list[np.ndarray]) -> float | None:
    """Return the mean over states of the share of their places that are read right, None without any."""
    if not shown:
        return None
    true, predicted = np.concatenate(shown), np.concatenate(read)
    return fmean(float((predicted[true == state] == state).mean()) for state in np.unique(true))


def retrieval_figures(vectors: SlotVectors, look: int, seed: int) -> Mapping[str, Any]:
    """Return how well the slots of a look find their own helper image among those of CANDIDATES samples.

    Slots and pauses are compared with the features of helper images by the mean cosine over places. With fewer than two
    samples that have the look, there are no figures.
    """
    there = vectors.valid[:, look].any(1)
    samples, valid = int(there.sum()), vectors.valid[there, look]
    figures: dict[str, Any] = {"samples": samples, "candidates": min(CANDIDATES, samples)}
    if samples < 2:
        return figures
    targets = side_by_side(vectors.targets[there, look], valid)
    for name in ("pause", "slots"):
        predicted = side_by_side(getattr(vectors, name)[there, look], valid)
        found = dataclasses.asdict(retrieval(predicted, targets, figures["candidates"], seed))
        own, others = cosine_with_own(predicted, targets)
        figures[name] = {**found, "cosine_with_own": own, "cosine_with_others": others}
    return figures
