"""The set-up of a run: its sources, tokenizer, model, mesh, train steps and first parameters."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from ilvr_jax.checkpoints.pretrained import Pretrained, keep_description, open_init_from
from ilvr_jax.checkpoints.runs import (
    PRETRAINED,
    abstract_params,
    answer_tokens,
    build_run_model,
    part_dtypes,
    stages_with_checkpoints,
)
from ilvr_jax.checkpoints.weights import load_params
from ilvr_jax.config.experiments import config_errors
from ilvr_jax.config.schema import AUTO, RunConfig, StageConfig
from ilvr_jax.config.workdir import check_resumable, has_begun, read_config, write_config
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.sources import make_tokenizer, open_parts
from ilvr_jax.data.tokenizer import load_tokenizer
from ilvr_jax.distributed import is_main, wait_for_all
from ilvr_jax.evaluation.records import EvaluationRecords, check_records, open_records
from ilvr_jax.method import slots
from ilvr_jax.models.base import Model
from ilvr_jax.models.sharding import check_mesh, divisor, make_mesh, on_mesh, places
from ilvr_jax.models.tensor_files import BadCheckpoint
from ilvr_jax.progress import Progress
from ilvr_jax.training.optimizer import make_optimizer
from ilvr_jax.training.run import Run, check_choices
from ilvr_jax.training.step import make_train_step


@contextlib.contextmanager
def open_run(config: RunConfig, workdir: Path, console: Console | None) -> Iterator[tuple[Run, PyTree]]:
    """Set up a run and yield it with the parameters before its first stage, on its mesh; raises as `loop.train` does.

    Whatever does not fit is raised before anything is written into the workdir.
    """
    check_choices(config)
    source, held_out = open_parts(config)
    evaluation_records = open_evaluation_records(config, held_out)
    config = with_steps(config, len(source), workdir)
    check_resumable(config, workdir)
    with config_errors("model", BadCheckpoint):
        pretrained = None
        if config.model.init_from and not first_stage_has_checkpoint(config, workdir):
            pretrained = open_init_from(config.model.init_from)
    if has_begun(workdir):
        tokenizer = load_tokenizer(workdir / "tokenizer")
    else:
        tokenizer = pretrained.tokenizer if pretrained else make_tokenizer(config, source)
    description = pretrained.folder if pretrained else workdir / PRETRAINED
    model = build_run_model(config, description, tokenizer, pretrained and pretrained.hf_config)
    special = answer_tokens(config, description, tokenizer, model)
    with config_errors("mesh"):
        mesh = make_mesh(vars(config.mesh))
        check_mesh(mesh, model.config)
    steps = {name: make_step(config, name, model, mesh) for name in config.stages}
    wait_for_all("the workdir is read")
    if is_main():
        write_descriptions(config, workdir, model, tokenizer, pretrained)
    with config_errors("model"), on_mesh(mesh):
        params = init_params(config, workdir, model, pretrained, mesh)
    wait_for_all("the workdir is written")
    log = workdir / "train.log" if is_main() else None
    with Progress(log, console or Console(quiet=not is_main())) as progress, on_mesh(mesh):
        run = Run(config, workdir, source, evaluation_records, tokenizer, special, model, mesh, steps, progress)
        log_remarks(run)
        yield run, params


def write_descriptions(
    config: RunConfig,
    workdir: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    pretrained: Pretrained | None,
) -> None:
    """Write what describes a run into its workdir: config.json, the pretrained checkpoint's files, the tokenizer."""
    begun = has_begun(workdir)
    write_config(config, workdir)
    if pretrained:
        base = pretrained.base(model.config, config.model.init_from)
        keep_description(pretrained, workdir / PRETRAINED, base=base)
    if not begun:
        tokenizer.save_pretrained(workdir / "tokenizer")


def log_remarks(run: Run) -> None:
    """Log the remarks of the run's sources, and that stages are not evaluated if `eval.data` found no maps."""
    for source in (run.source, run.evaluation_records and run.evaluation_records.source):
        for sentence in getattr(source, "remarks", ()):
            run.progress.log(sentence)
    if run.evaluation_records is None and run.config.eval.data == AUTO:
        run.progress.log(
            f"stages are not evaluated, since data.source is {run.config.data.source}: set eval.task, and eval.data to "
            "a file of its records or eval.fraction to a share of the training records"
        )


def first_stage_has_checkpoint(config: RunConfig, workdir: Path) -> bool:
    """Return whether the run is past its beginning, so that its parameters are restored."""
    return bool(stages_with_checkpoints(workdir, list(config.stages)[:1]))


def with_steps(config: RunConfig, records: int, workdir: Path) -> RunConfig:
    """Return the config with the steps of each stage that counts in epochs; a stage that has begun keeps its own."""
    begun = stages_with_checkpoints(workdir, list(config.stages))
    stored = read_config(workdir).stages if begun else {}

    def steps(name: str, stage: StageConfig) -> int:
        if not stage.epochs:
            return stage.steps
        return stored[name].steps if name in begun else -(-stage.epochs * records // stage.batch_size)

    stages = {name: dataclasses.replace(stage, steps=steps(name, stage)) for name, stage in config.stages.items()}
    return dataclasses.replace(config, stages=stages)


def open_evaluation_records(config: RunConfig, held_out: Source | None) -> EvaluationRecords | None:
    """Return the records to evaluate on, checked, None without any; raises BadConfig for what does not fit."""
    records = open_records(config, held_out)
    if records is not None:
        check_records(config, records)
    return records


def make_step(config: RunConfig, name: str, model: Model, mesh: Mesh) -> tuple[optax.GradientTransformation, Callable]:
    """Return a stage's optimizer and jitted train step."""
    stage = config.stages[name]
    with config_errors(name):
        optimizer = make_optimizer(stage)
        train_step = make_train_step(model, stage, config.latents, optimizer, divisor("rows", mesh))
    return optimizer, train_step


def init_params(config: RunConfig, workdir: Path, model: Model, pretrained: Pretrained | None, mesh: Mesh) -> PyTree:
    """Return the parameters before the first stage: fresh ones, or those of a published checkpoint.

    If the first stage has a checkpoint, only their shapes are needed, and those are returned.
    """
    abstract = abstract_params(model, config, mesh)
    if first_stage_has_checkpoint(config, workdir):
        return abstract
    key = jax.random.key(config.seed)
    if pretrained:
        return load_params(pretrained, model.config, part_dtypes(config), key, mesh)

    def init(key: PRNGKeyArray) -> PyTree:
        return jax.tree.map(lambda leaf, kind: leaf.astype(kind.dtype), slots.init_params(model, key), abstract)

    return jax.jit(init, out_shardings=places(abstract))(key)
