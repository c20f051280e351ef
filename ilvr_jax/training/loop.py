"""The training loop: the stages of a config in order, each resumable, evaluated at its end."""

import contextlib
import functools
import signal
import time
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from rich.console import Console

from ilvr_jax.checkpoints.manager import Checkpoints, DamagedCheckpoint
from ilvr_jax.checkpoints.runs import stage_folder, stages_with_checkpoints
from ilvr_jax.config.experiments import config_errors
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.config.workdir import is_checkpoint
from ilvr_jax.data.frozen_lake.source import NoMap
from ilvr_jax.data.pipeline import is_place
from ilvr_jax.distributed import is_main, locked_workdir, wait_for_all
from ilvr_jax.evaluation.evaluator import summary_file
from ilvr_jax.models.sharding import place_rows
from ilvr_jax.training.batches import open_iterator, place_to_resume
from ilvr_jax.training.clock import Clock
from ilvr_jax.training.divergence import SkippedUpdates
from ilvr_jax.training.evaluations import evaluate_stage, evaluate_step, is_evaluated, stage_results
from ilvr_jax.training.hooks import Hook, StepState, check_update, log_metrics, save_checkpoint
from ilvr_jax.training.interruption import Interrupted, StopRequest, stop_request
from ilvr_jax.training.metrics import Metrics
from ilvr_jax.training.run import Run
from ilvr_jax.training.setup import open_run
from ilvr_jax.training.state import TrainState, abstract_train_state, init_train_state
from ilvr_jax.training.summary import finish, read_stage_summary, stage_summary_file, write_stage_summary
from ilvr_jax.training.watchdog import Watchdog


@config_errors("data", NoMap)
def train(config: RunConfig, workdir: Path, console: Console | None = None) -> dict[str, Any]:
    """Run the stages of the config, in order, and return the summary of the run.

    Everything is written under `workdir`: config.json, tokenizer/, checkpoints/<stage>/, metrics.jsonl,
    tensorboard/<stage>/, train.log, evaluations/, summary.json and solutions.png. The same call skips finished stages
    and resumes from the newest checkpoint, and gives the same numbers as an uninterrupted run.

    Raises BadConfig, BadRecord, DiskFull and Diverged, NoCheckpoint if existing checkpoints cannot be read or belong to
    another model, InUse while another run writes to the workdir, and Interrupted after a signal, once all is saved.
    """
    with locked_workdir(workdir), open_run(config, workdir, console) as (run, params):
        for name in run.config.stages:
            if is_behind(run, name):
                run.progress.log(f"{name}: finished earlier, and the next stage has begun")
                continue
            params = train_stage(run, name, params)
            evaluate_stage(run, name, params)
        wait_for_all("all stages are done")
        return finish(run)


def is_behind(run: Run, name: str) -> bool:
    """Return whether a stage is finished and evaluated and the next one has begun: nothing needs it any more."""
    names = list(run.config.stages)
    number = names.index(name)
    return (
        bool(stages_with_checkpoints(run.workdir, names[number + 1 : number + 2]))
        and is_checkpoint(stage_folder(run.workdir, name) / str(run.config.stages[name].steps))
        and read_stage_summary(run.workdir, name) is not None
        and is_evaluated(run, name)
    )


def train_stage(run: Run, name: str, params: PyTree) -> PyTree:
    """Train a stage from `params`, or from its newest whole checkpoint, and return its parameters."""
    began = time.monotonic()
    stage, number = run.config.stages[name], list(run.config.stages).index(name)
    with Checkpoints(stage_folder(run.workdir, name), run.config.checkpoint_keep) as checkpoints:
        first, state, place = restore_stage(run, name, params, checkpoints)
        if first == stage.steps:
            run.progress.log(f"{name}: finished earlier, after {first} steps")
            if not isinstance(state, TrainState):
                return state
        else:
            if first:
                place = place_to_resume(run, name, first, place)
                run.progress.log(f"{name}: resuming from step {first}")
            delete_results(run, name)
        if state is None:
            key = jax.random.fold_in(jax.random.key(run.config.seed), number)
            state = init_train_state(params, run.steps[name][0], stage, key, run.mesh)
        del params  # their buffers are donated
        return run_steps(run, name, first, state, place, checkpoints, began).params


