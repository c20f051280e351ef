"""Checkpoints of a stage: parameters, the rest of the train state and the place in the data, saved together."""

import contextlib
import functools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from ilvr_jax.data.tokenizer import load_tokenizer, special_tokens
from ilvr_jax.latents.tokens import SpecialTokens
from ilvr_jax.models.config import model_config
from ilvr_jax.models.qwen2_5_vl import Qwen2_5VL
from ilvr_jax.training.configuration import blame, is_checkpoint, read_config
from ilvr_jax.training.pretrained import read_published

PRETRAINED = "pretrained"  # in a workdir: what describes the checkpoint that the run began from


class NoCheckpoint(ValueError):
    """There is nothing to restore; one sentence says where it was looked for."""


class DiskFull(OSError):
    """A checkpoint could not be written; one sentence says which."""


class Checkpoints:
    """The checkpoints of one stage, a folder each, named by the step after which it was saved.

    Saving copies the state and writes it in the background; a folder gets its name when it is complete, so a
    process that dies leaves the earlier ones as they were.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        """Opens the folder, to write into it and keep the newest `keep`, or without `keep` to read alone."""
        self.folder = folder.absolute()
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:  # what a process that died left half written is removed: it could fill the disk
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        with _say_disk_full(self.folder):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator) -> None:
        """Begins to save a state with `params` among its fields, and the iterator's place, unless it is there.

        Raises DiskFull if this or the save before found no room.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            training=ocp.args.StandardSave(state.replace(params=None)),
            data=grain.checkpoint.CheckpointSave(iterator),
        )
        self.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < size:  # found out before, since the writer's threads would leave half a checkpoint and much noise
            raise DiskFull(_no_room(self.folder, f" ({size / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free)"))
        with _say_disk_full(self.folder):
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until what was saved is complete; raises DiskFull if there was no room for it."""
        with _say_disk_full(self.folder):
            self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """Returns the state of a step.

        `like` has the shapes, dtypes and shardings to restore to: a state, or what jax.eval_shape says of one.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(like.params)),
            training=ocp.args.StandardRestore(_abstract(like.replace(params=None))),
        )
        restored = self._manager.restore(step, args=items)
        return restored["training"].replace(params=restored["params"])

    def restore_place(self, step: int, iterator: grain.DatasetIterator) -> None:
        """Moves the iterator to its place after a step."""
        self._manager.restore(step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(iterator)))

    def restore_params(self, step: int, like: Any) -> Any:
        """Returns the parameters alone; `like` as in `restore`."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(like)))
        return self._manager.restore(step, args=items)["params"]

    def restore_teacher(self, step: int) -> Any:
        """Returns the teacher as it was saved, None where there was none."""
        saved = self._manager.restore(step, args=ocp.args.Composite(training=ocp.args.StandardRestore()))
        return saved["training"]["teacher"]

    def close(self) -> None:
        """Waits like `wait` and frees the background threads."""
        with _say_disk_full(self.folder):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type, error, trace) -> None:
        if error_type is None:
            self.close()
            return
        # The error on its way is the one to report; a failed write behind it is most often the same one.
        with contextlib.suppress(DiskFull):
            self.close()


def stage_folder(workdir: Path, stage: str) -> Path:
    """Returns where the checkpoints of a stage are."""
    return workdir / "checkpoints" / stage


def stages_with_checkpoints(workdir: Path, stages: Sequence[str]) -> list[str]:
    """Returns those of the stages that have a complete checkpoint, in order."""
    folders = {stage: stage_folder(workdir, stage) for stage in stages}
    return [name for name, folder in folders.items() if any(map(is_checkpoint, folder.glob("*")))]


def restore_for_inference(
    workdir: Path, config: ConfigDict | None = None, stage: str | None = None
) -> tuple[Qwen2_5VL, PyTree, PreTrainedTokenizerFast, SpecialTokens]:
    """Returns model, parameters, tokenizer and special tokens of a run, by default after the last stage it reached.

    `config` is by default that of the workdir. Raises BadConfig if the workdir is no run, NoCheckpoint if it has
    none, or none of `stage`.
    """
    config = config or read_config(workdir)
    stage = choose_stage(workdir, config, stage)
    tokenizer = load_tokenizer(workdir / "tokenizer")
    model = build_model(config, workdir / PRETRAINED, tokenizer)
    like = params_like(model, config)
    with Checkpoints(stage_folder(workdir, stage)) as checkpoints:
        params = checkpoints.restore_params(checkpoints.latest(), like)
    return model, params, tokenizer, special_tokens(tokenizer)


def choose_stage(workdir: Path, config: ConfigDict, stage: str | None) -> str:
    """Returns `stage`, by default the last that has a checkpoint; raises NoCheckpoint if it has none."""
    found = stages_with_checkpoints(workdir, config.stages)
    if not found:
        raise NoCheckpoint(f"{workdir} has no complete checkpoint yet; train until the first is saved")
    stage = stage or found[-1]
    if stage not in found:
        raise NoCheckpoint(f"{workdir} has no checkpoint of stage {stage!r}, it has {', '.join(found)}")
    return stage


def restore_teacher(workdir: Path, config: ConfigDict, stage: str | None = None) -> PyTree:
    """Returns the parts that the teacher of a stage has of its own; raises NoCheckpoint if the stage has no teacher."""
    stage = choose_stage(workdir, config, stage)
    with Checkpoints(stage_folder(workdir, stage)) as checkpoints:
        teacher = checkpoints.restore_teacher(checkpoints.latest())
    if teacher is None:
        raise NoCheckpoint(f"stage {stage!r} of {workdir} has no teacher; a stage of objective alignment has one")
    return teacher


def build_model(config: ConfigDict, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5VL:
    """Returns the model of a run: of the shape in its config, or of the checkpoint that it begins from, in `folder`."""
    published = read_published(folder) if config.model.init_from else None
    with blame("model"):
        return Qwen2_5VL(model_config(config.model, len(tokenizer), published))


def params_like(model: Qwen2_5VL, config: ConfigDict) -> PyTree:
    """Returns shapes and dtypes of a run's parameters: parts that no stage trains may be kept narrower."""
    dtypes = part_dtypes(config)

    def like(part: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtypes[part])

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return {part: jax.tree.map(functools.partial(like, part), tree) for part, tree in shapes.items()}


def part_dtypes(config: ConfigDict) -> dict[str, str]:
    """Returns the dtype in which each part of the parameters is kept: float32 if a stage trains it."""
    trained = {part for stage in config.stages for part in config[stage].train}
    parts = ("vision", "decoder", "adapters")
    return {part: "float32" if part in trained else config.model.frozen_dtype for part in parts}


def _abstract(tree: Any) -> Any:
    def shape(leaf):
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def _no_room(folder: Path, numbers: str = "") -> str:
    return (
        f"no disk space for another checkpoint in {folder}{numbers}: those before it are complete; free some and "
        "repeat the command to go on from them"
    )


@contextlib.contextmanager
def _say_disk_full(path: Path) -> Iterator[None]:
    """Turns whatever says within it that the disk is full into one sentence."""
    try:
        yield
    except Exception as error:  # the file system's error comes wrapped differently by each writer
        cause: BaseException | None = error
        while cause is not None:
            text = str(cause)
            if any(words in text for words in ("No space left", "ENOSPC", "Disk quota", "File too large")):
                raise DiskFull(_no_room(path)) from error
            cause = cause.__cause__ or cause.__context__
        raise
