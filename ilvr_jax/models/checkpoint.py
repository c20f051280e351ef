"""Names and layouts of published Qwen2.5-VL checkpoints, mapped to our parameters and back.

Both naming schemes are read and written: "flat", `model.layers...` with `visual...`, and "nested",
`model.language_model.layers...` with `model.visual...`.
"""

import functools
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from ilvr_jax.models.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl import Qwen2_5VL
from ilvr_jax.models.sharding import one_device, shardings, to_mesh
from ilvr_jax.models.tensor_files import DTYPES, BadCheckpoint, TensorFolder, TensorToWrite

# Module names that differ between a checkpoint and our parameters.
RENAMED = {
    "patch_embed": "patch_embed.proj",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "ln_q": "merger.ln_q",
    "merger_in": "merger.mlp.0",
    "merger_out": "merger.mlp.2",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
}


def flat_name(name: str) -> str:
    """Returns a tensor's name in the flat scheme, the older of the two."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", name)


def nested_name(name: str) -> str:
    """Returns a flat name in the nested scheme, transformers' own since version 4.52; `lm_head` is the same in both."""
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", name))


def is_nested(names: Mapping[str, object]) -> bool:
    """Says which naming scheme a checkpoint has."""
    return any(name.startswith(("model.language_model.", "model.visual.")) for name in names)


def tensor_name(path: tuple[str, ...], layer: int | None = None) -> str:
    """Returns the flat name of the parameter at `path`; `layer` picks from a stacked parameter."""
    tower, *modules = path
    if modules == ["lm_head"]:
        return "lm_head.weight"
    leaf = {"kernel": "weight", "embed_tokens": "embed_tokens.weight"}.get(modules[-1], modules[-1])
    modules = [RENAMED.get(module, module) for module in modules[:-1]]
    modules = [re.sub(r"^blocks_(\d+)$", r"blocks.\1", module) for module in modules]
    if layer is not None:
        modules.insert(1, str(layer))
    return ".".join(["visual" if tower == "vision" else "model", *modules, leaf])


def named_tensors(params: PyTree) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """Yields each tensor of a published checkpoint with the path, and the layer, of the parameter that it fills."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = tuple(key.key for key in keys)
        for layer in range(leaf.shape[0]) if path[:2] == ("decoder", "layers") else [None]:
            yield tensor_name(path, layer), path, layer


def params_from_state_dict(
    state: Mapping[str, np.ndarray],
    config: ModelConfig,
    dtype: str | Mapping[str, str] = "float32",
    mesh: Mesh | None = None,
) -> PyTree:
    """Returns our parameters from a state dict in the layout of PyTorch (Linear is [out, in]).

    `dtype` is that of all parameters, or of each part ("vision", "decoder"). Tensors are read one after another,
    each put in its place on the mesh, by default one device, before the next, so that no more than one is held beside
    the parameters.

    Raises BadCheckpoint naming the tensors that are missing, left over or misshapen.
    """
    shapes = jax.eval_shape(Qwen2_5VL(config).init, jax.random.key(0))
    check_tensors(state, shapes, config)
    tensors = {flat_name(name): name for name in state}

    def parameter(keys, leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.Array:
        path = tuple(key.key for key in keys)
        kind = dtype if isinstance(dtype, str) else dtype[path[0]]

        def tensor(layer: int | None = None) -> jax.Array:
            value = state[tensors[tensor_name(path, layer)]]
            value = value.reshape(value.shape[0], -1).T if path[-1] == "kernel" else value
            axes = place.spec if layer is None else place.spec[1:]
            return to_mesh(value, NamedSharding(place.mesh, PartitionSpec(*axes)))

        # Each is waited for, since tensors on their way to the device are held as well.
        if path[:2] != ("decoder", "layers"):
            return jax.block_until_ready(tensor().astype(kind))
        stacked = jax.jit(lambda: jnp.zeros(leaf.shape, kind), out_shardings=place)()
        for layer in range(leaf.shape[0]):
            stacked = jax.block_until_ready(put(stacked, tensor(layer), layer))
        return stacked

    return jax.tree_util.tree_map_with_path(parameter, shapes, shardings(shapes, mesh or one_device()))


@functools.partial(jax.jit, donate_argnums=0)
def put(stacked: Float[Array, "layers ..."], tensor: Float[Array, "..."], layer: int) -> Float[Array, "layers ..."]:
    """Returns `stacked`, whose buffer is given away, with a layer's tensor in its place.

    `stacked.at[layer].set` is a scatter, for which a CPU turns all layers of bfloat16 into float32 and back.
    """
    return jax.lax.dynamic_update_index_in_dim(stacked, tensor.astype(stacked.dtype), layer, axis=0)


def check_tensors(state: Mapping[str, np.ndarray], shapes: PyTree, config: ModelConfig) -> None:
    """Raises BadCheckpoint naming the tensors that are missing, left over or misshapen, before any is read."""
    found = {flat_name(name): name for name in state}
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    problems, expected = [], published_shapes(shapes, config)
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name} is missing")
            continue
        size = state.shape(found[name]) if isinstance(state, TensorFolder) else np.shape(state[found[name]])
        if size != shape:
            problems.append(f"{name} has shape {list(size)} where {list(shape)} was expected")
    problems += [f"{name} is not part of the model" for name in sorted(found.keys() - expected.keys())]
    if problems:
        raise BadCheckpoint("the checkpoint does not fit the model: " + "; ".join(problems))


def published_shapes(shapes: PyTree, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape that each tensor of a published checkpoint has, by its flat name, from our parameters' shapes.

    Linear layers are [out, in] there.
    """
    published = {}
    for name, path, layer in named_tensors(shapes):
        leaf = functools.reduce(lambda tree, key: tree[key], path, shapes)
        shape = leaf.shape if layer is None else leaf.shape[1:]
        if path[-1] == "kernel":
            shape = patch_shape(config) if "patch_embed" in path else shape[::-1]
        published[name] = shape
    return published


def patch_shape(config: ModelConfig) -> tuple[int, int, int, int, int]:
    """Returns the shape of the patch embedding's kernel in a published checkpoint, a three-dimensional convolution."""
    vision = config.vision
    return vision.hidden_size, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size


def state_dict_from_params(
    params: PyTree, config: ModelConfig, dtype: str = "float32", nested: bool = False
) -> list[TensorToWrite]:
    """Returns the tensors of a published checkpoint, in the layout of PyTorch, each made when it is asked for."""
    shapes = published_shapes(params, config)

    def tensor(name: str, path: tuple[str, ...], layer: int | None) -> TensorToWrite:
        leaf = functools.reduce(lambda tree, key: tree[key], path, params)

        def make() -> np.ndarray:
            value = np.asarray(leaf if layer is None else leaf[layer]).astype(DTYPES[dtype], copy=False)
            value = value.T if path[-1] == "kernel" else value
            return np.ascontiguousarray(value).reshape(shapes[name])

        return TensorToWrite(nested_name(name) if nested else name, dtype, shapes[name], make)

    return [tensor(*place) for place in named_tensors(params)]
