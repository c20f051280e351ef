"""The figures of an evaluation with other slots: paired comparisons, answers that follow donors, content of slots."""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from ilvr_jax.analysis.slots import cosine_between_samples, effective_rank, movement
from ilvr_jax.data.records import Record
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.evaluator import Evaluator
from ilvr_jax.evaluation.interventions import Slots
from ilvr_jax.evaluation.paired import compare
from ilvr_jax.evaluation.results import Key
from ilvr_jax.evaluation.slot_evaluation import (
    Chosen,
    Condition,
    Line,
    SlotAnswers,
    ask_with_slots,
    conditions_of,
)
from ilvr_jax.files import check_output, read_object, write_json
from ilvr_jax.progress import Progress
from ilvr_jax.reports.slots import draw_slots, write_slots_page

OWN = Condition("own")


def run_slot_evaluation(
    evaluator: Evaluator,
    names: Sequence[str],
    path: Path,
    chosen: Chosen,
    console: Console | None = None,
) -> dict[str, Any]:
    """Complete the results files of interventions beside `path`; write and return the summary.

    Plot and page are written beside it. Nothing is asked again if all answers exist. Raises as `ask_with_slots` does.
    """
    started, model, conditions = time.monotonic(), evaluator.trained.digest(), conditions_of(names)
    files = report_files(path, chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in files.values():
        check_output(file)
    settings = {**evaluator.settings(model), "limit": evaluator.limit, **chosen.settings}
    before = _summary_in_file(files["summary"], settings, conditions)
    content, seconds = before.get("content"), before.get("seconds", 0)
    with Progress(path.with_name(f"{path.stem}-slots.log"), console) as progress:
        answers = ask_with_slots(evaluator, conditions, path, model, chosen, progress, record=content is None)
    if answers.recordings:
        forms = {condition.form for condition in conditions} - {""}
        content = content_figures(answers.recordings, evaluator.decoding["latent_size"], forms)
        seconds += time.monotonic() - started
    summary = {**settings, **summarise_slots(evaluator, answers), "content": content}
    summary["seconds"] = round(seconds, 2)  # those of earlier calls that were complete included
    write_json(files["summary"], summary)
    for kind in ("png", "svg"):
        draw_slots(summary["rows"], files[kind])
    title = f"Slots of {evaluator.task}"
    write_slots_page(files["html"], summary["rows"], title, remark(evaluator, summary))
    return summary


def report_files(path: Path, chosen: Chosen) -> dict[str, Path]:
    """Return the files of the report on the interventions whose results are beside `path`, by kind."""
    kinds = {"summary": ".summary.json", "png": ".png", "svg": ".svg", "html": ".html"}
    return {kind: path.with_name(f"{path.stem}-slots{chosen.suffix}{suffix}") for kind, suffix in kinds.items()}


def remark(evaluator: Evaluator, summary: Mapping[str, Any]) -> str:
    """Return the paragraph under the title of the page."""
    parts = [f"{summary['questions']} questions of {evaluator.records.name}"]
    parts += [f"without looks, and so with the same answers everywhere: {summary['without_looks']}"]
    parts += [f"only {name} {summary[name]} is replaced" for name in ("look", "place") if name in summary]
    for replaced, donor in summary["donor"].items():
        follows = f"{donor['follows']:.3f} of the answers follow the donor whose {replaced} they get"
        parts += [f"{follows}, and {donor['follows_with_own_slots']:.3f} with their own slots"]
    return f"{'; '.join(parts)}."


def _summary_in_file(path: Path, settings: Mapping[str, Any], conditions: Sequence[Condition]) -> dict[str, Any]:
    """Return an earlier summary of the same own slots, or an empty one."""
    try:
        summary = read_object(path)
    except InputError:
        return {}
    content = summary.get("content")
    if not settings.items() <= summary.items() or not isinstance(content, dict):
        return {}
    return summary if "movement" in content or not any(condition.form for condition in conditions) else {}


def summarise_slots(evaluator: Evaluator, answers: SlotAnswers) -> dict[str, Any]:
    """Return the figures of the answers in the results files: `rows` are those of reports/slots.py."""
    lines, groups = answers.lines, _groups(evaluator, answers.records)
    own = lines[OWN]
    rows: list[dict[str, Any]] = [
        {
            "name": "own",
            "replaced": "",
            "samples": len(own),
            "accuracy": fmean(line["right"] for line in own.values()),
            **dict.fromkeys(("difference", "interval", "p")),
            "groups": group_accuracies(own, groups),
        }
    ]
    for condition, others in lines.items():
        if condition.name == "own" or not others:
            continue
        references = lines[condition.own]
        paired = dataclasses.asdict(
            compare(
                [references[key]["right"] for key in others],
                [line["right"] for line in others.values()],
                evaluator.seed,
            )
        )
        rows.append(
            {
                "name": condition.name,
                "replaced": condition.replaced,
                "accuracy": paired.pop("other"),
                "own_accuracy": paired.pop("own"),
                **paired,
                "intervened": sum(line["intervened"] for line in others.values()),
                "groups": group_accuracies(others, groups),
            }
        )
    return {
        "questions": len(own),
        "without_looks": sum(line["recorded_slots"] == 0 for line in own.values()),
        "skipped": len(evaluator.skipped),
        "rows": rows,
        "donor": donor_figures(lines),
    }


def _groups(evaluator: Evaluator, records: Mapping[Key, Record]) -> dict[str, set[Key]]:
    """Return the keys of the records in each of the task's groups."""
    found: dict[str, set[Key]] = {}
    if hasattr(evaluator.module, "groups"):
        for key, record in records.items():
            for name in evaluator.module.groups(record):
                found.setdefault(name, set()).add(key)
    return found


def group_accuracies(lines: Mapping[Key, Line], groups: Mapping[str, set[Key]]) -> dict[str, float | None]:
    """Return the accuracy on each group of records, None on one without any."""
    right = {name: [line["right"] for key, line in lines.items() if key in keys] for name, keys in groups.items()}
    return {name: fmean(values) if values else None for name, values in right.items()}


def donor_figures(lines: Mapping[Condition, Mapping[Key, Line]]) -> dict[str, Any]:
    """Return, by what is replaced, how many answers about edited records follow the originals whose slots they got.

    `follows` is the share of those that are right for the original and wrong for the edit; `follows_with_own_slots`
    that of the same questions with own slots, `follows_unrelated` with the slots of unrelated records, and `difference`
    is `follows` minus the last. `follows_swap` is the share of answers to the originals that follow the unrelated
    records whose slots they got.
    """
    figures = {}
    for condition, others in lines.items():
        given = {key: line for key, line in others.items() if line.get("intervened")}
        if condition.name != "donor" or not given:
            continue
        own = [lines[condition.own][key] for key in given]
        follows = fmean(line["follows_donor"] for line in given.values())
        unrelated, of_unrelated = _follows(lines, Condition("unrelated", condition.replaced, condition.form))
        swapped, of_swap = _follows(lines, Condition("swap", condition.replaced))
        figures[condition.replaced] = {
            "samples": len(given),
            "follows": follows,
            "follows_with_own_slots": fmean(line["follows_donor"] for line in own),
            "unrelated_samples": unrelated,
            "follows_unrelated": of_unrelated,
            "difference": None if of_unrelated is None else follows - of_unrelated,
            "swap_samples": swapped,
            "follows_swap": of_swap,
            "accuracy_with_own_slots": fmean(line["right"] for line in own),
            "accuracy": fmean(line["right"] for line in given.values()),
        }
    return figures


def _follows(lines: Mapping[Condition, Mapping[Key, Line]], condition: Condition) -> tuple[int, float | None]:
    """Return the number of answers with other slots under a condition, and the share that follow the donor."""
    follows = [line["follows_donor"] for line in lines.get(condition, {}).values() if line["intervened"]]
    return len(follows), fmean(follows) if follows else None


def content_figures(recordings: Mapping[Key, Slots], latent_size: int, edits: Collection[str]) -> dict[str, Any]:
    """Return figures of own slots by look and place, as lists of lists with None where there are too few samples.

    With `edits`, the kinds that were asked about, they include the movement of slots under each.
    """
    originals = [key for key in recordings if not key.form]
    vectors, valid = _stacked(recordings, originals, latent_size)
    figures: dict[str, Any] = {
        "cosine_between_samples": _places(cosine_between_samples(vectors, valid)),
        "effective_rank": _places(effective_rank(vectors, valid)),
    }
    if edits:
        figures["movement"] = {}
        for form in sorted(edits):
            edited = [key for key in recordings if key.form == form]
            before = [Key(key.number, "", 0) for key in edited]
            both, present = _stacked(recordings, before + edited, latent_size)
            count = len(edited)
            valid = present[:count] & present[count:]
            figures["movement"][form] = _places(movement(both[:count], both[count:], valid))
    return figures


def _stacked(
    recordings: Mapping[Key, Slots], keys: Sequence[Key], latent_size: int
) -> tuple[Float[np.ndarray, "samples looks slots channels"], Any]:
    """Return the inputs of recorded slots by look and place, and where there are some."""
    parts = [recordings[key].inputs for key in keys]
    looks = -(-max(map(len, parts), default=0) // latent_size)
    channels = parts[0].shape[1] if parts else 0
    vectors = np.zeros((len(keys), looks * latent_size, channels), np.float32)
    valid = np.zeros(vectors.shape[:2], bool)
    for row, part in enumerate(parts):
        vectors[row, : len(part)], valid[row, : len(part)] = part, True
    shape = (len(keys), looks, latent_size)
    return vectors.reshape(*shape, channels), valid.reshape(shape)


def _places(figures: Float[np.ndarray, "looks slots"]) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(float(value), 6) for value in look] for look in figures]


def main_figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a summary that are printed below the table; those by place as their mean."""
    figures: dict[str, Any] = {name: summary[name] for name in ("questions", "without_looks", "skipped")}
    for replaced, donor in summary["donor"].items():
        figures[f"answers that follow the donor ({replaced})"] = donor["follows"]
        figures["the same with own slots"] = donor["follows_with_own_slots"]
        figures[f"the same with unrelated slots ({replaced})"] = donor["follows_unrelated"]
        figures[f"answers that follow the unrelated sample of swap ({replaced})"] = donor["follows_swap"]
    content = summary["content"] or {}
    figures |= {name: _mean(content.get(name)) for name in ("cosine_between_samples", "effective_rank")}
    figures |= {f"movement, {kind} edits": _mean(places) for kind, places in content.get("movement", {}).items()}
    return figures | {"seconds": summary["seconds"]}


def _mean(places: Sequence[Sequence[float | None]] | None) -> float | None:
    values = [value for look in places or () for value in look if value is not None]
    return fmean(values) if values else None
