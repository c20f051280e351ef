"""The training run: the stages of the config in order, each resumable, evaluated at its end."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree
from rich.console import Console

from ilvr_jax.checkpoints.manager import (
    PRETRAINED,
    Checkpoints,
    DamagedCheckpoint,
    answer_tokens,
    build_model,
    abstract_params,
    part_dtypes,
    stage_folder,
    stages_with_checkpoints,
)
from ilvr_jax.checkpoints.pretrained import Pretrained, keep_description, load_params, open_init_from
from ilvr_jax.config.experiments import config_errors, evaluation_file
from ilvr_jax.config.schema import AUTO, RunConfig, StageConfig
from ilvr_jax.config.workdir import check_resumable, has_begun, is_checkpoint, read_config, write_config
from ilvr_jax.data.frozen_lake.source import NoMap
from ilvr_jax.data.ilvr import IlvrSource
from ilvr_jax.data.pipeline import Source, fingerprint, is_place, skipped_records
from ilvr_jax.data.records import BadRecord
from ilvr_jax.data.sources import make_tokenizer, open_source
from ilvr_jax.data.tokenizer import load_tokenizer
from ilvr_jax.distributed import is_main, locked_workdir, wait_for_all
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.maps import (
    decode_settings,
    evaluate,
    read_answers,
    read_evaluation,
)
from ilvr_jax.files import read_object, write_json, written
from ilvr_jax.method.slots import init_params
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.sharding import check_mesh, divisor, make_mesh, on_mesh, place_rows, places
from ilvr_jax.models.tensor_files import BadCheckpoint
from ilvr_jax.reports.pictures import draw_solutions
from ilvr_jax.reports.tables import success_table
from ilvr_jax.training.batches import open_iterator, place_to_resume
from ilvr_jax.training.clock import Clock
from ilvr_jax.training.divergence import SkippedUpdates
from ilvr_jax.training.interruption import Interrupted, StopRequest, stop_request
from ilvr_jax.training.metrics import Metrics
from ilvr_jax.training.optimizer import make_optimizer
from ilvr_jax.training.progress import Progress
from ilvr_jax.training.run import Run, check_choices
from ilvr_jax.training.state import TrainState, init_train_state, abstract_train_state
from ilvr_jax.training.step import make_train_step
from ilvr_jax.training.watchdog import Watchdog

FIGURES = {  # of a finished stage
    "steps": int,
    "seconds": int | float,
    "goodput": int | float,
    "skipped_updates": int,
    "skipped_records": list,
}
UNLOGGED = ("skipped_in_row", "offending_record")  # metrics that sentences tell


@config_errors("data", NoMap)
def train(config: RunConfig, workdir: Path, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages of the config, in order, and returns the summary of the run.

    Everything is written under `workdir`: config.json, tokenizer/, checkpoints/<stage>/, metrics.jsonl,
    tensorboard/<stage>/, train.log, evaluations/<stage>.json, summary.json and solutions.png. The same call leaves
    finished stages as they are and goes on from the newest checkpoint, with the numbers of a run never stopped.

    Raises BadConfig, BadRecord, DiskFull and Diverged, NoCheckpoint if those that are there cannot be read or are of
    another model, InUse while another run writes there, and Interrupted after a signal, when all is saved.
    """
    with locked_workdir(workdir):
        return _train(config, workdir, console)