def restore_stage(
    run: Run, name: str, params: PyTree, checkpoints: Checkpoints
) -> tuple[int, TrainState | PyTree | None, dict[str, Any]]:
    """Return the step of a stage's newest whole checkpoint, its train state and its place in the data.

    Of a finished stage with a summary these are the parameters alone and {}; without any checkpoint 0, None and {}.
    """
    stage = run.config.stages[name]
    abstract_state = abstract_train_state(params, run.steps[name][0], stage, run.mesh)
    has_summary = read_stage_summary(run.workdir, name) is not None

    def restore(step: int) -> tuple[TrainState | PyTree, dict[str, Any]]:
        if step == stage.steps and has_summary:
            return checkpoints.restore_params(step, params), {}
        place = checkpoints.restore_place(step)
        if not is_place(place):
            raise DamagedCheckpoint(f"the checkpoint {checkpoints.folder / str(step)} is damaged (data)")
        return checkpoints.restore(step, abstract_state), place

    if not checkpoints.latest():
        return 0, None, {}
    step, (state, place) = checkpoints.restore_newest(restore, run.progress.log, set_aside=True)
    return step, state, place


def delete_results(run: Run, name: str) -> None:
    """Delete the summary of a stage that is to be trained and its last evaluation's: both are of other parameters."""
    if is_main():
        for path in (stage_summary_file(run.workdir, name), summary_file(stage_results(run, name))):
            path.unlink(missing_ok=True)


def run_steps(
    run: Run,
    name: str,
    first: int,
    state: TrainState,
    place: dict[str, Any],
    checkpoints: Checkpoints,
    began: float,
) -> TrainState:
    """Run the steps of a stage after step `first` and return the last train state; see `hooks` for the rest.

    `place` is where its batches resume, `began` the monotonic time of its start. Raises Interrupted after a signal.
    """
    config, stage, train_step = run.config, run.config.stages[name], run.steps[name][1]
    seed = config.seed + list(config.stages).index(name)
    with (
        contextlib.closing(open_iterator(run, name, seed, state.params["vision"])) as iterator,
        Metrics(run.workdir, name, first, is_main()) as metrics,
        run.progress.stage(name, first, stage.steps),
        # Processes must stop at the same step: of several, jax notifies each of a SIGTERM that came to one.
        stop_request() if jax.process_count() == 1 else contextlib.nullcontext(StopRequest()) as stop,
        Watchdog(name, run.progress.log) as watchdog,
    ):
        if first:
            iterator.set_state(place)
        clock = Clock(stage.batch_size, first, metrics.seconds_before, metrics.seconds_in_steps_before, began)
        updates = SkippedUpdates(name, config.max_skipped, checkpoints.folder, run.progress.log)
        check = functools.partial(check_update, updates=updates)
        save = functools.partial(save_checkpoint, checkpoints=checkpoints, iterator=iterator, clock=clock)
        hooks = [
            Hook("check the step before", 1, lambda now: updates.check(now.step - 1, now.previous_metrics)),
            Hook("check before logging", config.log_every, check),
            Hook("check before saving", config.checkpoint_every, check, on_stop=True),
            Hook("watchdog", 1, lambda now: watchdog.end_step()),
            Hook("log", config.log_every, functools.partial(log_metrics, metrics=metrics, clock=clock)),
            Hook("save", config.checkpoint_every, save, on_stop=True),
        ]
        if run.evaluation_records is not None and config.eval.every:

            def evaluate(now: StepState) -> None:
                with clock.evaluating():
                    evaluate_step(now, is_stopped=lambda: stop.signal_number is not None)

            # Saved first, so that an evaluation that is stopped or killed is completed when the run resumes.
            check_first = Hook("check before evaluating", config.eval.every, check)
            hooks += [check_first, Hook("save", config.eval.every, save), Hook("evaluate", config.eval.every, evaluate)]
            if first and first % config.eval.every == 0:
                evaluate(StepState(run, name, first, stage.steps, state, {}, {}, stopping=False))
        step, values, stopping = first, {}, stop.signal_number is not None
        for step in range(first + 1, first + 1 if stopping else stage.steps + 1):
            watchdog.start_step(step)
            with clock.waiting_for_data(values):
                batch = place_rows(next(iterator), run.mesh, stage.batch_size)
            watchdog.start_program(batch.layout)
            with clock.excluding_compilation(train_step):
                previous, (state, values) = values, train_step(state, batch)
            jax.block_until_ready(previous)  # one step ahead of the device at most, so that Ctrl-C acts soon
            run.progress.advance()
            stopping = stop.signal_number is not None or checkpoints.preempted(step)
            now = StepState(run, name, step, stage.steps, state, values, previous, stopping)
            for hook in hooks:
                if hook.is_due(now):
                    hook.run(now)
            if not stopping and stop.signal_number is not None:  # it came during a hook
                stopping = True
                check(now)
                save(now)
            if stopping:
                break
        checkpoints.wait()
        if step == stage.steps and is_main():
            write_stage_summary(run, name, state, clock, iterator)
    if stopping:
        raise Interrupted(
            f"stopped in {name} after step {step} of {stage.steps}, saved in {checkpoints.folder}; the same command "
            "resumes from there",
            stop.signal_number or signal.SIGTERM,
        )
    return state
