"""The comparison of a study's variants with its base, on the same questions: the rows of its table."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ilvr_jax.evaluation.evaluator import summary_file
from ilvr_jax.evaluation.paired import compare
from ilvr_jax.evaluation.results import COUNT_LIMIT, read_lines
from ilvr_jax.evaluation.slot_evaluation import Chosen, Condition, condition_file
from ilvr_jax.files import read_object
from ilvr_jax.reports.slots import row_label
from ilvr_jax.studies import Study
from ilvr_jax.studies.runs import OWN_DATA, StudyRun, read_training

GROUPS = {"holes in the way": "success_where_holes_matter", "detour needed": "success_on_detours"}
SWAP = Condition("swap", "inputs")

Rights = dict[int, float]  # the share of right answers to a question, by its number


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of one run.

    Attributes:
        rights: the share of right answers by question.
        groups: the accuracy on each group of questions that the task has.
        figures: others, by name.
    """

    rights: Rights
    groups: Mapping[str, float | None]
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


BySeed = Mapping[int, Answers]


def compare_variants(
    study: Study, finished: Sequence[StudyRun], failed: Iterable[str], data: str = OWN_DATA
) -> dict[str, Any]:
    """Return the rows of the variants with finished or failed runs, and the shares of leads that `swap` takes away.

    They are those of the answers on `data`; `failed` are the names of runs. The base's row is followed by those of its
    interventions.
    """
    by_name: dict[str, dict[int, Answers]] = defaultdict(dict)
    failed_seeds = defaultdict(list)
    for key in failed:
        name, _, seed = key.rpartition("-seed")
        failed_seeds[name].append(int(seed))
    for run in finished:
        by_name[run.name][run.seed] = read_variant(run, data)
    base = by_name[study.base]
    interventions = read_interventions([run for run in finished if run.name == study.base], data)
    rows = []
    for name in study.variants:
        if by_name[name] or name in failed_seeds:
            failures = {"failed_seeds": sorted(failed_seeds[name])}
            rows.append(row_of(name, by_name[name], None if name == study.base else base) | failures)
        if name == study.base:
            rows += [
                row_of(f"{name}, {row_label(condition._asdict())}", by_seed, base)
                for condition, by_seed in interventions.items()
            ]
    leads = {name: by_name[name] for name in study.leads}
    return {"rows": rows, "leads": lead_shares(base, interventions.get(SWAP, {}), leads)}


def read_variant(run: StudyRun, data: str) -> Answers:
    """Return the answers of a finished run on some data."""
    summary = read_object(summary_file(run.answers(data)))
    count = max(1, summary["answers"])
    figures = {
        **read_training(run),
        "slots": summary["slots"] / count,
        "text_tokens": (summary["tokens"] - summary["slots"]) / count,
    }
    groups = {name: summary[figure] for name, figure in GROUPS.items() if figure in summary}
    return Answers(read_rights(run.answers(data), summary["limit"], summary["samples"]), groups, figures)


def read_interventions(runs: Iterable[StudyRun], data: str) -> dict[Condition, dict[int, Answers]]:
    """Return the answers of finished runs with other slots on some data, by condition and seed."""
    found: dict[Condition, dict[int, Answers]] = defaultdict(dict)
    for run in runs:
        if not run.variant.slots:
            continue
        summary = read_object(run.slots_summary(data))
        for row in summary["rows"]:
            condition = Condition(row["name"], row["replaced"])
            if condition.name in run.variant.slots:
                rights = read_rights(condition_file(run.answers(data), condition, Chosen()), summary["limit"], 1)
                found[condition][run.seed] = Answers(rights, row["groups"])
    return found


def read_rights(path: Path, limit: int, samples: int) -> Rights:
    """Return the share of right answers to each question, of those that an evaluation's limits count."""
    rights: dict[int, list[bool]] = defaultdict(list)
    for line in read_lines(path, limit or COUNT_LIMIT):
        if not line["form"] and line["sample"] < samples:
            rights[line["number"]].append(line["right"])
    return {number: fmean(values) for number, values in rights.items()}


def row_of(name: str, by_seed: BySeed, base: BySeed | None) -> dict[str, Any]:
    """Return the row of some answers by seed; `base` are those that they are compared with.

    Accuracies, groups and figures are means over the seeds, `spread` is the standard deviation of the accuracy. The
    difference is that of the questions' means over the seeds that both have, and its interval is over questions.
    """
    accuracies = [fmean(answers.rights.values()) for _, answers in sorted(by_seed.items())]
    row: dict[str, Any] = {
        "name": name,
        "seeds": sorted(by_seed),
        "accuracy": fmean(accuracies) if accuracies else None,
        "accuracies": accuracies,
        "spread": stdev(accuracies) if len(accuracies) > 1 else None,
        "groups": _means([answers.groups for answers in by_seed.values()]),
        "difference": None,
        "interval": None,
        "p": None,
        "shared_seeds": [],
        **_means([answers.figures for answers in by_seed.values()]),
    }
    seeds = sorted(by_seed.keys() & base.keys()) if base else []
    own, other = (mean_rights(answers, seeds) for answers in (base or {}, by_seed))
    numbers = sorted(own.keys() & other.keys())
    if numbers:
        paired = compare([own[number] for number in numbers], [other[number] for number in numbers])
        row |= {"difference": paired.difference, "interval": list(paired.interval), "p": paired.p}
        row |= {"shared_seeds": seeds}
    return row


def mean_rights(by_seed: BySeed, seeds: Sequence[int]) -> Rights:
    """Return each question's mean over some seeds, for the questions that all of them have."""
    rights = [by_seed[seed].rights for seed in seeds]
    shared = set.intersection(*map(set, rights)) if rights else set()
    return {number: fmean(values[number] for values in rights) for number in shared}


def _means(parts: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of each value over the parts that have it."""
    values: dict[str, list[float]] = {name: [] for part in parts for name in part}
    for part in parts:
        for name, value in part.items():
            if value is not None:
                values[name].append(value)
    return {name: fmean(found) if found else None for name, found in values.items()}


def lead_shares(own: BySeed, swapped: BySeed, others: Mapping[str, BySeed]) -> dict[str, dict[str, Any]]:
    """Return the share of the base's lead over each variant that swapped inputs take away.

    It is (own - swapped) / (own - variant), of mean accuracies over the seeds that all three have. Variants without
    such a seed, or over which there is no lead, are absent.
    """
    shares = {}
    for name, other in others.items():
        seeds = sorted(own.keys() & swapped.keys() & other.keys())
        if not seeds:
            continue
        accuracies = [
            fmean(fmean(answers[seed].rights.values()) for seed in seeds) for answers in (own, swapped, other)
        ]
        lead, lost = accuracies[0] - accuracies[2], accuracies[0] - accuracies[1]
        if lead > 0:
            shares[name] = {"lead": lead, "lost": lost, "share": lost / lead, "seeds": seeds}
    return shares
