"""Qwen2.5-VL's vision tower: window attention, full attention in some layers, 2x2 merger."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from ilvr_jax.models.attention import attention
from ilvr_jax.models.layers import GatedMLP, RMSNorm
from ilvr_jax.models.qwen2_5_vl.config import VisionConfig
from ilvr_jax.models.qwen2_5_vl.images import MERGE, ImageBatch
from ilvr_jax.models.qwen2_5_vl.rotary import rotate, vision_angles

NORM_EPSILON = 1e-6


class PatchEmbedding(nn.Module):
    """Linear embedding of patches, given as normalised pixels of both frames or as bytes of a still image."""

    config: VisionConfig
    dtype: str

    @nn.compact
    def __call__(self, pixels: Shaped[Array, "*batch patch_dim"]) -> Float[Array, "*batch channels"]:
        config = self.config
        std = config.patch_init_std or config.patch_dim**-0.5
        kernel = self.param("kernel", nn.initializers.normal(std), (config.patch_dim, config.hidden_size))
        if pixels.dtype == jnp.uint8:
            # A still image is two equal frames: summing the kernel over them halves the work.
            frames = (config.in_channels, config.temporal_patch_size, config.patch_size**2, config.hidden_size)
            kernel = kernel.reshape(frames).sum(1).reshape(-1, config.hidden_size)
            channels = pixels.reshape(*pixels.shape[:-1], config.in_channels, -1).astype(jnp.float32) / 255.0
            mean, deviation = jnp.array(config.image_mean)[:, None], jnp.array(config.image_std)[:, None]
            pixels = ((channels - mean) / deviation).reshape(pixels.shape)
        return jnp.dot(pixels.astype(self.dtype), kernel.astype(self.dtype))


class VisionBlock(nn.Module):
    """One transformer layer over groups of patches that attend to each other."""

    config: VisionConfig
    dtype: str

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "groups patches channels"],
        angles: Float[Array, "groups patches half"],
        valid: Bool[Array, "groups patches"],
    ) -> Float[Array, "groups patches channels"]:
        config = self.config
        normed = RMSNorm(NORM_EPSILON, name="norm1")(hidden)
        qkv = nn.Dense(3 * config.hidden_size, dtype=self.dtype, name="qkv")(normed)
        query, key, value = jnp.split(qkv.reshape(*hidden.shape[:2], 3 * config.num_heads, -1), 3, axis=2)
        mixed = attention(rotate(query, angles), [rotate(key, angles)], [value], valid[:, None])
        hidden += nn.Dense(config.hidden_size, dtype=self.dtype, name="proj")(mixed.reshape(hidden.shape))
        mlp = GatedMLP(config.intermediate_size, use_bias=True, dtype=self.dtype, name="mlp")
        return hidden + mlp(RMSNorm(NORM_EPSILON, name="norm2")(hidden))


class VisionTower(nn.Module):
    """The encoder of images into vision tokens, one for each merge unit of 2x2 patches."""

    config: VisionConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: ImageBatch) -> Float[Array, "*images units out_hidden_size"]:
        """Return the features of every image in raster order; those of padding are meaningless.

        Attention is within each window, or, in the layers of `fullatt_block_indexes`, within each image.
        """
        config = self.config
        leading, (windows, window_patches) = images.pixels.shape[:-3], images.pixels.shape[-3:-1]

        def grouped(array: Array, group: int) -> Array:
            return array.reshape(-1, group, array.shape[-1])

        hidden = PatchEmbedding(config, self.dtype, name="patch_embed")(images.pixels)
        angles = vision_angles(images.coordinates, config.hidden_size // config.num_heads)
        for layer in range(config.depth):
            group = windows * window_patches if layer in config.fullatt_block_indexes else window_patches
            valid = images.patch_valid.reshape(-1, group)
            block = VisionBlock(config, self.dtype, name=f"blocks_{layer}")
            hidden = block(grouped(hidden, group), grouped(angles, group), valid)
        merged = RMSNorm(NORM_EPSILON, name="ln_q")(hidden).reshape(*leading, -1, MERGE**2 * config.hidden_size)
        merged = nn.Dense(merged.shape[-1], dtype=self.dtype, name="merger_in")(merged)
        merged = nn.gelu(merged, approximate=False)
        features = nn.Dense(config.out_hidden_size, dtype=self.dtype, name="merger_out")(merged)
        return jnp.take_along_axis(features, images.raster_order[..., None], axis=-2)
