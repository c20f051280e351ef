"""The evaluations of a run: after each stage and inside it, with the files of `python -m ilvr_jax.evaluate`."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree
from rich.console import Console

from ilvr_jax.checkpoints.trained import TrainedModel
from ilvr_jax.data.sources import prompt_settings
from ilvr_jax.distributed import is_main, open_exchange
from ilvr_jax.evaluation.evaluator import Evaluator, read_summary, results_file, run_evaluation
from ilvr_jax.evaluation.results import read_lines
from ilvr_jax.training.hooks import StepState
from ilvr_jax.training.run import Run


def make_evaluator(run: Run, stage: str, step: int, params: PyTree | None) -> Evaluator:
    """Return the evaluator of a stage's parameters after a step; without them it asks nothing."""
    config = run.config
    prompts = prompt_settings(config, run.model.geometry)
    trained = TrainedModel(
        run.model,
        params,
        run.tokenizer,
        run.special,
        prompts,
        True,
        config,
        stage,
        step,
    )
    return Evaluator(
        trained,
        config.eval.task,
        run.evaluation_records,
        {
            "method": "latent",
            **trained.look_fields,
            "sampling": config.eval.sampling,
        },
        samples=config.eval.n,
        rows=config.eval.batch_size,
        limit=config.eval.limit,
        seed=config.seed,
    )


def evaluate_stage(run: Run, stage: str, params: PyTree) -> None:
    """Evaluate the parameters of a finished stage, unless that is complete."""
    if not is_evaluated(run, stage):
        evaluate(run, stage, run.config.stages[stage].steps, params, run.progress.console)


def evaluate_step(now: StepState, is_stopped: Callable[[], bool]) -> None:
    """Evaluate the parameters after a step inside a stage; those after the last are left to `evaluate_stage`."""
    if now.step < now.steps and not now.stopping:
        # A console shows one bar at a time, and has that of the stage.
        evaluate(now.run, now.stage, now.step, now.train_state.params, Console(quiet=True), is_stopped)


def evaluate(
    run: Run, stage: str, step: int, params: PyTree, console: Console, is_stopped: Callable[[], bool] = lambda: False
) -> None:
    """Complete the evaluation of a stage's parameters after a step, and log its figures.

    Answers in its file that other parameters gave, or to other records, are replaced.
    """
    evaluator, path = make_evaluator(run, stage, step, params), stage_results(run, stage, step)
    run.progress.log(f"{stage}, step {step}: evaluating on {evaluator.records.name}")
    summary = run_evaluation(evaluator, path, console, is_stopped, replace=True)
    if not is_stopped():
        run.progress.log(
            f"{stage}, step {step}: accuracy {summary.get('accuracy', math.nan):.3f} on {summary['questions']} "
            f"questions, with {summary['looks']} looks and {summary['slots']} slots, in {summary['seconds']:.0f} s"
        )


def is_evaluated(run: Run, stage: str) -> bool:
    """Return whether the evaluation after a stage is complete, with these settings; True if nothing is evaluated.

    Several processes decide alike, since the main one reads the files.
    """
    return run.evaluation_records is None or open_exchange()(is_main() and stage_summary(run, stage) is not None)[0]


def stage_summary(run: Run, stage: str) -> dict[str, Any] | None:
    """Return the summary of the evaluation after a stage, None unless that is complete."""
    steps = run.config.stages[stage].steps
    return read_summary(make_evaluator(run, stage, steps, None), stage_results(run, stage, steps))


def stage_answers(run: Run, stage: str) -> list[Mapping[str, Any]]:
    """Return the lines of the evaluation after a stage."""
    evaluator = make_evaluator(run, stage, run.config.stages[stage].steps, None)
    return evaluator.counted(read_lines(stage_results(run, stage), len(evaluator.source)))


def stage_results(run: Run, stage: str, step: int | None = None) -> Path:
    """Return the results file of a stage after a step, by default its last."""
    return results_file(run.workdir, run.config, stage, step or run.config.stages[stage].steps, run.config.eval.task)
