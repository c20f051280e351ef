"""Images as pixels: read from files, scaled, and cut into patches for the vision tower."""

import contextlib
import ctypes
import io
import logging
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, TiffImagePlugin

from ilvr_jax.data.records import BadRecord, ImageSource
from ilvr_jax.errors import InputError, quote
from ilvr_jax.files import POINTER, open_regular, read_object
from ilvr_jax.models.qwen2_5_vl.images import MERGE, PatchedImage

PATCH = 14  # pixels along a side of a patch
UNIT = PATCH * MERGE  # pixels along a side of a merge unit, one vision token
ASPECT_RATIO = 200  # the largest that smart_resize allows
MOST_PIXELS = 2**27  # of an image, in the file and after scaling: 134 megapixels
MOST_BYTES = 8 * MOST_PIXELS  # of an image file: four uncompressed channels of 16 bits
STRIP_PIXELS = 2**22

# The formats that Pillow may open. Others run programs (EPS), or are rare, with decoders that are little tested.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# The errors of Pillow's decoders on damaged files, damaged EXIF data included.
DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    MemoryError,
    struct.error,
    zlib.error,
)

# Damage is raised as one BadRecord; Pillow's warnings and log lines would repeat it.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError):  # a libtiff with hidden functions prints anyway
    for kind in ("Error", "Warning"):  # libtiff writes a line to stderr for each damaged row
        getattr(ctypes.CDLL(Image.core.__file__), f"TIFFSet{kind}Handler")(None)

