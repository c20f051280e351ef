"""Layers that the decoder and the vision tower share."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ilvr_jax.config.schema import LoraConfig
from ilvr_jax.models.lora import linear


class RMSNorm(nn.Module):
    """Root mean square normalisation over channels, in float32 (as Qwen2RMSNorm)."""

    epsilon: float

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        weight = self.param("weight", nn.initializers.ones, (inputs.shape[-1],))
        wide = inputs.astype(jnp.float32)
        wide = wide * (jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon) ** -0.5
        return wide.astype(inputs.dtype) * weight.astype(inputs.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    intermediate_size: int
    use_bias: bool
    dtype: str
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch channels"], dropout_keys: Key[Array, "*batch"] | None = None
    ) -> Float[Array, "*batch channels"]:
        def dense(inputs: Array, features: int, name: str) -> Array:
            return linear(inputs, features, name, self.use_bias, self.dtype, self.lora, dropout_keys)

        gate = nn.silu(dense(inputs, self.intermediate_size, "gate_proj"))
        return dense(gate * dense(inputs, self.intermediate_size, "up_proj"), inputs.shape[-1], "down_proj")
