"""The checkpoints of runs, opened for use: their stages, models, tokenizers and parameters."""

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
from transformers import PreTrainedTokenizerFast

from ilvr_jax import models
from ilvr_jax.checkpoints.manager import Checkpoints, NoCheckpoint
from ilvr_jax.checkpoints.pretrained import read_published
from ilvr_jax.checkpoints.stop_tokens import read_stop_tokens
from ilvr_jax.config.experiments import config_errors
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.config.workdir import is_checkpoint, read_config
from ilvr_jax.data.tokenizer import load_tokenizer, special_tokens
from ilvr_jax.errors import quote
from ilvr_jax.method.slots import init_params
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import Model
from ilvr_jax.models.sharding import one_device, placed_like

PRETRAINED = "pretrained"  # in a workdir: the description of the checkpoint that the run began from


class RestoredRun(NamedTuple):
    """A run after a step of one of its stages."""

    step: int
    model: Model
    params: PyTree
    tokenizer: PreTrainedTokenizerFast
    special: SpecialTokens


def stage_folder(workdir: Path, stage: str) -> Path:
    """Return the folder of a stage's checkpoints."""
    return workdir / "checkpoints" / stage


def stages_with_checkpoints(workdir: Path, stages: Sequence[str]) -> list[str]:
    """Return those of the stages that have a complete checkpoint, in order."""
    folders = {stage: stage_folder(workdir, stage) for stage in stages}
    return [name for name, folder in folders.items() if any(map(is_checkpoint, folder.glob("*")))]


def restore_run(
    workdir: Path, config: RunConfig | None = None, stage: str | None = None, mesh: Mesh | None = None
) -> RestoredRun:
    """Return a run at the newest readable checkpoint of a stage, by default the last that has one.

    `config` is by default that of the workdir, the mesh one device. A damaged checkpoint is named on stderr and the one
    before it used. Raises BadConfig if the workdir is no run, NoCheckpoint if it has none that can be read, or none of
    `stage`.
    """
    config = config or read_config(workdir)
    stage = choose_stage(workdir, config, stage)
    tokenizer = load_tokenizer(workdir / "tokenizer")
    model = build_run_model(config, workdir / PRETRAINED, tokenizer)
    abstract = abstract_params(model, config, mesh or one_device())
    with Checkpoints(stage_folder(workdir, stage)) as checkpoints:
        step, params = checkpoints.restore_newest(lambda step: checkpoints.restore_params(step, abstract), _warn)
    special = answer_tokens(config, workdir / PRETRAINED, tokenizer, model)
    return RestoredRun(step, model, params, tokenizer, special)


def choose_stage(workdir: Path, config: RunConfig, stage: str | None) -> str:
    """Return `stage`, by default the last that has a checkpoint; raises NoCheckpoint if it has none."""
    stages = stages_with_checkpoints(workdir, list(config.stages))
    if not stages:
        raise NoCheckpoint(f"{workdir} has no complete checkpoint yet; train until the first is saved")
    stage = stages[-1] if stage is None else stage
    if stage not in stages:
        raise NoCheckpoint(f"{workdir} has no checkpoint of stage {quote(stage)}, it has {', '.join(stages)}")
    return stage


def restore_teacher(workdir: Path, config: RunConfig, stage: str | None = None) -> PyTree:
    """Return the parts that the teacher of a stage has of its own; raises NoCheckpoint if the stage has no teacher."""
    stage = choose_stage(workdir, config, stage)
    with Checkpoints(stage_folder(workdir, stage)) as checkpoints:
        _, teacher = checkpoints.restore_newest(checkpoints.restore_teacher, _warn)
    if teacher is None:
        raise NoCheckpoint(f"stage {stage!r} of {workdir} has no teacher; a stage of objective alignment has one")
    return teacher


def build_run_model(
    config: RunConfig, folder: Path, tokenizer: PreTrainedTokenizerFast, hf_config: Mapping | None = None
) -> Model:
    """Return the model of a run, of the shape in its config or of the checkpoint that it begins from.

    `hf_config` describes that checkpoint, by default the config.json in `folder`.
    """
    if config.model.init_from and hf_config is None:
        hf_config = read_published(folder)
    with config_errors("model"):
        return models.build_model(config.model, len(tokenizer), hf_config)


def answer_tokens(config: RunConfig, folder: Path, tokenizer: PreTrainedTokenizerFast, model: Model) -> SpecialTokens:
    """Return the special tokens of a run, with the stop tokens of the checkpoint in `folder` that it begins from.

    Raises BadCheckpoint as `read_stop_tokens` does.
    """
    stop = read_stop_tokens(folder, tokenizer, model.config.vocab_size) if config.model.init_from else ()
    return special_tokens(tokenizer, stop)


def abstract_params(model: Model, config: RunConfig, mesh: Mesh) -> PyTree:
    """Return shapes, dtypes and shardings of a run's parameters, each part in its dtype of `part_dtypes`."""
    dtypes = part_dtypes(config)

    def cast(part: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtypes[part])

    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return placed_like({part: jax.tree.map(functools.partial(cast, part), tree) for part, tree in shapes.items()}, mesh)


def part_dtypes(config: RunConfig) -> dict[str, str]:
    """Return the dtype of each part of the parameters: float32 if a stage trains it, else `model.frozen_dtype`."""
    trained = {part for stage in config.stages.values() for part in stage.train}
    parts = ("vision", "decoder", "adapters")
    return {part: "float32" if part in trained else config.model.frozen_dtype for part in parts}


def _warn(message: str) -> None:
    print(message, file=sys.stderr)
