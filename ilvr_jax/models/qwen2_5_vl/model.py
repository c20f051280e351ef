"""Qwen2.5-VL: the vision tower and the decoder as pure functions of their parameters.

Parameters are {"vision": ..., "decoder": ...}, and "adapters" with LoRA; every method takes the part it needs, and
`decoder_params` joins the decoder with its adapters.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from ilvr_jax.models.attention import KVCache, attention_weights, causal_mask
from ilvr_jax.models.lora import split_adapters
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl.decoder import Decoder, KeyValues
from ilvr_jax.models.qwen2_5_vl.images import MERGE, FeatureBatch, ImageBatch, WindowGeometry
from ilvr_jax.models.qwen2_5_vl.rotary import rotate
from ilvr_jax.models.qwen2_5_vl.vision import VisionTower


@dataclasses.dataclass(frozen=True)
class Qwen2_5VL:
    """A model of a given shape, without parameters."""

    config: ModelConfig

    @functools.cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.config)

    @functools.cached_property
    def vision(self) -> VisionTower:
        return VisionTower(self.config.vision, self.config.dtype)

    @property
    def geometry(self) -> WindowGeometry:
        return self.config.vision.geometry

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Return fresh float32 parameters."""
        vision_key, decoder_key = jax.random.split(key)
        shape = self.config.vision
        patches = shape.window_units**2 * MERGE**2
        images = ImageBatch(
            pixels=jnp.zeros((1, 1, patches, shape.patch_dim // shape.temporal_patch_size), jnp.uint8),
            coordinates=jnp.zeros((1, 1, patches, 2), jnp.int32),
            patch_valid=jnp.ones((1, 1, patches), bool),
            raster_order=jnp.zeros((1, patches // MERGE**2), jnp.int32),
            unit_valid=jnp.ones((1, patches // MERGE**2), bool),
        )
        inputs_embeds = jnp.zeros((1, 1, self.config.hidden_size))
        position_ids, attention_mask = jnp.zeros((1, 3, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
        vision = self.vision.init(vision_key, images)["params"]
        decoder, adapters = split_adapters(
            self.decoder.init(decoder_key, inputs_embeds, position_ids, attention_mask)["params"]
        )
        return {"vision": vision, "decoder": decoder} | ({"adapters": adapters} if adapters else {})

    def encode_images(
        self, vision: PyTree, images: ImageBatch | FeatureBatch
    ) -> Float[Array, "*images units channels"]:
        """Return each image's vision tokens in raster order, padding last; those of a FeatureBatch unchanged."""
        if isinstance(images, FeatureBatch):
            return images.features
        if not images.pixels.size:  # a layout without room for such images
            return jnp.zeros((*images.raster_order.shape, self.config.hidden_size), self.config.dtype)
        return self.vision.apply({"params": vision}, images)

    def embed(
        self,
        decoder: PyTree,
        tokens: Int[Array, "rows columns"],
        image_index: Int[Array, "rows columns"] | None = None,
        features: Float[Array, "rows images units channels"] | None = None,
    ) -> Float[Array, "rows columns channels"]:
        """Return the inputs of the decoder: token embeddings, and image features where `image_index` >= 0."""
        embeddings = self.decoder.apply({"params": decoder}, tokens, method="embed")
        if features is None or not features.shape[1] * features.shape[2]:
            return embeddings
        flat = features.reshape(features.shape[0], -1, features.shape[-1])
        placed = jnp.take_along_axis(flat, jnp.maximum(image_index, 0)[..., None], axis=1)
        return jnp.where((image_index >= 0)[..., None], placed.astype(embeddings.dtype), embeddings)

    def decode(
        self,
        decoder: PyTree,
        inputs_embeds: Float[Array, "rows columns channels"],
        position_ids: Int[Array, "rows 3 columns"],
        attention_mask: Bool[Array, "rows columns"] | Bool[Array, "rows columns keys"],
        past: Sequence[KeyValues] | KVCache = (),
        dropout_keys: Key[Array, "rows columns"] | None = None,
    ) -> tuple[Float[Array, "rows columns channels"], KeyValues]:
        """Return final hidden states and these columns' keys and values; see `Decoder.__call__`."""
        return self.decoder.apply({"params": decoder}, inputs_embeds, position_ids, attention_mask, past, dropout_keys)

    def attention_weights(
        self,
        decoder: PyTree,
        inputs_embeds: Float[Array, "rows columns channels"],
        position_ids: Int[Array, "rows 3 columns"],
        attention_mask: Bool[Array, "rows columns"] | Bool[Array, "rows columns columns"],
        queries: Int[np.ndarray, " queries"],
        layers: int,
    ) -> Float[Array, "rows layers heads queries columns"]:
        """Return the weights with which some columns attend to all, float32, in the last layers (all if fewer)."""
        (_, (keys, _)), kept = self.decoder.apply(
            {"params": decoder}, inputs_embeds, position_ids, attention_mask, mutable=["intermediates"]
        )
        (query,), last = kept["intermediates"]["layers"]["query"], slice(-layers, None)
        mask = causal_mask(attention_mask) if attention_mask.ndim == 2 else attention_mask
        of_layers = jax.vmap(attention_weights, in_axes=(0, 0, None), out_axes=1)
        return of_layers(query[last][:, :, queries], keys[last], mask[:, queries])

    def logits(self, decoder: PyTree, hidden_states: Float[Array, "*batch channels"]) -> Float[Array, "*batch vocab"]:
        """Return float32 logits."""
        return self.decoder.apply({"params": decoder}, hidden_states, method="logits")

    def shift_keys(
        self, keys: Float[Array, "*batch key_value_heads head_dim"], shift: Int[Array, "*batch"]
    ) -> Float[Array, "*batch key_value_heads head_dim"]:
        """Return keys of text-like positions (equal on all axes) as they would be `shift` positions later."""
        # A rotation by the difference, without a magnitude: the keys have YaRN's already.
        return rotate(keys, shift[..., None].astype(jnp.float32) * self.config.rope_frequencies)

    def last_projections(
        self, decoder: PyTree, hidden_states: Float[Array, "rows columns channels"]
    ) -> tuple[Array, Array]:
        """Return `hidden_states` under the last layer's query and key projections."""
        return self.decoder.apply({"params": decoder}, hidden_states, method="last_projections")