def _train(config: RunConfig, workdir: Path, console: Console | None) -> dict[str, Any]:
    check_choices(config)
    source, evaluation_source = open_source(config.data, config.seed), open_evaluation_source(config)
    config = with_steps(config, len(source), workdir)
    check_resumable(config, workdir)
    with config_errors("model", BadCheckpoint):
        pretrained = open_start(config, workdir)
    begun = has_begun(workdir)
    if begun:
        tokenizer = load_tokenizer(workdir / "tokenizer")
    else:
        tokenizer = pretrained.tokenizer if pretrained else make_tokenizer(config, source)
    described = pretrained.folder if pretrained else workdir / PRETRAINED
    model = build_model(config, described, tokenizer, pretrained and pretrained.published)
    special = answer_tokens(config, described, tokenizer, model)
    with config_errors("mesh"):
        mesh = make_mesh(vars(config.mesh))
        check_mesh(mesh, model.config)
    steps = {name: make_step(config, name, model, mesh) for name in config.stages}
    wait_for_all("the workdir is read")
    if is_main():
        write_config(config, workdir)
        if pretrained:
            base = pretrained.base(model.config, config.model.init_from)
            keep_description(pretrained, workdir / PRETRAINED, base=base)
        if not begun:
            tokenizer.save_pretrained(workdir / "tokenizer")
    with config_errors("model"), on_mesh(mesh):
        params = start_params(config, workdir, model, pretrained, mesh)
    wait_for_all("the workdir is written")
    log = workdir / "train.log" if is_main() else None
    with Progress(log, console or Console(quiet=not is_main())) as progress, on_mesh(mesh):
        for opened in (source, evaluation_source):
            for sentence in getattr(opened, "remarks", ()):
                progress.log(sentence)
        if evaluation_source is None and config.eval.data == AUTO:
            progress.log(
                f"stages are not evaluated, since data.source is {config.data.source}: set eval.data to a file of "
                "maps, or run python -m ilvr_jax.evaluate afterwards"
            )
        run = Run(config, workdir, source, evaluation_source, tokenizer, special, model, mesh, steps, progress)
        for name in config.stages:
            if is_behind(run, name):
                progress.log(f"{name}: finished earlier, and the stage after it has begun")
                continue
            params = train_stage(run, name, params)
            evaluate_stage(run, name, params)
        wait_for_all("all stages are done")
        return finish(run)


