"""Images as dense arrays, padded: patches in attention windows for the vision tower, or features from it."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ilvr_jax.models.qwen2_5_vl.positions import mrope_positions

MERGE = 2  # patches along a side of a merge unit, one vision token
STILL_PATCH_DIM = 3 * 14 * 14  # bytes of a still image's patch


class PatchedImage(NamedTuple):
    """One image cut into patches, in the order of the Qwen2-VL image processor.

    `pixels` [patches, patch_dim]: uint8 of one frame (patch_dim 588, a still image), or float32 already
    normalised with both frames (patch_dim 1176). The four patches of a merge unit are consecutive; units
    are in raster order. `height` and `width` count patches and are even.
    """

    pixels: Shaped[np.ndarray, "patches patch_dim"]
    height: int
    width: int

    @property
    def vision_tokens(self) -> int:
        return self.height * self.width // MERGE**2


class EncodedImage(NamedTuple):
    """One image as features from the vision tower, one for each vision token."""

    features: Float[np.ndarray, "rows columns channels"]

    @property
    def height(self) -> int:
        """Height in patches, as of a PatchedImage."""
        return MERGE * self.features.shape[0]

    @property
    def width(self) -> int:
        return MERGE * self.features.shape[1]

    @property
    def vision_tokens(self) -> int:
        return self.features.shape[0] * self.features.shape[1]


@flax.struct.dataclass
class ImageBatch:
    """Images of any number and size as dense windows of patches. Leading axes are free.

    Edge windows, small images and absent images are padded, where `patch_valid` is false. The tower returns the
    features of an image in raster order of its merge units, padding last.
    """

    pixels: Shaped[jax.Array, "*images windows window_patches patch_dim"]
    coordinates: Int[jax.Array, "*images windows window_patches 2"]  # row, column of the patch
    patch_valid: Bool[jax.Array, "*images windows window_patches"]
    raster_order: Int[jax.Array, "*images units"]  # the place of the i-th unit in the window layout
    unit_valid: Bool[jax.Array, "*images units"]


@flax.struct.dataclass
class FeatureBatch:
    """The features of images of any number and size, in raster order, padding last. Leading axes are free."""

    features: Float[jax.Array, "*images units channels"]
    unit_valid: Bool[jax.Array, "*images units"]


@dataclasses.dataclass(frozen=True)
class WindowGeometry:
    """The layout of images for a vision tower with window attention; see `models.base.ImageGeometry`."""

    window_units: int  # merge units (vision tokens) along a side of an attention window

    @property
    def window_tokens(self) -> int:
        """Vision tokens of a window."""
        return self.window_units**2

    def room(self, image: PatchedImage | EncodedImage) -> int:
        """Return the vision tokens that an image takes in a batch: those of all windows that cover it."""
        rows, columns = self._windows(image)
        return rows * columns * self.window_tokens

    def position_ids(
        self, tokens: Int[np.ndarray, " time"], grids: Sequence[tuple[int, int]], image_token: int
    ) -> Int[np.ndarray, "3 time"]:
        """Return the positions of a sequence's tokens; see `positions.mrope_positions`."""
        return mrope_positions(tokens, grids, image_token)

    def stack(
        self,
        images: Sequence[Sequence[PatchedImage]] | Sequence[Sequence[EncodedImage]],
        per_row: int,
        tokens: int,
        like: PatchedImage | EncodedImage,
    ) -> ImageBatch | FeatureBatch:
        """Return ragged lists of images as dense arrays with leading axes [rows, per_row].

        `tokens` is the room of each image; `like` has the kind, the channels and the dtype of all of them. Raises
        ValueError if a list or an image does not fit.
        """
        for row_images in images:
            if len(row_images) > per_row:
                raise ValueError(f"a sample must have at most {per_row} images, got {len(row_images)}")
            for image in row_images:
                if self.room(image) > tokens:
                    raise ValueError(
                        f"an image must take at most {tokens} vision tokens in a batch, got {self.room(image)}"
                    )
        channels, dtype = like[0].shape[-1], like[0].dtype
        if isinstance(like, EncodedImage):
            return _stack_features(images, (len(images), per_row, tokens), channels, dtype)
        return self._stack_patches(images, (len(images), per_row, tokens), channels, dtype)

    def _windows(self, image: PatchedImage | EncodedImage) -> tuple[int, int]:
        """Return the numbers of windows that cover an image's height and width."""
        return -(-image.height // (MERGE * self.window_units)), -(-image.width // (MERGE * self.window_units))

    def _stack_patches(
        self, images: Sequence[Sequence[PatchedImage]], shape: tuple[int, int, int], patch_dim: int, dtype: np.dtype
    ) -> ImageBatch:
        """Lay images out in windows in raster order, those at the right and lower edge partial, as Qwen2.5-VL does."""
        windows = shape[-1] // self.window_tokens
        units = (*shape[:2], windows * self.window_tokens)
        pixels = np.zeros((*units, MERGE**2, patch_dim), dtype)
        coordinates = np.zeros((*units, MERGE**2, 2), np.int32)
        valid = np.zeros(units, bool)
        raster_order, unit_valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
        corner = np.stack(np.meshgrid(np.arange(MERGE), np.arange(MERGE), indexing="ij"), -1).reshape(-1, 2)
        for row, row_images in enumerate(images):
            for number, image in enumerate(row_images):
                grid = np.indices((image.height // MERGE, image.width // MERGE)).reshape(2, -1).T
                window_row, window_column = (grid // self.window_units).T
                inside_row, inside_column = (grid % self.window_units).T
                window = window_row * self._windows(image)[1] + window_column
                place = window * self.window_tokens + inside_row * self.window_units + inside_column
                pixels[row, number, place] = image.pixels.reshape(len(grid), MERGE**2, patch_dim)
                coordinates[row, number, place] = grid[:, None] * MERGE + corner
                valid[row, number, place] = True
                raster_order[row, number, : len(grid)] = place
                unit_valid[row, number, : len(grid)] = True
        in_windows = (*shape[:2], windows, self.window_tokens * MERGE**2)
        return ImageBatch(
            pixels=pixels.reshape(*in_windows, patch_dim),
            coordinates=coordinates.reshape(*in_windows, 2),
            patch_valid=np.repeat(valid[..., None], MERGE**2, -1).reshape(in_windows),
            raster_order=raster_order,
            unit_valid=unit_valid,
        )


def _stack_features(
    images: Sequence[Sequence[EncodedImage]], shape: tuple[int, int, int], channels: int, dtype: np.dtype
) -> FeatureBatch:
    features, unit_valid = np.zeros((*shape, channels), dtype), np.zeros(shape, bool)
    for row, row_images in enumerate(images):
        for number, image in enumerate(row_images):
            features[row, number, : image.vision_tokens] = image.features.reshape(-1, channels)
            unit_valid[row, number, : image.vision_tokens] = True
    return FeatureBatch(features, unit_valid)
