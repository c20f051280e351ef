"""The device mesh and the sharding of arrays on it: one table for parameters, one for their axes."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from ilvr_jax.models.qwen2_5_vl.config import ModelConfig

# Slices are joined by the slower network between pods; only rows are sharded over them.
AXES = ("slice", "data", "fsdp", "tensor")
ROWS = ("slice", "data", "fsdp")  # the axes that the samples of a batch are sharded over

# The mesh axes that each logical axis of an array is sharded over; any other axis is replicated.
RULES = (
    ("rows", ROWS),
    ("few_rows", ("slice", "data")),  # of so few tokens that they are moved to the weights: see decoder.DecoderLayer
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocabulary", "tensor"),
    ("spread_vocabulary", ("fsdp", "tensor")),  # of the loss: few_rows are moved to it
)

# The last axes of parameters, by the end of their names; the axis before them, of stacked layers, is replicated.
PARAMETERS = (
    (r"(embed_tokens|lm_head)", ("vocabulary", "embed")),
    (r"[qkv]_proj/kernel", ("embed", "heads")),
    (r"[qkv]_proj/bias", ("heads",)),
    (r"o_proj/kernel", ("heads", "embed")),
    (r"(gate|up)_proj/kernel", ("embed", "mlp")),
    (r"(gate|up)_proj/bias", ("mlp",)),
    (r"down_proj/kernel", ("mlp", "embed")),
    (r"(qkv|merger_in)/kernel", (None, "embed")),
    (r"(proj|merger_out)/kernel", ("embed", None)),
    (r"[qkv]_proj_lora/a", ("embed", None)),
    (r"[qkv]_proj_lora/b", (None, "heads")),
    (r"o_proj_lora/a", ("heads", None)),
    (r"o_proj_lora/b", (None, "embed")),
    (r"(gate|up)_proj_lora/a", ("embed", None)),
    (r"(gate|up)_proj_lora/b", (None, "mlp")),
    (r"down_proj_lora/a", ("mlp", None)),
    (r"down_proj_lora/b", (None, "embed")),
)


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a config's `mesh` section: a size per axis, of which one may be -1 for all that is left.

    Raises ValueError if the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    given = ", ".join(f"{axis} {sizes[axis]}" for axis in AXES)
    if any(type(size) is not int or (size < 1 and size != -1) for size in sizes.values()):
        raise ValueError(f"sizes must be whole numbers from 1, or -1 for the rest, got {given}")
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) > 1:
        raise ValueError(f"at most one size may be -1 (all remaining devices), got {given}")
    used = int(np.prod([sizes[axis] for axis in AXES if axis not in free]))
    if len(devices) % used or (not free and len(devices) != used):
        needed = f"a multiple of {used}" if free else str(used)
        raise ValueError(f"the number of devices must be {needed} for {given}, got {len(devices)}")
    shape = [len(devices) // used if axis in free else sizes[axis] for axis in AXES]
    # The compiler propagates shardings from those of parameters and batches.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def one_device() -> Mesh:
    """Return the mesh of the first device alone."""
    return make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Shard the model's arrays over the mesh by RULES inside the block."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def check_mesh(mesh: Mesh, config: ModelConfig) -> None:
    """Raise ValueError if the mesh does not divide the model: heads over `tensor`, channels over `fsdp`."""
    for name, size, axis in (
        ("num_attention_heads", config.num_attention_heads, "tensor"),
        ("num_key_value_heads", config.num_key_value_heads, "tensor"),
        ("intermediate_size", config.intermediate_size, "tensor"),
        ("vocab_size", config.vocab_size, "tensor"),
        ("hidden_size", config.hidden_size, "fsdp"),
    ):
        if size % mesh.shape[axis]:
            raise ValueError(f"{axis} must divide the model's {name} ({size}), got {mesh.shape[axis]}")


def divisor(axis: str, mesh: Mesh | None = None) -> int:
    """Return the number of devices that an axis of RULES is sharded over, by default on the mesh of `on_mesh`.

    It is 1 without a mesh.
    """
    mesh, axes = mesh or jax.sharding.get_abstract_mesh(), dict(RULES)[axis]
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in ((axes,) if type(axes) is str else axes))


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the sharding of each array of a tree: parameters, or the states of an optimizer or a teacher.

    An axis that the mesh does not divide evenly, such as some of the vision tower's, is replicated.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh)), tree)


def _spec(path: tuple[Any, ...], leaf: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    axes = next((axes for pattern, axes in PARAMETERS if re.search(rf"(^|/){pattern}$", name)), ())
    if leaf.ndim < len(axes):  # an optimizer's state has the parameters' tree, with scalars for some of them
        return PartitionSpec()
    spec = list(nn.logical_to_mesh_axes([None] * (leaf.ndim - len(axes)) + list(axes), RULES))
    # In the form that the compiler returns it in; in another form the same sharding would compile again.
    spec = [
        axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, leaf.shape, strict=True)
    ]
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def divide(tree: PyTree) -> PyTree:
    """Return the tree, in a compiled function, constrained to its shardings on the mesh of `on_mesh`, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, _spec(path, leaf, mesh)), tree
    )


def replicate(tree: PyTree) -> PyTree:
    """Return the tree, in a compiled function, whole on each device of the mesh of `on_mesh`, if any."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def placed_like(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return shapes, dtypes and shardings of arrays, for creating or restoring them there."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def places(like: PyTree) -> PyTree:
    """Return the sharding of each array, or abstract array, of a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, like)


def to_mesh(array: np.ndarray, place: NamedSharding) -> jax.Array:
    """Return an array that every process holds, sharded: each device gets its part."""
    return jax.make_array_from_callback(array.shape, place, lambda part: array[part])


def local_rows(mesh: Mesh, rows: int) -> Int[np.ndarray, " local_rows"]:
    """Return the rows of a batch that this process's devices hold, in ascending order."""
    parts = NamedSharding(mesh, PartitionSpec(ROWS)).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def place_rows(tree: PyTree, mesh: Mesh, rows: int | None = None) -> PyTree:
    """Return a batch on the mesh, sharded by rows, the first axis of every array.

    The tree has all rows, or, if their number is given as `rows`, the `local_rows` alone.
    """
    place = NamedSharding(mesh, PartitionSpec(ROWS))

    def put(array: np.ndarray) -> jax.Array:
        if rows is None:
            return to_mesh(array, place)
        local = local_rows(mesh, rows)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            numbers = np.arange(rows)[index[0]]
            first = np.searchsorted(local, numbers[0])
            return array[first : first + len(numbers)]

        return jax.make_array_from_callback((rows, *array.shape[1:]), place, part)

    return jax.tree.map(put, tree)