def with_steps(config: RunConfig, records: int, workdir: Path) -> RunConfig:
    """Returns the config with the steps of each stage that counts in epochs; a stage that has begun keeps its own."""
    begun = stages_with_checkpoints(workdir, list(config.stages))
    stored = read_config(workdir).stages if begun else {}

    def steps(name: str, stage: StageConfig) -> int:
        if not stage.epochs:
            return stage.steps
        return stored[name].steps if name in begun else -(-stage.epochs * records // stage.batch_size)

    stages = {name: dataclasses.replace(stage, steps=steps(name, stage)) for name, stage in config.stages.items()}
    return dataclasses.replace(config, stages=stages)


def open_start(config: RunConfig, workdir: Path) -> Pretrained | None:
    """Returns the checkpoint that the run begins from, None if there is none or the run is past its beginning."""
    if not config.model.init_from or stages_with_checkpoints(workdir, list(config.stages)[:1]):
        return None
    return open_init_from(config.model.init_from)


def start_params(
    config: RunConfig, workdir: Path, model: Qwen2_5VL, pretrained: Pretrained | None, mesh: Mesh
) -> PyTree:
    """Returns the parameters before the first stage: fresh ones, or a published checkpoint's.

    Where the first stage has a checkpoint already only their shapes are of use, and are returned.
    """
    like = abstract_params(model, config, mesh)
    if stages_with_checkpoints(workdir, list(config.stages)[:1]):
        return like
    key = jax.random.key(config.seed)
    if pretrained:
        return load_params(pretrained, model.config, part_dtypes(config), key, mesh)

    def init(key: PRNGKeyArray) -> PyTree:
        return jax.tree.map(lambda leaf, kind: leaf.astype(kind.dtype), init_params(model, key), like)

    return jax.jit(init, out_shardings=places(like))(key)


def is_behind(run: Run, name: str) -> bool:
    """Returns whether nothing of a stage is needed any more: it is finished and evaluated, and the next has begun."""
    names = list(run.config.stages)
    place = names.index(name)
    return (
        bool(stages_with_checkpoints(run.workdir, names[place + 1 : place + 2]))
        and is_checkpoint(stage_folder(run.workdir, name) / str(run.config.stages[name].steps))
        and read_summary(run.workdir, name) is not None
        and is_evaluated(run, name)
    )


def read_summary(workdir: Path, name: str) -> dict[str, Any] | None:
    """Returns the figures of a finished stage, None if their file is missing or damaged."""
    path = workdir / "stages" / f"{name}.json"
    try:
        summary = read_object(path)
    except InputError:
        return None
    return summary if all(isinstance(summary.get(key), kind) for key, kind in FIGURES.items()) else None


def train_stage(run: Run, name: str, params: PyTree) -> PyTree:
    """Trains a stage from `params`, or from its newest whole checkpoint, and returns its parameters."""
    began = time.monotonic()
    config, stage, number = run.config, run.config.stages[name], list(run.config.stages).index(name)
    optimizer, train_step = run.steps[name]
    summary, figures = run.workdir / "stages" / f"{name}.json", read_summary(run.workdir, name)
    with Checkpoints(stage_folder(run.workdir, name), config.checkpoint_keep) as checkpoints:
        first, state, place = checkpoints.latest() or 0, None, {}
        like = abstract_train_state(params, optimizer, stage, run.mesh)

        def restore(step: int) -> tuple[TrainState | PyTree, dict[str, Any]]:
            if step == stage.steps and figures:
                return checkpoints.restore_params(step, params), {}
            place = checkpoints.restore_place(step)
            if not is_place(place):
                raise DamagedCheckpoint(f"the checkpoint {checkpoints.folder / str(step)} is damaged (data)")
            return checkpoints.restore(step, like), place

        if first:
            first, (state, place) = checkpoints.restore_newest(restore, run.progress.log, set_aside=True)
        if first == stage.steps:
            run.progress.log(f"{name}: finished earlier, after {first} steps")
            if figures:
                return state
        else:
            if first:
                place = place_to_resume(run, name, first, place)
                run.progress.log(f"{name}: resumes after step {first}")
            # What is said of the stage in these files was of other parameters.
            for stale in (summary, *(run.workdir / "evaluations").glob(f"{name}.*")):
                if is_main():
                    stale.unlink(missing_ok=True)
        if state is None:
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            state = init_train_state(params, optimizer, stage, key, run.mesh)
        del params  # the step gives their buffers away
        with (
            contextlib.closing(open_iterator(run, name, config.seed + number, state.params["vision"])) as iterator,
            Metrics(run.workdir, name, first, is_main()) as metrics,
            run.progress.stage(name, first, stage.steps),
            # Processes must stop at the same step: of several, jax tells each of a SIGTERM that came to one.
            stop_request() if jax.process_count() == 1 else contextlib.nullcontext(StopRequest()) as stop,
            Watchdog(name, run.progress.log) as watchdog,
        ):
            if first:
                iterator.set_state(place)
            clock = Clock(stage.batch_size, first, metrics.seconds_before, metrics.seconds_in_steps_before, began)
            skips = SkippedUpdates(name, config.max_skipped, checkpoints.folder, run.progress.log)
            values, step, stopping = {}, first, False
            for step in range(first + 1, stage.steps + 1):
                watchdog.step_begins(step)
                with clock.waiting_for_data(values):
                    batch = place_rows(next(iterator), run.mesh, stage.batch_size)
                watchdog.runs(batch.layout)
                with clock.setting_compilation_apart(train_step):
                    before, (state, values) = values, train_step(state, batch)
                jax.block_until_ready(before)  # one step ahead of the device at most, so that Ctrl-C acts soon
                skips.look(step - 1, before)
                run.progress.advance()
                last = step == stage.steps
                stopping = stop.signal_number is not None or checkpoints.preempted(step)
                log = step % config.log_every == 0 or last
                save = step % config.checkpoint_every == 0 or last or stopping
                if log or save:
                    skips.look(step, values)
                watchdog.step_ends()
                if log:
                    losses = {key: value.item() for key, value in jax.device_get(values).items() if key not in UNLOGGED}
                    speed = clock.lap(step)
                    metrics.write(step, {**losses, **speed})
                    run.progress.report(losses, speed["samples_per_second"], clock.seconds_left(stage.steps))
                if save:
                    with clock.saving():
                        checkpoints.save(step, state, iterator)
                if stopping:
                    break
            checkpoints.wait()
            if step == stage.steps and is_main():
                write_json(
                    summary,
                    {
                        "steps": stage.steps,
                        "seconds": round(clock.seconds, 1),
                        "goodput": round(clock.goodput, 3),
                        "skipped_updates": int(state.skipped),
                        "compilations": train_step._cache_size(),
                        "compilation_seconds": round(clock.compilation_seconds, 1),
                        "skipped_records": skipped_records(iterator),
                    },
                )
        if stopping:
            raise Interrupted(
                f"stopped in {name} after step {step} of {stage.steps}, saved in {checkpoints.folder}; the same "
                "command resumes from there",
                stop.signal_number or signal.SIGTERM,
            )
    return state.params


def make_step(
    config: RunConfig, name: str, model: Qwen2_5VL, mesh: Mesh
) -> tuple[optax.GradientTransformation, Callable]:
    """Returns a stage's optimizer and jitted train step."""
    stage = config.stages[name]
    with config_errors(name):
        optimizer = make_optimizer(stage)
        train_step = make_train_step(model, stage, config.latents, optimizer, divisor("rows", mesh))
    return optimizer, train_step


def open_evaluation_source(config: RunConfig) -> Source | None:
    """Returns the records that stages are evaluated on, None if there are none.

    Raises BadRecord for a record without a map.
    """
    with config_errors("eval"):
        decode_settings(config)
    path = evaluation_file(config)
    if path is None:
        return None
    source = IlvrSource(path, for_evaluation=True, follow_links=config.data.follow_links)
    for record in map(source.__getitem__, range(len(source))):
        if record.map_desc is None:
            raise BadRecord(
                f"{record.name}: must have a map_desc, since records of `eval.data` are played as maps; set eval.data "
                "to nothing and evaluate other tasks after training, with python -m ilvr_jax.evaluate"
            )
    return source


def evaluate_stage(run: Run, name: str, params: PyTree) -> None:
    """Writes evaluations/<stage>.json and the answers beside it, unless it was done before with the same settings."""
    if is_evaluated(run, name):
        return
    path = run.workdir / "evaluations" / f"{name}.json"
    run.progress.log(f"{name}: evaluating on {len(run.evaluation_source)} maps of {evaluation_file(run.config)}")
    evaluation = evaluate(
        run.config, run.evaluation_source, run.model, params, run.tokenizer, run.special, run.progress.console, run.mesh
    )
    if is_main():
        evaluation.write(path)
        write_json(path.with_suffix(".settings.json"), evaluation_settings(run, name))
    summary = evaluation.summary()
    run.progress.log(
        f"{name}: success {summary['success_rate']:.3f}, decoded {summary['latent_segments']} latent segments with "
        f"{summary['latent_slots']} slots, in {summary['seconds']:.0f} s"
    )


def is_evaluated(run: Run, name: str) -> bool:
    """Returns whether a stage's evaluation is written, whole, with these settings; True if there is none to be made."""
    if run.evaluation_source is None:
        return True
    path = run.workdir / "evaluations" / f"{name}.json"
    try:
        done = read_object(path.with_suffix(".settings.json"))
    except InputError:
        return False
    return done == evaluation_settings(run, name) and read_evaluation(path, run.evaluation_source) is not None


def evaluation_settings(run: Run, name: str) -> dict[str, Any]:
    """Returns what a stage's evaluation follows from: `eval`, the fingerprint of its records and the stage's steps."""
    follows = {"records": fingerprint(run.evaluation_source), "step": run.config.stages[name].steps}
    return vars(run.config.eval) | follows


def finish(run: Run) -> dict[str, Any]:
    """Prints the table of success by stage, draws the picture, and returns the summary, written to summary.json."""
    stages: dict[str, Any] = {}
    for name in run.config.stages:
        stages[name] = read_summary(run.workdir, name) or {"steps": run.config.stages[name].steps}
        if run.evaluation_source is not None:
            stages[name]["evaluation"] = read_object(run.workdir / "evaluations" / f"{name}.json")
    evaluations = {name: stage["evaluation"] for name, stage in stages.items() if "evaluation" in stage}
    if evaluations:
        run.progress.console.print(success_table(evaluations))
        last = run.workdir / "evaluations" / f"{list(evaluations)[-1]}.json"
        if is_main():
            with written(run.workdir / "solutions.png") as unfinished:
                draw_solutions(read_answers(last), unfinished)
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
