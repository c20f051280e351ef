"""Images as the vision tower takes them, patches in attention windows, or as it left them; padded to dense arrays."""

from typing import NamedTuple

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

MERGE = 2  # patches a side that the merger turns into one vision token
STILL_PATCH_DIM = 3 * 14 * 14  # bytes of a patch of a still image


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
    """One image as the features that the vision tower made of it, one for each vision token."""

    features: Float[np.ndarray, "rows columns channels"]

    @property
    def height(self) -> int:
        """In patches, like that of a PatchedImage."""
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

    Edge windows, small images and absent images are padded; `patch_valid` says what is real. The features
    of an image come out in raster order of its merge units, padding last.
    """

    pixels: Shaped[jax.Array, "*images windows window_patches patch_dim"]
    coordinates: Int[jax.Array, "*images windows window_patches 2"]  # row, column of the patch
    patch_valid: Bool[jax.Array, "*images windows window_patches"]
    raster_order: Int[jax.Array, "*images units"]  # where the window layout holds the i-th unit
    unit_valid: Bool[jax.Array, "*images units"]


@flax.struct.dataclass
class FeatureBatch:
    """The features of images of any number and size, in raster order, padding last. Leading axes are free."""

    features: Float[jax.Array, "*images units channels"]
    unit_valid: Bool[jax.Array, "*images units"]


def window_shape(height: int, width: int, window_units: int) -> tuple[int, int]:
    """Returns how many windows of `window_units` merge units a side cover an image of so many patches."""
    return -(-height // (MERGE * window_units)), -(-width // (MERGE * window_units))


def window_count(image: PatchedImage | EncodedImage, window_units: int) -> int:
    """Returns how many attention windows the image takes."""
    rows, columns = window_shape(image.height, image.width, window_units)
    return rows * columns


def stack_images(
    images: list[list[PatchedImage]], per_row: int, windows: int, window_units: int, patch_dim: int, dtype
) -> ImageBatch:
    """Lays ragged lists of images out as an ImageBatch with leading axes [rows, per_row].

    Window attention is that of Qwen2.5-VL: windows of `window_units` x `window_units` merge units, in raster
    order, partial at the right and lower edge. Raises ValueError if a list or an image does not fit.
    """
    window_area = window_units**2
    shape = (len(images), per_row, windows * window_area)
    pixels = np.zeros((*shape, MERGE**2, patch_dim), dtype)
    coordinates = np.zeros((*shape, MERGE**2, 2), np.int32)
    slot_valid = np.zeros(shape, bool)
    raster_order = np.zeros(shape, np.int32)
    unit_valid = np.zeros(shape, bool)
    corner = np.stack(np.meshgrid(np.arange(MERGE), np.arange(MERGE), indexing="ij"), -1).reshape(-1, 2)
    check_room(images, per_row, windows, window_units)
    for row, row_images in enumerate(images):
        for number, image in enumerate(row_images):
            units = np.stack(
                np.meshgrid(np.arange(image.height // MERGE), np.arange(image.width // MERGE), indexing="ij"), -1
            ).reshape(-1, 2)
            window_row, window_column = (units // window_units).T
            inside_row, inside_column = (units % window_units).T
            window = window_row * window_shape(image.height, image.width, window_units)[1] + window_column
            place = window * window_area + inside_row * window_units + inside_column
            pixels[row, number, place] = image.pixels.reshape(len(units), MERGE**2, patch_dim)
            coordinates[row, number, place] = units[:, None] * MERGE + corner
            slot_valid[row, number, place] = True
            raster_order[row, number, : len(units)] = place
            unit_valid[row, number, : len(units)] = True
    in_windows = (*shape[:2], windows, window_area * MERGE**2)
    return ImageBatch(
        pixels=pixels.reshape(*in_windows, patch_dim),
        coordinates=coordinates.reshape(*in_windows, 2),
        patch_valid=np.repeat(slot_valid[..., None], MERGE**2, -1).reshape(in_windows),
        raster_order=raster_order,
        unit_valid=unit_valid,
    )


def stack_features(
    images: list[list[EncodedImage]], per_row: int, windows: int, window_units: int, channels: int, dtype
) -> FeatureBatch:
    """Lays ragged lists of encoded images out as a FeatureBatch with leading axes [rows, per_row].

    There is room for as many features an image as `windows` attention windows have. Raises ValueError if a list or an
    image does not fit.
    """
    check_room(images, per_row, windows, window_units)
    shape = (len(images), per_row, windows * window_units**2)
    features, unit_valid = np.zeros((*shape, channels), dtype), np.zeros(shape, bool)
    for row, row_images in enumerate(images):
        for number, image in enumerate(row_images):
            features[row, number, : image.vision_tokens] = image.features.reshape(-1, channels)
            unit_valid[row, number, : image.vision_tokens] = True
    return FeatureBatch(features, unit_valid)


def check_room(
    images: list[list[PatchedImage]] | list[list[EncodedImage]], per_row: int, windows: int, window_units: int
) -> None:
    """Raises ValueError if a row has more than `per_row` images or one of them takes more than so many windows."""
    for row_images in images:
        if len(row_images) > per_row:
            raise ValueError(f"a sample has {len(row_images)} images and the layout has room for {per_row}")
        for image in row_images:
            if window_count(image, window_units) > windows:
                raise ValueError(
                    f"an image takes {window_count(image, window_units)} windows and the layout has room for {windows}"
                )
