"""Checkpoints of a stage: parameters, the rest of the train state and the place in the data, saved together."""

import contextlib
import functools
import inspect
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import PyTree
from transformers import PreTrainedTokenizerFast

from ilvr_jax.checkpoints.pretrained import read_published
from ilvr_jax.checkpoints.stop_tokens import read_stop_tokens
from ilvr_jax.config.experiments import config_errors
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.config.workdir import is_checkpoint, read_config
from ilvr_jax.data.tokenizer import load_tokenizer, special_tokens
from ilvr_jax.distributed import open_exchange, wait_for_all
from ilvr_jax.errors import InputError, listed, quote
from ilvr_jax.files import is_full_disk, read_object
from ilvr_jax.method.slots import init_params
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.qwen2_5_vl.config import model_config
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.sharding import one_device, placed_like

METADATA = "_CHECKPOINT_METADATA"  # in a checkpoint: times of its writing
PRETRAINED = "pretrained"  # in a workdir: what describes the checkpoint that the run began from


class NoCheckpoint(InputError):
    """There is nothing to restore; one sentence says where it was looked for."""


class DamagedCheckpoint(NoCheckpoint):
    """A checkpoint cannot be read, or none can be; one sentence says which."""


class OtherCheckpoint(NoCheckpoint):
    """A checkpoint is of another model; one sentence says what differs."""


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
        _drop_late_reads()
        for path in self._metadata():
            read_object(path, _damaged_metadata)
        try:
            self._open(keep)
        except (ValueError, TypeError, AttributeError) as error:
            raise _damaged_metadata(f"{self.folder}/*/{METADATA} must be as orbax wrote them ({error})") from error
        self._tell_all = open_exchange()

    def _metadata(self) -> list[Path]:
        """Returns the files that orbax reads of every checkpoint when it opens their folder."""
        paths = (path / METADATA for path in self.folder.glob("*") if is_checkpoint(path))
        return [path for path in paths if os.path.lexists(path)]

    def _open(self, keep: int | None) -> None:
        if keep is not None:  # what a process that died left half written is removed: it could fill the disk
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
            with _say_disk_full(self.folder):
                self._manager = ocp.CheckpointManager(self.folder, options=options)
        # Each process reads by itself and tells the others how it went: one that could not would keep them waiting.
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(process, {process}, f"reader_{process}")
        options = ocp.CheckpointManagerOptions(read_only=keep is None, create=False, multiprocessing_options=alone)
        self._reader = ocp.CheckpointManager(self.folder, options=options)
        if keep is None:
            self._manager = self._reader

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, None without one."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self.folder.glob("*") if is_checkpoint(path)]

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator) -> None:
        """Begins to save a state with `params` among its fields, and the iterator's place, unless it is there.

        Raises DiskFull if this or the save before found no room.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            training=ocp.args.StandardSave(state.replace(params=None)),
            data=ocp.args.JsonSave(iterator.get_state()),
        )
        self.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < size:  # found out before, since the writer's threads would leave half a checkpoint and much noise
            raise DiskFull(_no_room(self.folder, f" ({size / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free)"))
        with _say_disk_full(self.folder):
            self._manager.save(step, args=items, force=True)

    def preempted(self, step: int) -> bool:
        """Says, at the same step in every process, whether SIGTERM came to one of them; of one alone it says no."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Waits until what was saved is complete; raises DiskFull if there was no room for it."""
        with _say_disk_full(self.folder):
            self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """Returns the state of a step.

        `like` has the shapes, dtypes and shardings to restore to: a state, or what jax.eval_shape says of one. Raises
        DamagedCheckpoint and OtherCheckpoint, as the other ways to restore do.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(like.params)),
            training=ocp.args.StandardRestore(_abstract(like.replace(params=None))),
        )
        restored = self._read(step, items, params=like.params, training=like.replace(params=None))
        return restored["training"].replace(params=restored["params"])

    def restore_place(self, step: int) -> dict[str, Any]:
        """Returns the state of the iterator after a step."""
        return self._read(step, ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

    def restore_params(self, step: int, like: Any) -> Any:
        """Returns the parameters alone; `like` as in `restore`."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(like)))
        return self._read(step, items, params=like)["params"]

    def restore_teacher(self, step: int) -> Any:
        """Returns the teacher as it was saved, None where there was none."""
        saved = self._read(step, ocp.args.Composite(training=ocp.args.StandardRestore()))
        return saved["training"]["teacher"]

    def restore_newest(
        self, restore: Callable[[int], Any], say: Callable[[str], None], set_aside: bool = False
    ) -> tuple[int, Any]:
        """Returns the step of the newest checkpoint that `restore` can read, and what it returned.

        What one of several processes cannot read is damaged for all of them. One sentence is said for each, and with
        `set_aside` that folder gets a name which is no checkpoint's, so that its step can be saved again. Raises
        DamagedCheckpoint if none can be read.
        """
        problems: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            restored, problem = None, None
            try:
                restored = restore(step)
            except DamagedCheckpoint as error:
                problem = str(error)
            if problem := next(filter(None, self._tell_all(problem)), None):
                problems[step] = problem
                continue
            for damaged, problem in problems.items():
                kept = f", kept as {self._set_aside(damaged).name}" if set_aside else ""
                say(f"{problem}{kept}; the one before, of step {step}, is used")
            return step, restored
        raise DamagedCheckpoint(
            f"no checkpoint in {self.folder} can be read: restore one of {listed(map(str, problems))} from a copy, or "
            f"move the folder away to train the stage anew ({next(iter(problems.values()))})"
        )

    def _set_aside(self, step: int) -> Path:
        numbers = ("", *(f"_{number}" for number in range(2, 1000)))
        names = (self.folder / f"{step}.damaged{number}" for number in numbers)
        aside = next(path for path in names if not path.exists())
        wait_for_all("all have chosen the same name")
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(aside)
        wait_for_all("a checkpoint is set aside")
        self._manager.reload()
        return aside

    def _read(self, step: int, items: ocp.args.Composite, **like: Any) -> Any:
        """Returns what orbax restores; `like` names the trees that are to have these paths and shapes."""
        folder = self.folder / str(step)
        for path in folder.rglob("*"):  # reading a FIFO would never end
            if not path.is_file() and not path.is_dir():
                raise DamagedCheckpoint(f"the checkpoint {folder} is damaged ({path.name} is no regular file)")
        try:
            with _quiet():
                return self._reader.restore(step, args=items)
        except Exception as error:
            # Files that are missing, cut off or changed end in errors of any kind of orbax, tensorstore and Python.
            # Those of memory and of the file system say nothing of the checkpoint.
            gone = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and not gone):
                raise
            if any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Permission denied")):
                raise
            for item, tree in like.items():
                if difference := _difference(folder / item, tree):
                    raise OtherCheckpoint(
                        f"the checkpoint {folder} must be of this config's model, but {item} has {difference}; give "
                        "another --workdir"
                    ) from error
            reason = str(error.args[0] if isinstance(error, KeyError) else error).strip().partition("\n")[0]
            raise DamagedCheckpoint(f"the checkpoint {folder} is damaged ({reason[:80]})") from error

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


