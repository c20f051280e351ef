"""Names and layouts of published Qwen2.5-VL checkpoints, mapped to our parameters.

Both naming schemes are read: `model.layers...` with `visual...`, and `model.language_model.layers...` with
`model.visual...`.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ilvr_jax.models.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl import Qwen2_5VL

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


def canonical_name(name: str) -> str:
    """Returns a tensor's name in the older of the two published schemes."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", name)


def tensor_name(path: tuple[str, ...], layer: int | None = None) -> str:
    """Returns the checkpoint's name of the parameter at `path`; `layer` picks from a stacked parameter."""
    tower, *modules = path
    if modules == ["lm_head"]:
        return "lm_head.weight"
    leaf = {"kernel": "weight", "embed_tokens": "embed_tokens.weight"}.get(modules[-1], modules[-1])
    modules = [RENAMED.get(module, module) for module in modules[:-1]]
    modules = [re.sub(r"^blocks_(\d+)$", r"blocks.\1", module) for module in modules]
    if layer is not None:
        modules.insert(1, str(layer))
    return ".".join(["visual" if tower == "vision" else "model", *modules, leaf])


def params_from_state_dict(state: Mapping[str, np.ndarray], config: ModelConfig) -> PyTree:
    """Returns our float32 parameters from a state dict in the layout of PyTorch (Linear is [out, in]).

    Raises ValueError naming the tensors that are missing, left over or misshapen.
    """
    tensors = {canonical_name(name): name for name in state}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    shapes = jax.eval_shape(Qwen2_5VL(config).init, jax.random.key(0))
    problems, used = [], set()

    def tensor(path: tuple[str, ...], shape: tuple[int, ...], layer: int | None = None) -> np.ndarray:
        name = tensor_name(path, layer)
        used.add(name)
        if name not in tensors:
            problems.append(f"{name} is missing")
            return np.zeros(shape, np.float32)
        value = np.asarray(state[tensors[name]], np.float32)
        if path[-1] == "kernel":
            value = value.reshape(value.shape[0], -1).T
        if value.shape != shape:
            problems.append(f"{name} has shape {value.shape} where {shape} was expected")
            return np.zeros(shape, np.float32)
        return value

    def parameter(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = tuple(key.key for key in path)
        if names[:2] != ("decoder", "layers"):
            return jnp.asarray(tensor(names, leaf.shape))
        return jnp.stack([tensor(names, leaf.shape[1:], layer) for layer in range(leaf.shape[0])])

    params = jax.tree_util.tree_map_with_path(parameter, shapes)
    problems += [f"{name} is not part of the model" for name in sorted(set(tensors) - used)]
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))
    return params
