"""The names and layouts of published Qwen2.5-VL checkpoints, mapped to our parameters and back.

Both naming schemes are read and written: "flat", `model.layers...` with `visual...`, and "nested",
`model.language_model.layers...` with `model.visual...`.
"""

import functools
import re
from collections.abc import Collection, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from ilvr_jax.errors import LISTED, listed, quote
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.sharding import one_device, shardings, to_mesh
from ilvr_jax.models.tensor_files import DTYPE_NAMES, DTYPES, BadCheckpoint, TensorFiles, TensorToWrite, warn

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


# Wrapper modules that training leaves in names: around the model those of PEFT, reinforcement learning and value heads,
# and anywhere those of data parallelism and torch.compile.
WRAPPERS = re.compile(
    r"^(?:base_model\.model|pretrained_model|_forward_module|actor)\."
    r"|(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
BUFFERS = re.compile(r"(^|\.)rotary(_pos)?_emb\.\w+$")  # computed from the config, as transformers does
# Modules that are computed here: an unexpected tensor in them belongs to another computation.
COMPUTED = re.compile(r"visual\.|lm_head\.|model\.(layers|norm|embed)")
# The last parts of the names of quantised weights.
QUANTISED = {
    "GPTQ": ("g_idx",),
    "AWQ or GPTQ": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_shape", "weight_zero_point"),
    "bitsandbytes": ("absmax", "nested_absmax", "quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4", "SCB"),
    "fp8": ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale"),
    "HQQ": ("W_q",),
    "AQLM": ("codes", "codebooks"),
    "quanto": ("_data", "_scale"),
}
UNMERGED = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")


def unwrapped(name: str) -> str:
    """Return a tensor's name without wrapper modules, in any order."""
    while (inner := WRAPPERS.sub("", name)) != name:
        name = inner
    return name


def flat_name(name: str) -> str:
    """Return a tensor's name in the flat scheme, the older of the two, without wrapper modules.

    Names in a checkpoint of the model without its head begin with `language_model`; transformers loads it as well.
    """
    name = re.sub(r"^(model\.)?language_model\.", "model.", unwrapped(name))
    return re.sub(r"^model\.visual\.", "visual.", name)


def nested_name(name: str) -> str:
    """Return a flat name in the nested scheme, transformers' own since version 4.52; `lm_head` is the same in both."""
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", name))


def is_nested(names: Mapping[str, object]) -> bool:
    """Return whether a checkpoint has the nested naming scheme."""
    return any(flat_name(name) != unwrapped(name) for name in names)


def tensor_name(path: tuple[str, ...], layer: int | None = None) -> str:
    """Return the flat name of the parameter at `path`; `layer` picks from a stacked parameter."""
    tower, *modules = path
    if modules == ["lm_head"]:
        return HEAD
    leaf = {"kernel": "weight", "embed_tokens": "embed_tokens.weight"}.get(modules[-1], modules[-1])
    modules = [RENAMED.get(module, module) for module in modules[:-1]]
    modules = [re.sub(r"^blocks_(\d+)$", r"blocks.\1", module) for module in modules]
    if layer is not None:
        modules.insert(1, str(layer))
    return ".".join(["visual" if tower == "vision" else "model", *modules, leaf])


def named_tensors(params: PyTree) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """Yield the name of each tensor of a published checkpoint, and the path and the layer of its parameter."""
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
    """Return our parameters from a state dict in the layout of PyTorch (Linear is [out, in]).

    `dtype` is that of all parameters, or of each part ("vision", "decoder"). Tensors are read one at a time, and
    each is on the mesh, by default one device, before the next is read: memory holds one beside the parameters.

    Raises BadCheckpoint as `check_tensors` does.
    """
    shapes = jax.eval_shape(Qwen2_5VL(config).init, jax.random.key(0))
    tensors = check_tensors(state, shapes, config)

    def parameter(keys, leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.Array:
        path = tuple(key.key for key in keys)
        kind = dtype if isinstance(dtype, str) else dtype[path[0]]

        def tensor(layer: int | None = None) -> jax.Array:
            value = state[tensors[tensor_name(path, layer)]]
            value = value.reshape(value.shape[0], -1).T if path[-1] == "kernel" else value
            axes = place.spec if layer is None else place.spec[1:]
            return to_mesh(value, NamedSharding(place.mesh, PartitionSpec(*axes)))

        # Block on each one, since tensors in transfer take memory too.
        if path[:2] != ("decoder", "layers"):
            return jax.block_until_ready(tensor().astype(kind))
        stacked = jax.jit(lambda: jnp.zeros(leaf.shape, kind), out_shardings=place)()
        for layer in range(leaf.shape[0]):
            stacked = jax.block_until_ready(put(stacked, tensor(layer), layer))
        return stacked

    return jax.tree_util.tree_map_with_path(parameter, shapes, shardings(shapes, mesh or one_device()))


@functools.partial(jax.jit, donate_argnums=0)
def put(stacked: Float[Array, "layers ..."], tensor: Float[Array, "..."], layer: int) -> Float[Array, "layers ..."]:
    """Return `stacked`, whose buffer is donated, with a layer's tensor in its place.

    `stacked.at[layer].set` is a scatter, for which a CPU casts all layers of bfloat16 to float32 and back.
    """
    return jax.lax.dynamic_update_index_in_dim(stacked, tensor.astype(stacked.dtype), layer, axis=0)


def check_tensors(state: Mapping[str, np.ndarray], shapes: PyTree, config: ModelConfig) -> dict[str, str]:
    """Return the names in `state` of the model's tensors by their flat names; no tensor is read.

    Tensors of modules that are not computed here, such as heads of other methods, are named on stderr and ignored.
    Raises BadCheckpoint, naming the tensors, if any are missing, of another shape or dtype, or unexpected in modules
    that are computed here.
    """
    names: dict[str, str] = {}
    for name in state:
        if (other := names.setdefault(flat_name(name), name)) != name:
            raise BadCheckpoint(f"the checkpoint must hold a tensor once, but has {quote(other)} and {quote(name)}")
    check_not_quantised(names)
    if config.tie_word_embeddings and (head := names.pop(HEAD, None)):
        names.setdefault(EMBEDDING, head)  # one of the two is enough, as in transformers
    expected = published_shapes(shapes, config)
    others = sorted(names.keys() - expected.keys())
    missing, misshapen, not_floats = [name for name in expected if name not in names], [], []
    for name in sorted(expected.keys() & names.keys()):
        shape, dtype = shape_and_dtype(state, names[name])
        if dtype not in FLOATS:
            not_floats.append(f"{name} ({dtype})")
        elif shape != expected[name]:
            misshapen.append(f"{name} ({list(shape)} in place of {list(expected[name])})")
    problems = {
        "lacks": missing,
        "has another shape in": misshapen,
        f"has a dtype other than {', '.join(FLOATS)} in": not_floats,
        # If tensors are missing, any other may be one of them under an unknown name.
        "has besides": [name for name in others if (COMPUTED.match(name) or missing) and not BUFFERS.search(name)],
    }
    problems = {problem: tensors for problem, tensors in problems.items() if tensors}
    if problems:
        most = max(1, LISTED // len(problems))
        described = [f"{problem} {listed(tensors, most)}" for problem, tensors in problems.items()]
        raise BadCheckpoint(f"the checkpoint must have the tensors of its config.json, but {'; '.join(described)}")
    if others:
        warn(f"ignored tensors that are not part of the model: {listed(others)}")
    return {name: names[name] for name in expected}


def has_own_head(state: TensorFiles) -> bool:
    """Return whether a checkpoint has an output head whose numbers differ from its embedding's.

    transformers never ties the two then, whatever `tie_word_embeddings` is.
    """
    names = {flat_name(name): name for name in state}
    pair = [names[name] for name in (EMBEDDING, HEAD) if name in names]
    if len(pair) < 2 or any(state.places[name].dtype not in FLOATS or not state.places[name].shape for name in pair):
        return False
    return not state.equal(*pair)


def stored_dtype(state: TensorFiles) -> str:
    """Return the dtype of a checkpoint's first floating-point tensor, which is the checkpoint's to transformers."""
    names = {short: name for name, short in DTYPE_NAMES.items()}
    kinds = (place.dtype for place in state.places.values() if place.dtype in FLOATS)
    return names.get(next(kinds, "F32"), "float32")


def check_not_quantised(names: Collection[str]) -> None:
    """Raise BadCheckpoint if flat names belong to quantised weights or to unmerged adapters."""
    computed = [name for name in names if COMPUTED.match(name)]
    for kind, endings in QUANTISED.items():
        if quantised := [name for name in computed if name.rpartition(".")[2] in endings]:
            raise BadCheckpoint(
                f"the checkpoint must hold weights that are not quantised, but has those of {kind} "
                f"({quantised[0]} and {len(quantised) - 1} more); give the one that it was made from"
            )
    if adapters := [name for name in computed if UNMERGED.search(name)]:
        raise BadCheckpoint(
            f"the checkpoint must hold merged weights, but has LoRA adapters beside them ({adapters[0]} and "
            f"{len(adapters) - 1} more); merge them with PEFT's merge_and_unload"
        )


def shape_and_dtype(state: Mapping[str, np.ndarray], name: str) -> tuple[tuple[int, ...], str]:
    """Return a tensor's shape and the name of its dtype in a safetensors header, without reading the tensor."""
    if isinstance(state, TensorFiles):
        return state.places[name].shape, state.places[name].dtype
    dtype = np.dtype(state[name].dtype)
    return np.shape(state[name]), "BF16" if dtype == DTYPES["bfloat16"] else f"{dtype.kind.upper()}{8 * dtype.itemsize}"


def published_shapes(shapes: PyTree, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a published checkpoint by its flat name, from our parameters' shapes.

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
    """Return the shape of the patch embedding's kernel in a published checkpoint: that of a 3D convolution."""
    vision = config.vision
    return vision.hidden_size, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size


def state_dict_from_params(
    params: PyTree, config: ModelConfig, dtype: str = "float32", nested: bool = False
) -> list[TensorToWrite]:
    """Return the tensors of a published checkpoint, in the layout of PyTorch, each made when it is written."""
    shapes = published_shapes(params, config)

    def tensor(name: str, path: tuple[str, ...], layer: int | None) -> TensorToWrite:
        leaf = functools.reduce(lambda tree, key: tree[key], path, params)

        def make() -> np.ndarray:
            value = np.asarray(leaf if layer is None else leaf[layer]).astype(DTYPES[dtype], copy=False)
            value = value.T if path[-1] == "kernel" else value
            return np.ascontiguousarray(value).reshape(shapes[name])

        return TensorToWrite(nested_name(name) if nested else name, dtype, shapes[name], make)

    return [tensor(*place) for place in named_tensors(params)]
