"""The content of slots: probes that read states from them, and the retrieval of their own helper images."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from rich.console import Console

from ilvr_jax.analysis.slots import cosine_with_own, probe, retrieval, side_by_side
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.evaluation.evaluator import Evaluator
from ilvr_jax.evaluation.slot_vectors import SlotVectors, fresh_records, gather_vectors, questions_of
from ilvr_jax.files import check_output, write_json
from ilvr_jax.progress import Progress
from ilvr_jax.reports.probes import READERS, write_probes_page

FEWEST = 10  # records to fit on, of which a place has a state
CANDIDATES = 100  # helper images among which a look finds its own


def run_probes(evaluator: Evaluator, count: int, path: Path, console: Console | None = None) -> dict[str, Any]:
    """Fit probes on up to `count` records, score them on the evaluator's, write summary and page, return the summary.

    The records to fit on are generated ones or, for a run on files, every second one of the evaluator's. Raises
    BadConfig if there are too few or no answer has a look, and as `questions_of` does.
    """
    started, files = time.monotonic(), report_files(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in files.values():
        check_output(file)
    fresh, scored = fresh_records(evaluator, count), questions_of(evaluator)
    if fresh is None:
        fitted, scored = scored[::2][:count], scored[1::2]
    else:
        fitted = questions_of(fresh)
    few = min(len(fitted), len(scored))
    if few < FEWEST:
        raise BadConfig(
            f"--probes must have {FEWEST} records or more to fit on, and as many to score, got {len(fitted)} and "
            f"{len(scored)}"
        )
    with Progress(path.with_name(f"{path.stem}-probes.log"), console) as progress:
        progress.log(f"probes are fitted on {len(fitted)} records and scored on {len(scored)}")
        numbers, vectors = gather_vectors([*fitted, *scored], progress)
    if not vectors.valid.any():
        raise BadConfig(f"--probes must be used with a model that looks, got none in {len(numbers)} answers")
    to_fit, to_score = (
        vectors.take([row for row, number in enumerate(numbers) if (number < len(fitted)) == is_fitted])
        for is_fitted in (True, False)
    )
    summary = {
        **evaluator.settings(evaluator.trained.digest()),
        "limit": evaluator.limit,
        "fitted_on": f"every second one of {evaluator.records.name}" if fresh is None else fresh.records.name,
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
    shown, skipped = [], 0
    for place in range(to_fit.states.shape[2]):
        fitted, scored = (vectors.states[:, look, place] != "" for vectors in (to_fit, to_score))
        names, (labels, true) = _labels(to_fit.states[fitted, look, place], to_score.states[scored, look, place])
        if fitted.sum() < FEWEST or not len(true) or len(np.unique(labels)) < 2:
            skipped += 1
            continue
        shown.append(names[true])
        for name in READERS:
            if name == "majority":
                predicted = np.full(len(true), np.bincount(labels).argmax())
            else:
                inputs = (_vectors(vectors, name, look, place) for vectors in (to_fit, to_score))
                inputs, tests = (array[chosen] for array, chosen in zip(inputs, (fitted, scored), strict=True))
                predicted = probe(inputs, labels[:, None], tests, true[:, None], seed=seed).predicted[:, 0]
            accuracies[name].append(float((predicted == true).mean()))
            read[name].append(names[predicted])
    return {
        "places": len(shown),
        "skipped_places": skipped,
        "accuracy": {name: fmean(values) if values else None for name, values in accuracies.items()},
        "macro": {name: _macro(shown, values) for name, values in read.items()},
    }


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
