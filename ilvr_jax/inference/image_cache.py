"""The images of requests: encoded, and their vision tokens kept for requests to come."""

import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ilvr_jax.inference.requests import Picture
from ilvr_jax.models.base import Model
from ilvr_jax.models.qwen2_5_vl.images import MERGE, EncodedImage, ImageBatch
from ilvr_jax.models.sharding import replicate

CAPACITY = 64  # images


class ImageCache:
    """Encodes images, padded to one of `sizes` in vision tokens, and keeps the results of those used last."""

    def __init__(self, model: Model, vision: PyTree, sizes: Sequence[int]):
        self._model, self._vision, self._sizes = model, vision, sizes
        self._features: dict[bytes, Array] = {}  # by digest, the least recently used first

    def check_size(self, image: Picture) -> None:
        """Raise ValueError, one sentence, if an image is larger than all sizes."""
        largest, room = max(self._sizes, default=0), self._model.geometry.room(image)
        if room > largest:
            raise ValueError(
                f"an image must take at most {largest} vision tokens, whole attention windows counted, got {room} for "
                f"{image.width // MERGE}x{image.height // MERGE}"
            )

    def features(self, image: Picture) -> Float[Array, "units channels"]:
        """Return an image's vision tokens, from the cache if they are there."""
        digest = image_digest(image)
        features = self._features.pop(digest, None)
        if features is None:
            room = self._model.geometry.room(image)
            features = self.encode(image, next(size for size in self._sizes if size >= room))
        self._features[digest] = features
        if len(self._features) > CAPACITY:
            self._features.pop(next(iter(self._features)))
        return features

    def encode(self, image: Picture, tokens: int) -> Float[Array, "units channels"]:
        """Return an image's vision tokens, padded to `tokens`."""
        batch = self._model.geometry.stack([[image]], 1, tokens, image)
        if isinstance(image, EncodedImage):
            return jnp.asarray(batch.features[0, 0], self._model.config.dtype)
        return encode_image(self._model, self._vision, batch)


@functools.partial(jax.jit, static_argnames="model")
def encode_image(model: Model, vision: PyTree, images: ImageBatch) -> Float[Array, "units channels"]:
    """Return the vision tokens of one image; the leading axes of `images` have size 1."""
    return replicate(model.encode_images(vision, images)[0, 0])


@functools.partial(jax.jit, donate_argnames="vision_inputs")
def place_features(
    vision_inputs: Float[Array, "slots places channels"],
    features: Float[Array, "units channels"],
    slot: Int[Array, ""],
    place: Int[Array, ""],
) -> Float[Array, "slots places channels"]:
    """Return the inputs of vision tokens with an image's features in a slot from `place` on."""
    return jax.lax.dynamic_update_slice(vision_inputs, features[None].astype(vision_inputs.dtype), (slot, place, 0))


def image_digest(image: Picture) -> bytes:
    """Return a digest of an image's size and content."""
    digest = hashlib.sha256(f"{type(image).__name__} {image.height} {image.width} {image[0].dtype}".encode())
    digest.update(np.ascontiguousarray(image[0]).data)
    return digest.digest()
