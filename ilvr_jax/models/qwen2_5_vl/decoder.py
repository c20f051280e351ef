"""Qwen2.5-VL's decoder: a causal transformer over embeddings, with explicit masks, positions and cache."""

import operator
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ilvr_jax.models.attention import Cache, attention, cached_attention, causal_attention
from ilvr_jax.models.layers import GatedMLP, RMSNorm
from ilvr_jax.models.lora import SUFFIX, linear
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl.rotary import rope_magnitude, rotary_angles, rotate

# Keys and values of some columns, each [layers, batch, columns, key_value_heads, head_dim].
Heads = Float[Array, "layers batch columns heads head_dim"]
KeyValues = tuple[Heads, Heads]
# Those of one layer, heads first.
LayerKeyValues = tuple[Float[Array, "batch heads columns head_dim"], Float[Array, "batch heads columns head_dim"]]


def remat_policy(name: str):
    """Return the rematerialisation policy `name`, one of REMAT_POLICIES other than "none"."""
    return getattr(jax.checkpoint_policies, {"full": "nothing_saveable"}.get(name, name))


class DecoderLayer(nn.Module):
    """Grouped-query attention with rotary positions and biases on q, k and v, then SwiGLU.

    Where parameters are sharded, either the weights are moved to the tokens, or, if there are fewer tokens than
    channels (as in a step of decoding), the tokens to the weights: each device then has some channels of all tokens.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "batch time channels"],
        past: Sequence[tuple[Array, Array]] | Cache,
        angles: Float[Array, "batch time half"],
        mask: Bool[Array, "batch time"] | Bool[Array, "batch time keys"],
        number: Int[Array, ""],
        dropout_keys: Key[Array, "batch time"] | None,
    ) -> tuple[Float[Array, "batch time channels"], tuple[Array, Array]]:
        config = self.config
        if dropout_keys is not None:
            dropout_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(dropout_keys)

        def project(name: str, heads: int) -> Array:
            features = linear(normed, heads * config.head_dim, name, True, config.dtype, config.lora, dropout_keys)
            features = features.reshape(*hidden.shape[:2], heads, config.head_dim)
            return nn.with_logical_constraint(features, ("rows", None, "heads", None))

        few = hidden.shape[0] * hidden.shape[1] < hidden.shape[2]
        rows, embed = ("few_rows", "embed") if few else ("rows", None)
        hidden = nn.with_logical_constraint(hidden, (rows, None, embed))
        normed = RMSNorm(config.rms_norm_eps, name="input_layernorm")(hidden)
        magnitude = rope_magnitude(config.rope_scaling)
        query = rotate(project("q_proj", config.num_attention_heads), angles, magnitude)
        key = rotate(project("k_proj", config.num_key_value_heads), angles, magnitude)
        value = project("v_proj", config.num_key_value_heads)
        if mask.ndim == 2:
            mixed = causal_attention(query, key, value, mask, config.attention)
        elif isinstance(past, Cache):
            mixed = cached_attention(query, key, value, mask, past)
        else:
            keys, values = [*(part[0] for part in past), key], [*(part[1] for part in past), value]
            mixed = attention(query, keys, values, mask)
        mixed = mixed.reshape(hidden.shape)
        mixed = nn.with_logical_constraint(mixed, (rows, None, "heads"))
        hidden += linear(mixed, config.hidden_size, "o_proj", False, config.dtype, config.lora, dropout_keys)
        mlp = GatedMLP(config.intermediate_size, use_bias=False, dtype=config.dtype, lora=config.lora, name="mlp")
        hidden += mlp(RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")(hidden), dropout_keys)
        return nn.with_logical_constraint(hidden, (rows, None, embed)), (key, value)


class Decoder(nn.Module):
    """Token embeddings, stacked layers, final norm and output head."""

    config: ModelConfig

    def setup(self):
        config = self.config
        layer = DecoderLayer
        if config.remat_policy != "none":
            layer = nn.remat(layer, policy=remat_policy(config.remat_policy), prevent_cse=False)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, 0, nn.broadcast),
            length=config.num_hidden_layers,
        )(config)
        shape = (config.vocab_size, config.hidden_size)
        std = config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0
        self.embed_tokens = self.param("embed_tokens", nn.initializers.normal(std), shape)
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = self.param("lm_head", nn.initializers.normal(config.hidden_size**-0.5), shape)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch channels"]:
        """Return the tokens' embeddings."""
        embeddings = self.embed_tokens[tokens].astype(self.config.dtype)
        if embeddings.ndim == 3:  # looked up sharded by channels, then sharded by rows
            embeddings = nn.with_logical_constraint(embeddings, ("few_rows", None, "embed"))
            embeddings = nn.with_logical_constraint(embeddings, ("rows", None, None))
        return embeddings

    def __call__(
        self,
        inputs: Float[Array, "batch time channels"],
        positions: Int[Array, "batch 3 time"],
        mask: Bool[Array, "batch time"] | Bool[Array, "batch time keys"],
        past: Sequence[KeyValues] = (),
        dropout_keys: Key[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time channels"], KeyValues]:
        """Return the hidden states after the last norm, and the keys and values of these columns.

        Without a past, `mask` marks the columns that are not padding, and attention is causal. With one, it is the
        attention mask: its keys are the columns of every part of `past`, in order, and then the present ones. Adapters
        have dropout where there are `dropout_keys`.
        """
        config = self.config
        angles = rotary_angles(positions, config.mrope_section, config.rope_frequencies)
        numbers = jnp.arange(config.num_hidden_layers)
        hidden, key_values = self.layers(inputs.astype(config.dtype), tuple(past), angles, mask, numbers, dropout_keys)
        return self.norm(hidden), key_values

    def logits(self, hidden: Float[Array, "*batch channels"]) -> Float[Array, "*batch vocab"]:
        """Return float32 logits over the vocabulary."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return jnp.einsum("...c,vc->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def last_projections(
        self, hidden: Float[Array, "batch time channels"]
    ) -> tuple[Float[Array, "batch time heads head_dim"], Float[Array, "batch time key_value_heads head_dim"]]:
        """Return `hidden` under the last layer's q_proj and k_proj, without norm or rotary positions."""
        weights = jax.tree.map(lambda leaf: leaf[-1].astype(hidden.dtype), self.layers.variables["params"])

        def project(name: str) -> Array:
            flat = hidden @ weights[name]["kernel"] + weights[name]["bias"]
            if adapter := weights.get(name + SUFFIX):
                flat += hidden @ adapter["a"] @ adapter["b"] * self.config.lora.scale
            return flat.reshape(*hidden.shape[:2], -1, self.config.head_dim)

        return project("q_proj"), project("k_proj")


def split_layers(decoder: PyTree, outputs_first: bool) -> PyTree:
    """Return a copy of a decoder's parameters with those of each layer apart, for `decode_by_layers`.

    With `outputs_first` matrices are [outputs, inputs]: on a CPU, products with several rows are faster so (by a sixth
    for 16), but with a single row the compiler would transpose them back every time.
    """
    count = len(decoder["layers"]["input_layernorm"]["weight"])
    layers = [jax.tree.map(operator.itemgetter(number), decoder["layers"]) for number in range(count)]
    others = {name: part for name, part in decoder.items() if name != "layers"}
    if not outputs_first:
        return others | {"split_layers": layers}
    return others | {"transposed_layers": [jax.tree.map(jnp.transpose, layer) for layer in layers]}


def decode_by_layers(
    config: ModelConfig,
    decoder: PyTree,
    inputs: Float[Array, "batch time channels"],
    positions: Int[Array, "batch 3 time"],
    mask: Bool[Array, "batch time time"] | Bool[Array, "1 time time"],
    past: Sequence[LayerKeyValues],
    lengths: Int[Array, " batch"],
) -> tuple[Float[Array, "batch time channels"], list[LayerKeyValues]]:
    """Run `Decoder` with a past, from parameters of `split_layers` and a past per layer, heads first.

    Each row attends to the first `lengths` columns of its past, and to the present ones under the mask. A scan over
    stacked layers copies the weights of each before multiplying, which for a single column takes longer than the
    product; and with heads first, attention reads keys and values in their order in memory.
    """
    angles = rotary_angles(positions, config.mrope_section, config.rope_frequencies)
    hidden, key_values = inputs.astype(config.dtype), []
    layers = decoder.get("split_layers") or jax.tree.map(jnp.transpose, decoder["transposed_layers"])
    for number, (layer, layer_past) in enumerate(zip(layers, past, strict=True)):
        call = DecoderLayer(config).apply
        cache = Cache(*layer_past, lengths)
        hidden, new = call({"params": layer}, hidden, cache, angles, mask, jnp.int32(number), None)
        key_values.append(tuple(jnp.swapaxes(part, 1, 2) for part in new))
    return RMSNorm(config.rms_norm_eps).apply({"params": decoder["norm"]}, hidden), key_values