def restore_run(
    workdir: Path, config: RunConfig | None = None, stage: str | None = None, mesh: Mesh | None = None
) -> tuple[Qwen2_5VL, PyTree, PreTrainedTokenizerFast, SpecialTokens]:
    """Returns model, parameters, tokenizer and special tokens of a run, by default after the last stage it reached.

    Arguments and errors are those of `restore_run`.
    """
    return restore_run(workdir, config, stage, mesh)[1:]


def restore_run(
    workdir: Path, config: RunConfig | None = None, stage: str | None = None, mesh: Mesh | None = None
) -> tuple[int, Qwen2_5VL, PyTree, PreTrainedTokenizerFast, SpecialTokens]:
    """Returns the step of a run's checkpoint, and the model, parameters, tokenizer and special tokens of it.

    `config` is by default that of the workdir, the mesh one device. A damaged checkpoint is named on stderr and the one
    before it used. Raises BadConfig if the workdir is no run, NoCheckpoint if it has none that can be read, or none of
    `stage`.
    """
    config = config or read_config(workdir)
    stage = choose_stage(workdir, config, stage)
    tokenizer = load_tokenizer(workdir / "tokenizer")
    model = build_model(config, workdir / PRETRAINED, tokenizer)
    like = abstract_params(model, config, mesh or one_device())
    with Checkpoints(stage_folder(workdir, stage)) as checkpoints:
        step, params = checkpoints.restore_newest(lambda step: checkpoints.restore_params(step, like), _warn)
    return step, model, params, tokenizer, answer_tokens(config, workdir / PRETRAINED, tokenizer, model)


def choose_stage(workdir: Path, config: RunConfig, stage: str | None) -> str:
    """Returns `stage`, by default the last that has a checkpoint; raises NoCheckpoint if it has none."""
    found = stages_with_checkpoints(workdir, list(config.stages))
    if not found:
        raise NoCheckpoint(f"{workdir} has no complete checkpoint yet; train until the first is saved")
    stage = found[-1] if stage is None else stage
    if stage not in found:
        raise NoCheckpoint(f"{workdir} has no checkpoint of stage {quote(stage)}, it has {', '.join(found)}")
    return stage