# The names of this module's image processor in published checkpoints, and its settings.
IMAGE_PROCESSORS = (
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
    "Qwen2_5_VLImageProcessor",
)
PROCESSING = {
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


def load_image(
    source: ImageSource,
    scale: float = 1.0,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Return an image as RGB, its sides scaled and rounded to multiples of 28 pixels (one vision token), at least 28.

    `source` is an image file, the bytes of one, or pixels: uint8 [height, width, 3]. Shrinking by `scale` averages
    boxes of pixels; all other resizing is bicubic. With `min_pixels` or `max_pixels` sizes and pixels are those of
    transformers' Qwen2-VL image processor with these bounds; a bound that is None is 784 pixels (one vision token)
    or infinite. Transparent pixels become white, as there; EXIF rotation is applied, and 16 bits are cut to the upper
    8.

    Raises BadRecord if a file cannot be read or decoded, has another format than `FORMATS`, several frames or 32 bits
    per channel; if it has more than `MOST_PIXELS`, checked before decoding, or more after scaling; if one side is over
    200 times the other (after `scale`); or if an array is not uint8 [height, width, 3].
    """
    if isinstance(source, np.ndarray):
        name = "an image"
    else:
        name = f"an image of {len(source)} bytes" if isinstance(source, bytes) else str(source)

    def scaled(sides: tuple[int, int]) -> tuple[float, float]:
        return tuple(max(1, round(side * scale)) if scale < 1.0 else side * scale for side in sides)

    def fit(sides: tuple[int, int]) -> tuple[int, int]:
        return _fitting_size(*scaled(sides), min_pixels, max_pixels, name)

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise BadRecord(f"{name} must be uint8 [height, width, 3], got {source.dtype} {list(source.shape)}")
        sides = (source.shape[1], source.shape[0])
        if scale == 1.0 and fit(sides) == sides:
            return source
        image = Image.fromarray(source)
    else:
        image = open_image(source, name, fit)
    size = fit(image.size)
    if scale < 1.0:
        image = image.resize(scaled(image.size), Image.Resampling.BOX)
    for step in ((size[0], image.height), size):  # one call for both sides would hold one more image
        if step != image.size:
            image = image.resize(step, Image.Resampling.BICUBIC)
    pixels = np.empty((*size[::-1], 3), np.uint8)
    for box in _strips(image.size):
        pixels[box[1] : box[3]] = np.asarray(image.crop(box))
    return pixels


def _fitting_size(
    width: float, height: float, min_pixels: int | None, max_pixels: int | None, name: str
) -> tuple[int, int]:
    """Return an image's final width and height, multiples of 28 pixels. Raises BadRecord as `load_image` does."""
    if max(width, height) > ASPECT_RATIO * min(width, height):
        raise BadRecord(
            f"{name}: must have a longer side of at most {ASPECT_RATIO} times the shorter, got "
            f"{width:.0f}x{height:.0f} pixels"
        )
    if min_pixels is None and max_pixels is None:
        width, height = (max(UNIT, round(side / UNIT) * UNIT) for side in (width, height))
    else:
        # If PyTorch is installed this import takes seconds, and small runs do not need it.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        height, width = smart_resize(height, width, UNIT, min_pixels or UNIT**2, max_pixels or math.inf)
    _check_pixels(width, height, name, "after scaling")
    return width, height


def open_image(
    source: Path | bytes, name: str, check: Callable[[tuple[int, int]], object] = lambda sides: None
) -> Image.Image:
    """Return an image file, or the content of one, as RGB in its own size. Raises BadRecord as `load_image` does.

    `check` gets width and height before pixels are decoded, and may raise BadRecord.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(io.BytesIO(source) if isinstance(source, bytes) else open_regular(source))
            length = file.seek(0, io.SEEK_END)
        except OSError as error:
            raise BadRecord(f"{name}: must be an image file, but cannot be read: {error.strerror}") from error
        except ValueError as error:  # a path with a null character or a lone surrogate
            raise BadRecord(f"{name}: must be an image file, but is not a path ({error})") from error
        if length > MOST_BYTES:  # some decoders read the whole file
            raise BadRecord(f"{name}: must be an image file of at most {MOST_BYTES} bytes, got {length}")
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_pixels(*image.size, name, "in the file")
                if image.format == "TIFF":  # a tile is decoded whole, even for a small image
                    tile = (image.tag_v2.get(tag, 1) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
                    _check_pixels(*tile, name, "in a tile")
                check(image.size)
                # The other frames of an MPO file, a camera's JPEG, are previews or the view for the other eye.
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    raise BadRecord(f"{name}: must be an image with a single frame, got several")
                ImageOps.exif_transpose(image, in_place=True)
                rgb = Image.new("RGB", image.size)
                for box in _strips(image.size):
                    rgb.paste(_to_rgb(image.crop(box), name), box)
                return rgb
        except BadRecord:
            raise
        except Image.UnidentifiedImageError as error:
            file.seek(0)
            raise BadRecord(f"{name}: must be a whole {', '.join(FORMATS)} image, got {_beginning(file)}") from error
        except Image.DecompressionBombError as error:  # Pillow's own limit, checked before ours
            raise BadRecord(f"{name}: must have at most {MOST_PIXELS} pixels in the file, got far more") from error
        except DECODING_ERRORS as error:
            raise BadRecord(f"{name}: must be a whole image file, but cannot be decoded ({error})") from error


def _beginning(file: BinaryIO) -> str:
    content = file.read(len(POINTER))
    if content == POINTER:
        return "a pointer of Git's large-file storage; fetch the file itself (git lfs pull)"
    return f"a file that begins with {quote(content[:16])}" if content else "an empty file"


def _check_pixels(width: float, height: float, name: str, where: str) -> None:
    if width * height > MOST_PIXELS:
        raise BadRecord(f"{name}: must have at most {MOST_PIXELS} pixels {where}, got {width:.0f}x{height:.0f}")


def _strips(sides: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes to process an image in, so that intermediate results stay small."""
    width, height = sides
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(height, top + rows)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        pixels = np.asarray(image)
        # Pillow decodes some files of 16 bits to 32.
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise BadRecord(f"{name}: must have 8 or 16 bits per channel, got 32")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:  # as transformers' convert_to_rgb
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_processor_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings of images in a checkpoint's preprocessor_config.json.

    The keys are `min_pixels` and `max_pixels` (for `load_image`), `image_mean` and `image_std` (of pixels in 0..1, for
    each channel), `patch_size`, `merge_size` and `temporal_patch_size`. Bounds have one of two published forms,
    `min_pixels` and `max_pixels`, or `size` with `shortest_edge` and `longest_edge`; `min_pixels` and `max_pixels`
    inside `size` are read as well. A processor_config.json with an image processor takes precedence, as in
    transformers.

    Raises InputError, naming the file, if there is none, it is damaged, or its processing is not this module's.
    """
    from transformers import Qwen2VLImageProcessorPil  # slow, as above

    path, fields = _image_processor(Path(folder))
    must_be = f"{path} must be the image processor of a Qwen2-VL or Qwen2.5-VL"
    if (kind := fields.get("image_processor_type")) not in IMAGE_PROCESSORS:
        raise InputError(f"{must_be}, but its type is {quote(kind)}")
    size = fields.get("size")
    if isinstance(size, dict) and size and size.keys() <= {"min_pixels", "max_pixels"}:
        fields = {**size, **{key: value for key, value in fields.items() if value is not None}, "size": None}
    try:
        processor = Qwen2VLImageProcessorPil.from_dict(fields)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{must_be}, but cannot be read ({error})") from error
    bounds = [processor.size["shortest_edge"], processor.size["longest_edge"]]
    if (
        not all(type(bound) in (int, float) and bound == bound // 1 for bound in bounds)
        or not 0 < bounds[0] <= bounds[1]
    ):
        raise InputError(
            f"{path} must bound an image's pixels by two whole numbers in ascending order, got {quote(bounds[0])} and "
            f"{quote(bounds[1])}"
        )
    for key, value in PROCESSING.items():
        if getattr(processor, key) != value:
            raise InputError(f"{path} must have `{key}` {value}, got {quote(getattr(processor, key))}")
    colours = {key: getattr(processor, key) for key in ("image_mean", "image_std")}
    for key, value in colours.items():
        if not isinstance(value, (list, tuple)) or [type(x) in (int, float) for x in value] != [True] * 3:
            raise InputError(f"{path} must have three numbers as `{key}`, got {quote(value)}")
    return {
        "min_pixels": int(bounds[0]),
        "max_pixels": int(bounds[1]),
        **{key: tuple(value) for key, value in colours.items()},
        **{key: PROCESSING[key] for key in ("patch_size", "merge_size", "temporal_patch_size")},
    }


def _image_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of a checkpoint's image processor, and its fields. Raises InputError, naming the file."""
    path = folder / "processor_config.json"
    if os.path.lexists(path) and "image_processor" in (processor := read_object(path)):
        fields = processor["image_processor"]
        if not isinstance(fields, dict):
            raise InputError(f"{path} must hold an object as `image_processor`, got {quote(fields)}")
        return path, fields
    path = folder / "preprocessor_config.json"
    return path, read_object(path)


def patch_image(pixels: UInt8[np.ndarray, "height width 3"]) -> PatchedImage:
    """Return an image as patches in the order of the Qwen2-VL image processor, one frame, not normalised.

    Raises ValueError if a side is not a multiple of 28 pixels.
    """
    height, width = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    if pixels.shape[0] % UNIT or pixels.shape[1] % UNIT:
        raise ValueError(
            f"the sides of an image must be multiples of {UNIT} pixels, got {pixels.shape[1]}x{pixels.shape[0]}"
        )
    units = pixels.reshape(height // MERGE, MERGE, PATCH, width // MERGE, MERGE, PATCH, 3)
    patches = units.transpose(0, 3, 1, 4, 6, 2, 5).reshape(height * width, 3 * PATCH * PATCH)
    return PatchedImage(patches, height, width)


def unpatch_image(image: PatchedImage) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels that `patch_image` cut into patches."""
    rows, columns = image.height // MERGE, image.width // MERGE
    units = image.pixels.reshape(rows, columns, MERGE, MERGE, 3, PATCH, PATCH)
    return units.transpose(0, 2, 5, 1, 3, 6, 4).reshape(image.height * PATCH, image.width * PATCH, 3)
