"""The results of a run: stages/<stage>.json, summary.json, solutions.png and the table of evaluations."""

from pathlib import Path
from typing import Any

import grain
import jax

from ilvr_jax.data.pipeline import skipped_records
from ilvr_jax.distributed import is_main
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.evaluator import summary_file
from ilvr_jax.files import read_object, write_json, written
from ilvr_jax.reports.pictures import draw_solutions, read_solutions
from ilvr_jax.reports.tables import accuracy_table, success_table
from ilvr_jax.training.clock import Clock
from ilvr_jax.training.evaluations import stage_answers, stage_results
from ilvr_jax.training.run import Run
from ilvr_jax.training.state import TrainState

MAPS = "vsp_planning"  # the task whose answers are drawn
FIELDS = {  # of a stage's summary that is read again
    "steps": int,
    "seconds": int | float,
    "goodput": int | float,
    "skipped_updates": int,
    "skipped_records": list,
}


def stage_summary_file(workdir: Path, name: str) -> Path:
    """Return the path of a stage's summary."""
    return workdir / "stages" / f"{name}.json"


def read_stage_summary(workdir: Path, name: str) -> dict[str, Any] | None:
    """Return the summary of a finished stage, None if its file is missing or damaged."""
    try:
        summary = read_object(stage_summary_file(workdir, name))
    except InputError:
        return None
    return summary if all(isinstance(summary.get(key), kind) for key, kind in FIELDS.items()) else None


def write_stage_summary(run: Run, name: str, state: TrainState, clock: Clock, iterator: grain.DatasetIterator) -> None:
    """Write the summary of a finished stage."""
    summary = {
        "steps": run.config.stages[name].steps,
        "seconds": round(clock.seconds, 1),
        "goodput": round(clock.goodput, 3),
        "skipped_updates": int(state.skipped),
        "compilations": run.steps[name][1]._cache_size(),
        "compilation_seconds": round(clock.compilation_seconds, 1),
        "skipped_records": skipped_records(iterator),
    }
    write_json(stage_summary_file(run.workdir, name), summary)


def finish(run: Run) -> dict[str, Any]:
    """Print the table of evaluations by stage, draw the picture of maps, and return the summary of the run.

    The summary is written to summary.json, the picture to solutions.png.
    """
    stages: dict[str, Any] = {}
    for name in run.config.stages:
        stages[name] = read_stage_summary(run.workdir, name) or {"steps": run.config.stages[name].steps}
        if run.evaluation_records is not None:
            stages[name]["evaluation"] = read_object(summary_file(stage_results(run, name)))
    if run.evaluation_records is not None:
        evaluations = {name: stage["evaluation"] for name, stage in stages.items()}
        is_maps = run.config.eval.task == MAPS
        run.progress.console.print((success_table if is_maps else accuracy_table)(evaluations))
        if is_maps and is_main():
            solutions = read_solutions(run.evaluation_records.source, stage_answers(run, list(stages)[-1]))
            with written(run.workdir / "solutions.png") as unfinished:
                draw_solutions(solutions, unfinished)
    summary = {
        "workdir": str(run.workdir),
        "device": jax.devices()[0].device_kind,
        "skipped_records": len({number for stage in stages.values() for number in stage.get("skipped_records", ())}),
        "skipped_lines": list(getattr(run.source, "skipped", ())),
        "stages": stages,
    }
    if is_main():
        write_json(run.workdir / "summary.json", summary)
    return summary
