"""Low-rank adapters beside the decoder's linear layers (LoRA, arXiv 2106.09685), as in PEFT.

Their parameters are separate from the decoder's, which stay frozen, and the teacher holds them alone:
params["adapters"] has the decoder's structure with `<layer>_lora` in place of each adapted layer.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, UInt32

from ilvr_jax.config.schema import LORA_TARGETS, LoraConfig

SUFFIX = "_lora"


class Adapter(nn.Module):
    """The addition to a layer's output: scale * dropout(x) A B, zero at first since B is initialised to zero.

    Dropout needs a key per token, so that it does not depend on the rest of the batch; without keys there is none.
    """

    features: int
    lora: LoraConfig
    dtype: str

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "rows columns channels"], dropout_keys: Key[Array, "rows columns"] | None = None
    ) -> Float[Array, "rows columns features"]:
        bound = inputs.shape[-1] ** -0.5  # PEFT's kaiming_uniform with a = sqrt(5)
        down = self.param("a", _uniform(bound), (inputs.shape[-1], self.lora.rank))
        up = self.param("b", nn.initializers.zeros, (self.lora.rank, self.features))
        inputs = inputs.astype(self.dtype)
        if self.lora.dropout and dropout_keys is not None:
            number = LORA_TARGETS.index(self.name.removesuffix(SUFFIX))
            layer_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(dropout_keys)
            keep = random_bits(layer_keys, inputs.shape[-1]) >= np.uint32(self.lora.dropout * 2**32)
            inputs = jnp.where(keep, inputs / (1.0 - self.lora.dropout), 0.0).astype(self.dtype)
        return (inputs @ down.astype(self.dtype)) @ up.astype(self.dtype) * self.lora.scale


def random_bits(keys: Key[Array, "*batch"], channels: int) -> UInt32[Array, "*batch channels"]:
    """Return random numbers for each key: its words and the channel, through MurmurHash3's final mixing.

    This has a tenth of the arithmetic of `jax.random.bits`, whose 20 rounds per number dominated the compile time of a
    step with adapters for TPUs.
    """
    first, second = jnp.moveaxis(jax.random.key_data(keys), -1, 0)[..., None]
    bits = (first + jnp.arange(channels, dtype=jnp.uint32) * np.uint32(0x9E3779B9)) ^ second
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def linear(
    inputs: Float[Array, "*batch channels"],
    features: int,
    name: str,
    use_bias: bool,
    dtype: str,
    lora: LoraConfig | None = None,
    dropout_keys: Key[Array, "*batch"] | None = None,
) -> Float[Array, "*batch features"]:
    """Apply the linear layer `name` of the calling module, and its adapter if `lora` targets it."""
    outputs = nn.Dense(features, use_bias=use_bias, dtype=dtype, name=name)(inputs)
    if lora and lora.rank and name in lora.targets:
        outputs += Adapter(features, lora, dtype, name=name + SUFFIX)(inputs, dropout_keys)
    return outputs


def split_adapters(decoder: PyTree) -> tuple[PyTree, PyTree]:
    """Return a decoder's parameters without adapters, and those of the adapters."""
    base, adapters = {}, {}
    for name, value in decoder.items():
        if name.endswith(SUFFIX):
            adapters[name] = value
        elif isinstance(value, dict):
            base[name], inside = split_adapters(value)
            adapters |= {name: inside} if inside else {}
        else:
            base[name] = value
    return base, adapters


def decoder_params(params: PyTree) -> PyTree:
    """Return the decoder's parameters with those of the adapters, if any, in their places."""
    return _joined(params["decoder"], params.get("adapters", {}))


def merge_adapters(params: PyTree, lora: LoraConfig) -> PyTree:
    """Return params without adapters: these are added to the kernels, in float32; dtypes stay."""

    def merge(base: PyTree, adapters: PyTree) -> PyTree:
        merged = dict(base)
        for name, value in adapters.items():
            layer = name.removesuffix(SUFFIX)
            if layer == name:
                merged[name] = merge(base[name], value)
                continue
            kernel = base[layer]["kernel"]
            added = lora.scale * jnp.einsum("...ir,...ro->...io", value["a"], value["b"])
            merged[layer] = {**base[layer], "kernel": (kernel.astype(jnp.float32) + added).astype(kernel.dtype)}
        return merged

    others = {part: value for part, value in params.items() if part not in ("decoder", "adapters")}
    return {**others, "decoder": merge(params["decoder"], params.get("adapters", {}))}


def _joined(base: PyTree, adapters: PyTree) -> PyTree:
    joined = dict(base)
    for name, value in adapters.items():
        joined[name] = value if name.endswith(SUFFIX) or name not in base else _joined(base[name], value)
    return joined


def _uniform(bound: float):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
