"""Qwen2.5-VL's decoder: a causal transformer over embeddings, with explicit masks, positions and cache."""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ilvr_jax.models.attention import KVCache, attention, cached_attention, causal_attention
from ilvr_jax.models.layers import GatedMLP, RMSNorm
from ilvr_jax.models.lora import SUFFIX, linear
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl.rotary import rope_magnitude, rotary_angles, rotate

# Keys and values of some columns, each [layers, batch, columns, key_value_heads, head_dim]; of SplitLayers, tuples.
Heads = Float[Array, "layers batch columns heads head_dim"] | tuple[Array, ...]
KeyValues = tuple[Heads, Heads]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["outputs_first"])
@dataclasses.dataclass(frozen=True)
class SplitLayers:
    """The parameters of a decoder's layers, each apart; with `outputs_first` every matrix is transposed.

    A scan over stacked layers copies the weights of each before multiplying on a CPU, which for a single column takes
    longer than the product.
    """

    layers: tuple[PyTree, ...]
    outputs_first: bool


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
        hidden_states: Float[Array, "batch time channels"],
        past: Sequence[tuple[Array, Array]],
        kv_cache: KVCache | None,
        angles: Float[Array, "batch time half"],
        attention_mask: Bool[Array, "batch time"] | Bool[Array, "batch time keys"],
        number: Int[Array, ""],
        dropout_keys: Key[Array, "batch time"] | None,
    ) -> tuple[Float[Array, "batch time channels"], tuple[Array, Array]]:
        config = self.config
        if dropout_keys is not None:
            dropout_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(dropout_keys)

        def project(name: str, heads: int) -> Array:
            features = linear(normed, heads * config.head_dim, name, True, config.dtype, config.lora, dropout_keys)
            features = features.reshape(*hidden_states.shape[:2], heads, config.head_dim)
            return nn.with_logical_constraint(features, ("rows", None, "heads", None))

        few = hidden_states.shape[0] * hidden_states.shape[1] < hidden_states.shape[2]
        rows, embed = ("few_rows", "embed") if few else ("rows", None)
        hidden_states = nn.with_logical_constraint(hidden_states, (rows, None, embed))
        normed = RMSNorm(config.rms_norm_eps, name="input_layernorm")(hidden_states)
        magnitude = rope_magnitude(config.rope_scaling)
        query = rotate(project("q_proj", config.num_attention_heads), angles, magnitude)
        key = rotate(project("k_proj", config.num_key_value_heads), angles, magnitude)
        value = project("v_proj", config.num_key_value_heads)
        self.sow("intermediates", "query", query)  # kept for `attention_weights` alone
        if kv_cache is not None:
            mixed = cached_attention(query, key, value, attention_mask, kv_cache, number)
        elif attention_mask.ndim == 2:
            mixed = causal_attention(query, key, value, attention_mask, config.attention)
        else:
            keys, values = [*(part[0] for part in past), key], [*(part[1] for part in past), value]
            mixed = attention(query, keys, values, attention_mask)
        mixed = mixed.reshape(hidden_states.shape)
        mixed = nn.with_logical_constraint(mixed, (rows, None, "heads"))
        hidden_states += linear(mixed, config.hidden_size, "o_proj", False, config.dtype, config.lora, dropout_keys)
        mlp = GatedMLP(config.intermediate_size, use_bias=False, dtype=config.dtype, lora=config.lora, name="mlp")
        hidden_states += mlp(RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")(hidden_states), dropout_keys)
        return nn.with_logical_constraint(hidden_states, (rows, None, embed)), (key, value)


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
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast),
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
        inputs_embeds: Float[Array, "batch time channels"],
        position_ids: Int[Array, "batch 3 time"],
        attention_mask: Bool[Array, "batch time"] | Bool[Array, "batch time keys"],
        past: Sequence[KeyValues] | KVCache = (),
        dropout_keys: Key[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time channels"], KeyValues]:
        """Return the hidden states after the last norm, and the keys and values of these columns.

        Without a past, `attention_mask` marks the columns that are not padding, and attention is causal. With parts of
        a past, its keys are the columns of every part, in order, and then the present ones. With a KVCache it is the
        mask among the present columns. Adapters have dropout where there are `dropout_keys`.
        """
        config = self.config
        angles = rotary_angles(position_ids, config.mrope_section, config.rope_frequencies)
        numbers = jnp.arange(config.num_hidden_layers)
        past, kv_cache = ((), past) if isinstance(past, KVCache) else (tuple(past), None)
        hidden_states = inputs_embeds.astype(config.dtype)
        layers = self.variables.get("params", {}).get("layers")
        if isinstance(layers, SplitLayers):
            hidden_states, key_values = self._run_split(layers, hidden_states, kv_cache, angles, attention_mask)
        else:
            hidden_states, key_values = self.layers(
                hidden_states, past, kv_cache, angles, attention_mask, numbers, dropout_keys
            )
        return self.norm(hidden_states), key_values

    def _run_split(
        self, split: SplitLayers, hidden_states: Array, kv_cache: KVCache | None, angles: Array, attention_mask: Array
    ) -> tuple[Array, KeyValues]:
        """Run the layers one by one."""
        key_values, layer = [], DecoderLayer(self.config, parent=None)
        for number, params in enumerate(split.layers):
            params = jax.tree.map(jnp.transpose, params) if split.outputs_first else params
            hidden_states, new = layer.apply(
                {"params": params}, hidden_states, (), kv_cache, angles, attention_mask, number, None
            )
            key_values.append(new)
        return hidden_states, tuple(zip(*key_values, strict=True))

    def logits(self, hidden_states: Float[Array, "*batch channels"]) -> Float[Array, "*batch vocab"]:
        """Return float32 logits over the vocabulary."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        if hidden_states.ndim == 2:  # a token of each row: moved to the head
            hidden_states = nn.with_logical_constraint(hidden_states, ("few_rows", "embed"))
        return jnp.einsum(
            "...c,vc->...v", hidden_states, head.astype(hidden_states.dtype), preferred_element_type=jnp.float32
        )

    def last_projections(
        self, hidden_states: Float[Array, "batch time channels"]
    ) -> tuple[Float[Array, "batch time heads head_dim"], Float[Array, "batch time key_value_heads head_dim"]]:
        """Return `hidden_states` under the last layer's q_proj and k_proj, without norm or rotary positions."""
        weights = jax.tree.map(lambda leaf: leaf[-1].astype(hidden_states.dtype), self.layers.variables["params"])

        def project(name: str) -> Array:
            flat = hidden_states @ weights[name]["kernel"] + weights[name]["bias"]
            if adapter := weights.get(name + SUFFIX):
                flat += hidden_states @ adapter["a"] @ adapter["b"] * self.config.lora.scale
            return flat.reshape(*hidden_states.shape[:2], -1, self.config.head_dim)

        return project("q_proj"), project("k_proj")


def split_layers(decoder: PyTree, outputs_first: bool) -> PyTree:
    """Return a copy of a decoder's parameters in which its layers are SplitLayers.

    With `outputs_first` matrices are [outputs, inputs]: on a CPU, products with several rows are faster so (by a sixth
    for 16), but with a single row the compiler would transpose them back every time.
    """
    count = len(decoder["layers"]["input_layernorm"]["weight"])
    layers = tuple(jax.tree.map(operator.itemgetter(number), decoder["layers"]) for number in range(count))
    if outputs_first:
        layers = jax.tree.map(jnp.transpose, layers)
    return decoder | {"layers": SplitLayers(layers, outputs_first)}
