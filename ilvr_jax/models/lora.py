"""Low-rank adapters beside the decoder's linear layers (LoRA, arXiv 2106.09685), as PEFT builds them.

Their parameters live apart from the decoder's, so that these stay frozen, and move with the teacher alone:
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
    """What an adapter adds to its layer's output: scale * dropout(x) A B, nothing at the start since B is zero.

    Inputs are dropped out where there are keys, one a token: what is dropped does not depend on the batch around it.
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
            of_layer = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(dropout_keys)
            kept = random_bits(of_layer, inputs.shape[-1]) >= np.uint32(self.lora.dropout * 2**32)
            inputs = jnp.where(kept, inputs / (1.0 - self.lora.dropout), 0.0).astype(self.dtype)
        return (inputs @ down.astype(self.dtype)) @ up.astype(self.dtype) * self.lora.scale


def random_bits(keys: Key[Array, "*batch"], channels: int) -> UInt32[Array, "*batch channels"]:
    """Return random numbers for each key: its words and the channel, mixed as MurmurHash3 does at its end.

    A tenth of the arithmetic of `jax.random.bits`, whose 20 rounds for every number were most of the time in which a
    step with adapters compiled for TPUs.
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
    """Apply the linear layer `name` of the module that calls, and its adapter if `lora` says it has one."""
    outputs = nn.Dense(features, use_bias=use_bias, dtype=dtype, name=name)(inputs)
    if lora and lora.rank and name in lora.targets:
        outputs += Adapter(features, lora, dtype, name=name + SUFFIX)(inputs, dropout_keys)
    return outputs


def split_adapters(decoder: PyTree) -> tuple[PyTree, PyTree]:
    """Return a decoder's parameters without adapters, and the adapters alone."""
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
    """Return the decoder's parameters, adapters in their places if there are any."""
    return _joined(params["decoder"], params.get("adapters", {}))


def merge_adapters(params: PyTree, lora: LoraConfig) -> PyTree:
    """Return params without adapters whose effect is added to the kernels in float32; dtypes stay."""

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
