"""The results of a study in its workdir: results.json, index.html, accuracy.png and accuracy.svg.

A study with more data has a plot for each, such as accuracy-real.png.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ilvr_jax.errors import InputError
from ilvr_jax.files import read_object, write_json
from ilvr_jax.reports.study import draw_study, write_study_page
from ilvr_jax.studies import Study
from ilvr_jax.studies.comparison import compare_variants
from ilvr_jax.studies.runs import OWN_DATA, StudyRun, read_seconds, remaining_commands


@dataclasses.dataclass
class StudyResults:
    """The runs of a study and their results.

    Attributes:
        study: the entry of STUDIES.
        settings: those in study.json.
        workdir: of the study.
        runs: of all variants and seeds that the workdir may hold.
        failed: the error of each run that failed, by its name, in earlier calls as well.
        comparisons: the rows and the leads of `compare_variants`, by the name of the data, after `write`.
    """

    study: Study
    settings: Mapping[str, Any]
    workdir: Path
    runs: Sequence[StudyRun]
    failed: dict[str, str]
    comparisons: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.failed = {**_failed_earlier(self.workdir / "results.json"), **self.failed}

    def finished(self) -> list[StudyRun]:
        """Return the runs that are complete."""
        return [run for run in self.runs if not remaining_commands(run)]

    def write(self) -> None:
        """Compare the finished runs and write all files; raise as `write_text` does."""
        name, finished = self.settings["study"], self.finished()
        for run in finished:
            self.failed.pop(run.key, None)
        self.comparisons = {
            data: compare_variants(self.study, finished, self.failed, data)
            for data in (OWN_DATA, *self.study.more_data)
        }
        about = {key: self.settings[key] for key in ("study", "config", "quick")}
        own, more = self.comparisons[OWN_DATA], {data: self.comparisons[data] for data in self.study.more_data}
        write_json(self.workdir / "results.json", {**about, **own, "more_data": more, "failed": self.failed})
        for path, data in self.plots().items():
            draw_study(self.comparisons[data]["rows"], self.study.base, path)
        shown = [row["name"] for row in own["rows"]]
        meanings = {key: variant.meaning for key, variant in self.study.variants.items() if key in shown}
        quick = ", a quick test whose figures mean nothing" * self.settings["quick"]
        remark = f"Variants of {self.settings['config']}, trained with several seeds{quick}."
        page = self.workdir / "index.html"
        write_study_page(page, self.comparisons, f"Study {name}", remark, self.study.base, meanings, self.failed)

    def plots(self) -> dict[Path, str]:
        """Return the files of the plots with the name of their data; none before a run is finished."""
        return {
            self.workdir / f"accuracy{data and f'-{data}'}.{kind}": data
            for data, comparison in self.comparisons.items()
            for kind in ("png", "svg")
            if any(row["seeds"] for row in comparison["rows"])
        }

    def time_left(self, left: Sequence[StudyRun]) -> str:
        """Return a sentence about the time that runs take."""
        if not left:
            return "no runs are left"
        seconds: dict[str, list[float]] = defaultdict(list)
        for run in self.finished():
            seconds[run.name].append(read_seconds(run))
        count = f"{len(left)} {'run is' if len(left) == 1 else 'runs are'} left"
        if self.settings["quick"] and not seconds:
            return f"{count}; the time that they take is unknown until one is finished"
        minutes = estimate_seconds([run.name for run in left], seconds, self.study.minutes) / 60
        time = f"{max(1, round(minutes))} min" if minutes < 100 else f"{minutes / 60:.1f} h"
        return f"{count}, about {time}" + f" ({self.study.minutes:g} minutes per run on 2 cores)" * (not seconds)


def estimate_seconds(left: Sequence[str], finished: Mapping[str, Sequence[float]], minutes: float) -> float:
    """Return the seconds that runs of these variants take.

    It is the mean of the `finished` runs' seconds of the same variant, else of all; before one is finished, so many
    `minutes` each.
    """
    everything = [value for values in finished.values() for value in values]
    usual = fmean(everything) if everything else 60 * minutes
    return sum(fmean(finished[name]) if finished.get(name) else usual for name in left)


def _failed_earlier(path: Path) -> dict[str, str]:
    """Return the failed runs in an earlier results.json, none without a file that can be read."""
    try:
        return {str(key): str(error) for key, error in dict(read_object(path)["failed"]).items()}
    except (InputError, LookupError, TypeError, ValueError):
        return {}
