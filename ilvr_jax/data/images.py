"""Pixels: reading image files, scaling, and cutting into patches for the vision tower."""

import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ilvr_jax.data.records import BadRecord, ImageSource
from ilvr_jax.models.images import MERGE, PatchedImage

PATCH = 14  # pixels a side of a patch
UNIT = PATCH * MERGE  # pixels a side of a merge unit, one vision token

# What Pillow's decoders let through on damaged files.
DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def load_image(source: ImageSource, scale: float = 1.0) -> UInt8[np.ndarray, "height width 3"]:
    """Returns an image as RGB, its sides scaled and rounded to multiples of 28 pixels (one vision token), at least 28.

    Shrinking by `scale` averages boxes of pixels; rounding alone interpolates (bicubic). Raises BadRecord if a
    file is missing, truncated or no image, or an array is not uint8 [height, width, 3].
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise BadRecord(f"an image is {source.dtype} {list(source.shape)}; uint8 [height, width, 3] is accepted")
        if scale == 1.0 and source.shape[0] % UNIT == 0 and source.shape[1] % UNIT == 0:
            return source
        image = Image.fromarray(source)
    else:
        image = _read(Path(source))
    if scale < 1.0:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    size = tuple(max(UNIT, round(side * max(scale, 1.0) / UNIT) * UNIT) for side in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


def _read(path: Path) -> Image.Image:
    if not path.is_file():
        raise BadRecord(f"{path}: there is no such file; an image file is accepted")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise BadRecord(f"{path}: is not an image; a PNG, JPEG or other image file is accepted") from error
    except DECODING_ERRORS as error:
        raise BadRecord(f"{path}: cannot be decoded as an image ({error}); a whole image file is accepted") from error


def patch_image(pixels: UInt8[np.ndarray, "height width 3"]) -> PatchedImage:
    """Cuts an image into patches as the Qwen2-VL image processor orders them, one frame, not normalised.

    Raises ValueError if a side is not a multiple of 28 pixels.
    """
    height, width = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    if pixels.shape[0] % UNIT or pixels.shape[1] % UNIT:
        raise ValueError(f"an image of {pixels.shape[1]}x{pixels.shape[0]} pixels; multiples of {UNIT} are accepted")
    units = pixels.reshape(height // MERGE, MERGE, PATCH, width // MERGE, MERGE, PATCH, 3)
    patches = units.transpose(0, 3, 1, 4, 6, 2, 5).reshape(height * width, 3 * PATCH * PATCH)
    return PatchedImage(patches, height, width)
