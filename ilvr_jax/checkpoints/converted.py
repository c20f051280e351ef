"""Converted folders: a published checkpoint with its parameters as orbax writes them, which loads faster."""

import contextlib
import gc
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import PyTree

from ilvr_jax.errors import quote
from ilvr_jax.files import check_room, full_disk, is_full_disk, read_object
from ilvr_jax.models.base import Model
from ilvr_jax.models.sharding import placed_like
from ilvr_jax.models.tensor_files import BadCheckpoint

SOURCE = "source.json"  # here and in a workdir: the naming scheme of the tensors of the original checkpoint
CONVERTED = "params"  # the folder of the parameters
PIECE_BYTES = 2**26  # per file: orbax holds several files in memory while it writes or reads


def is_converted(folder: Path) -> bool:
    """Return whether a folder holds parameters written by `write_params`."""
    return (folder / CONVERTED).is_dir()


def read_nested(folder: Path) -> bool:
    """Return whether tensors had nested names in the checkpoint whose description a folder holds.

    Raises BadCheckpoint, naming the file, if it is damaged.
    """
    nested = read_object(folder / SOURCE, BadCheckpoint).get("nested")
    if type(nested) is not bool:
        raise BadCheckpoint(f"{folder / SOURCE} must have `nested`, true or false, got {quote(nested)}")
    return nested


def write_params(params: PyTree, folder: Path) -> None:
    """Write parameters into a folder with orbax; raises OSError if there is no room for them."""
    # Checked first, since orbax's threads would write and print tracebacks long after they have failed.
    check_room(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(params)), PIECE_BYTES)
    with _silent_failed_tasks():
        is_written = _try_to_write(params, folder / CONVERTED)
    if not is_written:
        raise full_disk(folder)


def _try_to_write(params: PyTree, path: Path) -> bool:
    """Write parameters with orbax; return whether there was room for them."""
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE_BYTES), params)
    try:
        with _checkpointer(params) as writer:
            arguments = ocp.args.PyTreeSave(params, pieces, ocdbt_target_data_file_size=PIECE_BYTES)
            writer.save(path.absolute(), arguments)
    except Exception as error:  # the file system's error, wrapped by tensorstore
        if not is_full_disk(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    return True


@contextlib.contextmanager
def _silent_failed_tasks() -> Iterator[None]:
    """Keep the tasks that a failed write of orbax leaves behind from printing a traceback each; it raises as well."""
    tasks, hooks = logging.getLogger("asyncio"), (sys.excepthook, sys.unraisablehook)
    tasks.disabled, sys.excepthook, sys.unraisablehook = True, lambda *_: None, lambda _: None
    try:
        yield
        gc.collect()
    finally:
        tasks.disabled, (sys.excepthook, sys.unraisablehook) = False, hooks


def read_params(folder: Path, model: Model, stored_dtype: str, dtype: str | Mapping[str, str], mesh: Mesh) -> PyTree:
    """Return the parameters of a converted folder, stored as `stored_dtype`, on the mesh.

    `dtype` is that of all parts, or of each ("vision", "decoder").
    """

    def dtype_of(keys) -> str:
        return dtype if isinstance(dtype, str) else dtype[keys[0].key]

    def narrow(keys, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        narrower = min(stored_dtype, dtype_of(keys), key=lambda name: jnp.dtype(name).itemsize)
        return jax.ShapeDtypeStruct(leaf.shape, narrower, sharding=leaf.sharding)

    def widen(keys, leaf: jax.Array) -> jax.Array:  # orbax would hold what it widens three times
        if leaf.dtype == dtype_of(keys):
            return leaf
        wide = jax.block_until_ready(leaf.astype(dtype_of(keys)))
        leaf.delete()
        return wide

    shapes = placed_like(jax.eval_shape(model.init, jax.random.key(0)), mesh)
    shapes = jax.tree_util.tree_map_with_path(narrow, shapes)
    with _checkpointer(shapes) as reader:
        arguments = ocp.args.PyTreeRestore(shapes, ocp.checkpoint_utils.construct_restore_args(shapes))
        params = reader.restore((folder / CONVERTED).absolute(), arguments)
    return jax.tree_util.tree_map_with_path(widen, params)


def _checkpointer(params: PyTree) -> ocp.Checkpointer:
    """Return a checkpointer that reads and writes parameters without all of them in host memory at once."""
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    room = 1 + largest // 10**9  # orbax counts in GB and refuses a parameter that fills them
    handler = ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=room, restore_concurrent_gb=room)
    return ocp.Checkpointer(handler)