def restore_teacher(workdir: Path, config: RunConfig, stage: str | None = None) -> PyTree:
    """Returns the parts that the teacher of a stage has of its own; raises NoCheckpoint if the stage has no teacher."""
    stage = choose_stage(workdir, config, stage)
    with Checkpoints(stage_folder(workdir, stage)) as checkpoints:
        _, teacher = checkpoints.restore_newest(checkpoints.restore_teacher, _warn)
    if teacher is None:
        raise NoCheckpoint(f"stage {stage!r} of {workdir} has no teacher; a stage of objective alignment has one")
    return teacher


def build_model(
    config: RunConfig, folder: Path, tokenizer: PreTrainedTokenizerFast, published: Mapping[str, Any] | None = None
) -> Qwen2_5VL:
    """Returns the model of a run: of the shape in its config, or of the checkpoint that it begins from.

    That is described by `published`, by default the config.json in `folder`.
    """
    if config.model.init_from and published is None:
        published = read_published(folder)
    with config_errors("model"):
        return Qwen2_5VL(model_config(config.model, len(tokenizer), published))


def answer_tokens(
    config: RunConfig, folder: Path, tokenizer: PreTrainedTokenizerFast, model: Qwen2_5VL
) -> SpecialTokens:
    """Returns the special tokens of a run, those that end answers of the checkpoint in `folder`, its start, included.

    Raises BadCheckpoint as `read_stop_tokens` does.
    """
    stop = read_stop_tokens(folder, tokenizer, model.config.vocab_size) if config.model.init_from else ()
    return special_tokens(tokenizer, stop)


def abstract_params(model: Qwen2_5VL, config: RunConfig, mesh: Mesh) -> PyTree:
    """Returns shapes, dtypes and places of a run's parameters: parts that no stage trains may be kept narrower."""
    dtypes = part_dtypes(config)

    def like(part: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtypes[part])

    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return placed_like({part: jax.tree.map(functools.partial(like, part), tree) for part, tree in shapes.items()}, mesh)


def part_dtypes(config: RunConfig) -> dict[str, str]:
    """Returns the dtype in which each part of the parameters is kept: float32 if a stage trains it."""
    trained = {part for stage in config.stages.values() for part in stage.train}
    parts = ("vision", "decoder", "adapters")
    return {part: "float32" if part in trained else config.model.frozen_dtype for part in parts}


def _abstract(tree: Any) -> Any:
    def shape(leaf):
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def _difference(folder: Path, like: Any) -> str:
    """Returns the first array that a saved tree and `like` do not share, empty if there is none or it is not known."""
    try:
        with ocp.StandardCheckpointer() as reader:
            saved = reader.metadata(folder).item_metadata
    except Exception:  # of a damaged file, which is an error of any kind: that is what is reported then
        return ""
    if saved is None:
        return ""
    theirs, ours = _shapes(saved.tree), _shapes(like)
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in theirs or name not in ours:
            return f"no {name}" if name in ours else f"{name}, which is none of this run's"
        if None not in (theirs[name], ours[name]) and theirs[name] != ours[name]:
            return f"{name} of shape {theirs[name]}, here it is {ours[name]}"
    return ""


def _shapes(tree: Any) -> dict[str, tuple[int, ...] | None]:
    """Returns the shapes of a tree's arrays by path; None for a random key, which is saved as plain numbers."""

    def name(key: Any) -> str:
        return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))

    def shape(path: tuple[Any, ...], leaf: Any) -> tuple[int, ...] | None:
        return None if name(path[-1]) == "rng" else leaf.shape

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(map(name, path)): shape(path, leaf) for path, leaf in leaves}


def _damaged_metadata(sentence: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{sentence}; delete that file: the checkpoint can be read without")


def _drop_late_reads() -> None:
    """Keeps reads that end after another one of a checkpoint has failed from printing tracebacks of their own.

    Those end in threads of tensorstore, where orbax's event loop, closed by then, is to be told of it, or never.
    Nothing else here has coroutines.
    """
    before = sys.unraisablehook
    if getattr(before, "drops_late_reads", False):
        return

    def hook(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    hook.drops_late_reads = True
    sys.unraisablehook = hook
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it logs results that nobody asked for
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from logging the errors within it, which are raised as well, with their tracebacks."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)


def _warn(sentence: str) -> None:
    print(sentence, file=sys.stderr)


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
        if is_full_disk(error):
            raise DiskFull(_no_room(path)) from error
        raise
