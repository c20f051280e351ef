"""Checkpoints of a stage: parameters, the rest of the train state and the place in the data, saved together."""

import contextlib
import inspect
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from ilvr_jax.config.workdir import is_checkpoint
from ilvr_jax.distributed import open_exchange, wait_for_all
from ilvr_jax.errors import InputError, listed
from ilvr_jax.files import is_full_disk, read_object

METADATA = "_CHECKPOINT_METADATA"  # in a checkpoint: times of its writing


class NoCheckpoint(InputError):
    """Raised when there is nothing to restore; its message names the folder."""


class DamagedCheckpoint(NoCheckpoint):
    """Raised when a checkpoint, or every one, cannot be read; its message names it."""


class OtherCheckpoint(NoCheckpoint):
    """Raised when a checkpoint is of another model; its message names the difference."""


class DiskFull(OSError):
    """Raised when a checkpoint could not be written for lack of space; its message names it."""


class Checkpoints:
    """The checkpoints of one stage, each a folder named by the step after which it was saved.

    Saving copies the state and writes it in the background; a folder gets its name once it is complete, so that a
    process that dies leaves the earlier ones intact.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        """Open the folder for reading, or with `keep` also for writing, keeping the newest `keep` checkpoints."""
        self.folder = folder.absolute()
        _drop_late_reads()
        for path in self._metadata():
            read_object(path, _damaged_metadata)
        try:
            self._open(keep)
        except (ValueError, TypeError, AttributeError) as error:
            raise _damaged_metadata(f"{self.folder}/*/{METADATA} must be as orbax wrote them ({error})") from error
        self._all_gather = open_exchange()

    def _metadata(self) -> list[Path]:
        """Return the files that orbax reads from every checkpoint when it opens their folder."""
        paths = (path / METADATA for path in self.folder.glob("*") if is_checkpoint(path))
        return [path for path in paths if os.path.lexists(path)]

    def _open(self, keep: int | None) -> None:
        if keep is not None:  # removes what a process that died left half written, which could fill the disk
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
            with _disk_full_errors(self.folder):
                self._manager = ocp.CheckpointManager(self.folder, options=options)
        # Each process reads by itself, and they exchange the results: one that fails would keep the others waiting.
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(process, {process}, f"reader_{process}")
        options = ocp.CheckpointManagerOptions(read_only=keep is None, create=False, multiprocessing_options=alone)
        self._reader = ocp.CheckpointManager(self.folder, options=options)
        if keep is None:
            self._manager = self._reader

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, None without one."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self.folder.glob("*") if is_checkpoint(path)]

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator) -> None:
        """Begin to save a state with `params` among its fields, and the iterator's place, unless the step is saved.

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
        if free < size:  # checked first, since the writer's threads would leave half a checkpoint and many messages
            raise DiskFull(_no_room(self.folder, f" ({size / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free)"))
        with _disk_full_errors(self.folder):
            self._manager.save(step, args=items, force=True)

    def preempted(self, step: int) -> bool:
        """Return, the same in every process, whether one of several has received SIGTERM; False for one process."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until all saves are complete; raises DiskFull if there was no room for one."""
        with _disk_full_errors(self.folder):
            self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """Return the state of a step.

        `like` has the shapes, dtypes and shardings to restore to; it may be abstract. Raises DamagedCheckpoint and
        OtherCheckpoint, as all methods that restore do.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(like.params)),
            training=ocp.args.StandardRestore(_abstract(like.replace(params=None))),
        )
        restored = self._read(step, items, params=like.params, training=like.replace(params=None))
        return restored["training"].replace(params=restored["params"])

    def restore_place(self, step: int) -> dict[str, Any]:
        """Return the state of the iterator after a step."""
        return self._read(step, ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

    def restore_params(self, step: int, like: Any) -> Any:
        """Return the parameters alone; `like` is as in `restore`."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(like)))
        return self._read(step, items, params=like)["params"]

    def restore_teacher(self, step: int) -> Any:
        """Return the teacher as it was saved, None if there was none."""
        saved = self._read(step, ocp.args.Composite(training=ocp.args.StandardRestore()))
        return saved["training"]["teacher"]

    def restore_newest(
        self, restore: Callable[[int], Any], log: Callable[[str], None], set_aside: bool = False
    ) -> tuple[int, Any]:
        """Return the step of the newest checkpoint that `restore` can read, and what `restore` returned.

        A checkpoint that one of several processes cannot read is damaged for all of them. Each damaged one is logged,
        and with `set_aside` its folder is renamed, so that its step can be saved again. Raises DamagedCheckpoint if
        none can be read.
        """
        problems: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            restored, problem = None, None
            try:
                restored = restore(step)
            except DamagedCheckpoint as error:
                problem = str(error)
            if problem := next(filter(None, self._all_gather(problem)), None):
                problems[step] = problem
                continue
            for damaged, problem in problems.items():
                renamed = f", renamed to {self._set_aside(damaged).name}" if set_aside else ""
                log(f"{problem}{renamed}; using the checkpoint of step {step}")
            return step, restored
        raise DamagedCheckpoint(
            f"no checkpoint in {self.folder} can be read: restore one of {listed(map(str, problems))} from a copy, or "
            f"move the folder away to train the stage anew ({next(iter(problems.values()))})"
        )

    def _set_aside(self, step: int) -> Path:
        numbers = ("", *(f"_{number}" for number in range(2, 1000)))
        paths = (self.folder / f"{step}.damaged{number}" for number in numbers)
        free_path = next(path for path in paths if not path.exists())
        wait_for_all("all have chosen the same name")
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(free_path)
        wait_for_all("a checkpoint is set aside")
        self._manager.reload()
        return free_path

    def _read(self, step: int, items: ocp.args.Composite, **like: Any) -> Any:
        """Return what orbax restores; `like` holds the paths and shapes that the trees of these names must have."""
        folder = self.folder / str(step)
        for path in folder.rglob("*"):  # reading a FIFO would never end
            if not path.is_file() and not path.is_dir():
                raise DamagedCheckpoint(f"the checkpoint {folder} is damaged ({path.name} is not a regular file)")
        try:
            with _quiet():
                return self._reader.restore(step, args=items)
        except Exception as error:
            # Files that are missing, cut off or changed raise errors of any kind in orbax, tensorstore and Python.
            # Errors of memory and of the file system are no sign of damage.
            is_missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and not is_missing):
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
        """Wait as `wait` does, and free the background threads."""
        with _disk_full_errors(self.folder):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type, error, trace) -> None:
        if error_type is None:
            self.close()
            return
        # Report the error that ends the block; a failed write besides is most often the same one.
        with contextlib.suppress(DiskFull):
            self.close()


def _abstract(tree: Any) -> Any:
    def shape(leaf):
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def _difference(folder: Path, like: Any) -> str:
    """Return the first array in which a saved tree differs from `like`, empty if there is none or it is not known."""
    try:
        with ocp.StandardCheckpointer() as reader:
            saved = reader.metadata(folder).item_metadata
    except Exception:  # a damaged file raises any kind of error, and is then reported as damaged
        return ""
    if saved is None:
        return ""
    saved, expected = _shapes(saved.tree), _shapes(like)
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved or name not in expected:
            return f"no {name}" if name in expected else f"the unexpected {name}"
        if None not in (saved[name], expected[name]) and saved[name] != expected[name]:
            return f"{name} of shape {saved[name]} in place of {expected[name]}"
    return ""


def _shapes(tree: Any) -> dict[str, tuple[int, ...] | None]:
    """Return the shapes of a tree's arrays by path; None for a random key, which is saved as plain numbers."""

    def name(key: Any) -> str:
        return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))

    def shape(path: tuple[Any, ...], leaf: Any) -> tuple[int, ...] | None:
        return None if name(path[-1]) == "rng" else leaf.shape

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(map(name, path)): shape(path, leaf) for path, leaf in leaves}


def _damaged_metadata(message: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{message}; delete that file: the checkpoint can be read without it")


def _drop_late_reads() -> None:
    """Keep reads of a checkpoint that end after another one has failed from printing tracebacks of their own.

    They end in threads of tensorstore, which then call orbax's closed event loop, or never end. Nothing else in this
    package uses coroutines.
    """
    before = sys.unraisablehook
    if getattr(before, "drops_late_reads", False):
        return

    def hook(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    hook.drops_late_reads = True
    sys.unraisablehook = hook
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it logs results that were never retrieved
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax from logging errors with their tracebacks in the block; they are raised as well."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)


def _no_room(folder: Path, numbers: str = "") -> str:
    return (
        f"no disk space for another checkpoint in {folder}{numbers}: those before it are complete; free some space and "
        "repeat the command to resume from them"
    )


@contextlib.contextmanager
def _disk_full_errors(path: Path) -> Iterator[None]:
    """Raise any error of a full disk in the block as DiskFull."""
    try:
        yield
    except Exception as error:  # each writer wraps the file system's error differently
        if is_full_disk(error):
            raise DiskFull(_no_room(path)) from error
        raise
