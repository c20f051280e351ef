"""Images: scaling, sizes and patches of the Qwen2-VL image processor, odd and damaged files."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers import Qwen2VLImageProcessorPil
from transformers.image_utils import load_image as load_published
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from ilvr_jax.data import images
from ilvr_jax.data.images import image_processor_settings, load_image, patch_image
from ilvr_jax.data.records import BadRecord

REAL_IMAGES = Path(__file__).parent / "vsp_planning" / "images"
BUDGET = {"min_pixels": 56 * 56, "max_pixels": 16 * 784}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def assert_published(pixels: np.ndarray, image: Image.Image, **bounds: int) -> None:
    """Compare with the patches, both frames, that transformers' image processor makes of `image`."""
    processor = Qwen2VLImageProcessorPil(**bounds)
    expected = processor(images=[image], return_tensors="np")
    patched = patch_image(pixels)
    assert [1, patched.height, patched.width] == expected["image_grid_thw"][0].tolist()
    mean, std = np.array(processor.image_mean)[:, None], np.array(processor.image_std)[:, None]
    normalised = (patched.pixels.reshape(-1, 3, 196) / 255 - mean) / std
    frames = expected["pixel_values"].reshape(-1, 3, 2, 196)
    np.testing.assert_allclose(normalised, frames[:, :, 0], atol=1e-5)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])


@pytest.mark.parametrize("height,width", [(56, 56), (84, 140), (280, 56), (196, 112)])
def test_patches_equal_the_published_image_processor(height, width):
    pixels = noise(height, width)
    assert_published(pixels, Image.fromarray(pixels))


@pytest.mark.parametrize(
    "height,width", [(700, 1111), (20, 31), (9, 700), (150, 1), (56, 224), (100, 100)], ids=lambda side: str(side)
)
def test_budgets_give_the_patches_of_the_published_image_processor(height, width):
    pixels = noise(height, width)
    assert_published(load_image(pixels, **BUDGET), Image.fromarray(pixels), **BUDGET)
    np.testing.assert_array_equal(load_image(encoded(pixels), **BUDGET), load_image(pixels, **BUDGET))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(784, 60_000), st.integers(784, 200_000))
@settings(max_examples=150, deadline=None)
def test_budgets_give_the_sizes_of_smart_resize(height, width, min_pixels, more_pixels):
    max_pixels = max(min_pixels, more_pixels)
    pixels = np.zeros((height, width, 3), np.uint8)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(BadRecord, match="at most 200 times the shorter"):
            load_image(pixels, 1.0, min_pixels, max_pixels)
        return
    expected = smart_resize(height, width, 28, min_pixels, max_pixels)
    assert load_image(pixels, 1.0, min_pixels, max_pixels).shape == (*expected, 3)


@given(st.integers(4, 300), st.integers(4, 300), st.sampled_from([0.5, 1.0, 2.0]), st.integers(784, 200_000))
@settings(max_examples=60, deadline=None)
def test_budgets_apply_after_the_scale_and_one_bound_is_enough(height, width, scale, bound):
    pixels = np.zeros((height, width, 3), np.uint8)
    scaled = round(height * scale), round(width * scale)
    assert load_image(pixels, scale, None, bound).shape[:2] == smart_resize(*scaled, 28, 784, bound)
    assert load_image(pixels, scale, bound, None).shape[:2] == smart_resize(*scaled, 28, bound, 10**9)


def test_patches_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of 28 pixels, got 30x28"):
        patch_image(noise(28, 30))


def test_shrinking_averages_boxes():
    pixels = noise(112, 168)
    expected = pixels.reshape(56, 2, 84, 2, 3).mean((1, 3))
    assert np.abs(load_image(pixels, 0.5) - expected).max() <= 1.0  # rows and columns are each rounded


def test_a_cell_of_64_pixels_becomes_a_token_that_depends_on_its_cell_alone():
    pixels = noise(192, 192)
    changed = pixels.copy()
    changed[64:128, 64:128] = 0
    before, after = load_image(pixels, 28 / 64), load_image(changed, 28 / 64).copy()
    assert before.shape == (84, 84, 3)
    assert not after[28:56, 28:56].any()
    after[28:56, 28:56] = before[28:56, 28:56]
    np.testing.assert_array_equal(before, after)


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([0.1, 28 / 64, 0.5, 1.0, 1.5]))
@settings(max_examples=40, deadline=None)
def test_sides_become_the_nearest_multiples_of_28(height, width, scale):
    got = load_image(noise(height, width), scale).shape
    for side, result in zip((height, width), got[:2], strict=True):
        assert result % 28 == 0 and result >= 28
        assert result == 28 or abs(result - side * scale) <= 14.5  # half a pixel from rounding to whole pixels


def test_files_and_arrays_give_the_same_pixels(tmp_path):
    pixels = noise(84, 56)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), pixels)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", 0.5), load_image(pixels, 0.5))


def test_other_colour_modes_become_rgb(tmp_path):
    grey = noise(28, 28)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(load_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, -1))
    Image.fromarray(noise(28, 28)).convert("RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(load_image(tmp_path / "alpha.png"), noise(28, 28))


def test_transparency_shows_white_as_in_the_published_image_processor():
    rgba = np.concatenate([noise(56, 84), noise(56, 84, 1)[..., :1]], -1)
    palette = Image.fromarray(noise(56, 84)).quantize(16)
    for content in (encoded(rgba), encoded(palette, transparency=3), encoded(palette, "gif", transparency=3)):
        assert_published(load_image(content), opened(content))
    rgba[..., 3] = 0
    assert (load_image(encoded(rgba)) == 255).all()


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_cmyk_becomes_rgb_as_in_the_published_image_processor(kind):
    content = encoded(Image.fromarray(np.tile(noise(56, 84), (1, 1, 2))[..., :4], "CMYK"), kind)
    assert opened(content).mode == "CMYK"
    assert_published(load_image(content), opened(content))


@pytest.mark.parametrize(
    "kind,mode,written,read",
    [
        *[("png", "I;16", "<u2", "I;16"), ("tiff", "I;16", "<u2", "I;16"), ("tiff", "I;16B", ">u2", "I;16B")],
        *[("ppm", "I", "<i4", "I"), ("tiff", "I", "<i4", "I")],
    ],
)
def test_sixteen_bits_keep_the_upper_eight(kind, mode, written, read):
    values = np.arange(0, 56 * 56 * 20, 20).reshape(56, 56)
    content = encoded(Image.frombytes(mode, (56, 56), values.astype(written).tobytes()), kind)
    assert opened(content).mode == read
    np.testing.assert_array_equal(load_image(content), np.repeat((values // 256)[..., None], 3, -1))


def test_thirty_two_bits_are_refused():
    for values in (np.full((28, 28), 65536, np.int32), np.full((28, 28), -1, np.int32), np.ones((28, 28), np.float32)):
        content = encoded(Image.fromarray(values), "tiff")
        with pytest.raises(
            BadRecord, match=f"^an image of {len(content)} bytes: must have 8 or 16 bits per channel, got 32"
        ):
            load_image(content)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_exif_rotation_is_applied_as_in_transformers(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((28, 56, 3), np.uint8)
    pixels[:14, :14] = 255
    (tmp_path / "turned").write_bytes(encoded(pixels, kind, exif=exif))
    expected = np.asarray(load_published(str(tmp_path / "turned")))
    assert expected.shape[:2] == ((28, 56) if orientation < 5 else (56, 28))
    np.testing.assert_array_equal(load_image(tmp_path / "turned"), expected)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_animated_images_are_refused(kind, tmp_path):
    frames = [Image.fromarray(noise(56, 28, seed)) for seed in (0, 1, 2)]
    (tmp_path / "moves").write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    with pytest.raises(BadRecord, match="moves: must be an image with a single frame, got several"):
        load_image(tmp_path / "moves")
    assert load_image(encoded(frames[0], kind, save_all=True)).shape == (56, 28, 3)


def test_camera_files_with_previews_are_stills():
    first, preview = Image.fromarray(noise(56, 28)), Image.fromarray(noise(28, 28, 1))
    content = encoded(first, "mpo", save_all=True, append_images=[preview])
    assert opened(content).format == "MPO" and opened(content).n_frames == 2
    np.testing.assert_array_equal(load_image(content), load_image(encoded(first, "jpeg")))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    """Return a PNG of one bit a pixel: its header, chunks and end."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def tiff_of(**tags: int) -> bytes:
    """Return a grey TIFF of 30 x 30 pixels compressed by LZW, with tags on top."""
    names = {"bits": 258, "compression": 259, "photometric": 262, "samples": 277, "tile_width": 322}
    names |= {"width": 256, "height": 257, "tile_height": 323, "tile_offset": 324, "tile_bytes": 325}
    tags = {"bits": 8, "compression": 5, "photometric": 1, "samples": 1, "width": 30, "height": 30, **tags}
    tags |= {"tile_offset": 14 + 12 * 10, "tile_bytes": 50}
    entries = sorted((names[name], value) for name, value in tags.items())
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + bytes(50)


NO_PIXELS = chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own
@pytest.mark.parametrize(
    "content, options, message",
    [
        (png_of(13_000, 13_000, NO_PIXELS), {}, "134217728 pixels in the file, got 13000x13000"),
        (png_of(60_000, 60_000, NO_PIXELS), {}, "134217728 pixels in the file, got far more"),
        (png_of(11_000, 11_000, NO_PIXELS), {"scale": 2.0}, "134217728 pixels after scaling, got 22008x22008"),
        (png_of(100, 100, NO_PIXELS), {"scale": 1000.0}, "134217728 pixels after scaling, got 99988x99988"),
        (png_of(28, 28, NO_PIXELS), {"min_pixels": 10**9}, "134217728 pixels after scaling, got 31640x31640"),
        (tiff_of(tile_width=40_000, tile_height=40_000), {}, "134217728 pixels in a tile, got 40000x40000"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_images_too_large_are_refused_before_they_are_decoded(content, options, message, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels are decoded"))
    with pytest.raises(BadRecord, match=f"^an image of {len(content)} bytes: must have at most {message}$"):
        load_image(content, **options)
    with pytest.raises(BadRecord, match="an image: must have at most 134217728 pixels after scaling, got 28000x28000"):
        load_image(np.zeros((28, 28, 3), np.uint8), 1000.0)


def memory(kind: str) -> int:
    """Return what the process holds (VmRSS) or held at most since the count began anew (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


@pytest.mark.parametrize("mode, kind", [("1", "png"), ("RGBA", "png"), ("RGB", "jpeg")])
def test_large_photographs_load_in_little_memory(mode, kind):
    """Those of 12000 x 9000 pixels pass; here smaller ones take at most 12 bytes a pixel at any time."""
    images._check_pixels(12_000, 9_000, "a photograph", "in the file")
    content = encoded(Image.new(mode, (4000, 5000)), kind)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the count begins anew
    load_image(content)
    assert 1 < (memory("VmHWM") - before) / 4000 / 5000 < 12


def test_strips_and_steps_give_the_pixels_of_the_whole(monkeypatch):
    rgba = np.concatenate([noise(90, 70), noise(90, 70, 1)[..., :1]], -1)
    sixteen = Image.fromarray(np.arange(90 * 70, dtype=np.uint16).reshape(90, 70))
    contents = [encoded(rgba), encoded(sixteen), encoded(Image.fromarray(noise(90, 70)).quantize(16), transparency=3)]
    whole = [load_image(content, scale) for content in contents for scale in (0.4, 1.0, 1.7)]
    monkeypatch.setattr(images, "STRIP_PIXELS", 150)
    for before, after in zip(whole, [load_image(c, s) for c in contents for s in (0.4, 1.0, 1.7)], strict=True):
        np.testing.assert_array_equal(before, after)
    expected = Image.fromarray(noise(90, 70)).resize((112, 140), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(load_image(noise(90, 70), 1.7), expected)


def test_a_header_that_lies_costs_no_more_than_it_says():
    many = chunk(b"IDAT", zlib.compress(bytes(10**8), 1))
    assert load_image(png_of(28, 28, many)).shape == (28, 28, 3)
    text = chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(10**8), 1))
    with pytest.raises(BadRecord, match="must be a whole image file, but cannot be decoded .Decompressed data"):
        load_image(png_of(28, 28, text, many))


@pytest.mark.parametrize("kind", ["dds", "ico", "icns", "eps", "tga", "pcx", "im", "sgi", "jpeg2000", "pdf"])
def test_other_formats_are_refused_without_their_decoders(kind, tmp_path):
    content = encoded(Image.fromarray(noise(64, 64)), kind)
    with pytest.raises(BadRecord, match="whole PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM, AVIF image, got a file that"):
        load_image(content)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm", "avif"])
def test_the_formats_of_the_documentation_load(kind):
    image = Image.fromarray(noise(56, 84)).quantize(16) if kind == "gif" else Image.fromarray(noise(56, 84))
    content = encoded(image, kind)
    np.testing.assert_array_equal(load_image(content), opened(content).convert("RGB"))


def test_paths_that_cannot_be_read_are_bad_records(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    os.truncate(os.open(tmp_path / "large.webp", os.O_CREAT | os.O_WRONLY), 2**31)  # no more than a size on disk
    for name, message in [
        ("x" * 5000, "x: must be an image file, but cannot be read: File name too long"),
        ("zero\0.png", "must be an image file, but is not a path .embedded null byte"),
        ("half\ud800.png", "must be an image file, but "),
        (".", "must be an image file, but cannot be read: is not a regular file"),
        ("pipe.png", "pipe.png: must be an image file, but cannot be read: is not a regular file"),
        ("/dev/zero", "/dev/zero: must be an image file, but cannot be read: is not a regular file"),
        ("/proc/self/mem", "/proc/self/mem: must be an image file, but cannot be read: Invalid argument"),
        ("loop.png", "loop.png: must be an image file, but cannot be read: Too many levels of symbolic links"),
        ("large.webp/x.png", "x.png: must be an image file, but cannot be read: Not a directory"),
        ("large.webp", "large.webp: must be an image file of at most 1073741824 bytes, got 2147483648"),
        ("pointer.png", "got a pointer of Git's large-file storage; fetch the file itself .git lfs pull.$"),
    ]:
        with pytest.raises(BadRecord, match=message) as raised:
            load_image(tmp_path / name)
        assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_narrow_images_load_up_to_a_ratio_of_200(tmp_path):
    assert load_image(noise(150, 1)).shape == (140, 28, 3)
    assert load_image(noise(1, 200), **BUDGET).shape == (*smart_resize(1, 200, 28, *BUDGET.values()), 3)
    message = "must have a longer side of at most 200 times the shorter, got 1x500 pixels"
    (tmp_path / "narrow.png").write_bytes(encoded(noise(500, 1)))
    for source, bounds in ((tmp_path / "narrow.png", {}), (encoded(noise(500, 1)), BUDGET), (noise(500, 1), BUDGET)):
        with pytest.raises(BadRecord, match=message):
            load_image(source, **bounds)


def test_bad_images_are_named(tmp_path):
    Image.fromarray(noise(84, 84)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name, message in [
        ("missing.png", "missing.png: must be an image file, but cannot be read: No such file"),
        ("half.png", "half.png: must be a whole image file, but cannot be decoded .*truncated"),
        (
            "text.png",
            "text.png: must be a whole PNG, JPEG, .*, AVIF image, got .* begins with b'not an image'$",
        ),
        ("empty.png", "empty.png: must be a whole PNG, .* image, got an empty file"),
    ]:
        with pytest.raises(BadRecord, match=message):
            load_image(tmp_path / name)
    with pytest.raises(BadRecord, match="an image of 0 bytes: must be a whole PNG, .* got an empty file"):
        load_image(b"")
    with pytest.raises(BadRecord, match=r"must be uint8 \[height, width, 3\], got float64 \[28, 28, 3\]"):
        load_image(np.zeros((28, 28, 3)))
    with pytest.raises(BadRecord, match=r"uint8 \[28, 28\]"):
        load_image(np.zeros((28, 28), np.uint8))


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@given(st.sampled_from(["png", "jpeg", "gif", "webp", "bmp", "tiff"]), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_files_load_or_are_bad_records(tmp_path_factory, kind, data):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    content = bytearray(encoded(noise(40, 30), kind, **({"exif": exif} if kind in ("png", "jpeg", "webp") else {})))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert load_image(path).dtype == np.uint8
    except BadRecord as error:
        assert str(path) in str(error)


def test_real_maps_become_one_token_a_cell():
    for level in (3, 6):
        pixels = load_image(next(iter(sorted(REAL_IMAGES.glob(f"level{level}_*.png")))), 28 / 64)
        assert patch_image(pixels).vision_tokens == level**2


PUBLISHED = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.5, 0.25, 0.125],
    "image_std": [1.0, 2.0, 3.0],
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
SPELLINGS = {
    "pixels": {"min_pixels": 3136, "max_pixels": 100352},
    "edges": {"size": {"shortest_edge": 3136, "longest_edge": 100352}},
    "both": {"min_pixels": 3136, "max_pixels": 100352, "size": {"shortest_edge": 3136, "longest_edge": 100352}},
    "old": {"min_pixels": 3136, "max_pixels": 100352, "size": {"min_pixels": 3136, "max_pixels": 100352}},
    "inside": {"size": {"min_pixels": 3136, "max_pixels": 100352}},
    "maximum inside": {"size": {"max_pixels": 100352}},
    "maximum": {"max_pixels": 100352},
    "without size": {"size": None, "min_pixels": None, "max_pixels": 100352.0},
    "fast": {
        "size": {"shortest_edge": 3136, "longest_edge": 100352},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
}


def write_settings(folder: Path, **changes) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps({**PUBLISHED, **changes}))
    return folder


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_processor_settings_are_read_in_every_spelling(tmp_path, spelling):
    assert image_processor_settings(write_settings(tmp_path, **SPELLINGS[spelling])) == {
        "min_pixels": 3136,
        "max_pixels": 100352,
        "image_mean": (0.5, 0.25, 0.125),
        "image_std": (1.0, 2.0, 3.0),
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }


def test_processor_settings_saved_by_transformers_are_read(tmp_path):
    processor = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=7840)
    processor.save_pretrained(tmp_path / "alone")
    (tmp_path / "nested").mkdir()
    nested = {"image_processor": processor.to_dict(), "processor_class": "Qwen2_5_VLProcessor"}
    (tmp_path / "nested" / "processor_config.json").write_text(json.dumps(nested, default=dict))
    for name in ("alone", "nested"):
        read = image_processor_settings(tmp_path / name)
        assert (read["min_pixels"], read["max_pixels"]) == (784, 7840)
        assert read["image_mean"] == tuple(processor.image_mean)


def test_processor_settings_of_the_published_checkpoint(published_processor):
    read = image_processor_settings(published_processor)
    assert (read["min_pixels"], read["max_pixels"]) == (3136, 12845056)
    assert read["image_std"] == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "must be the image processor of a Qwen2-VL or Qwen2.5-VL, but its type is 'CLIPImageProcessor'",
        ),
        ({"patch_size": 16}, "must have `patch_size` 14, got 16"),
        ({"merge_size": 4}, "must have `merge_size` 2, got 4"),
        ({"temporal_patch_size": 1}, "must have `temporal_patch_size` 2, got 1"),
        ({"do_resize": False}, "must have `do_resize` True, got False"),
        ({"size": 224}, "two whole numbers in ascending order, got 224 and None"),
        ({"min_pixels": 9, "max_pixels": 3}, "got 9 and 3"),
        ({"size": [1]}, "cannot be read"),
        ({"size": {"height": 28, "width": 28}}, "got None and None"),
    ],
)
def test_other_processors_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        image_processor_settings(write_settings(tmp_path, **changes))


def test_missing_processor_settings_are_named(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(ValueError, match=f"{path} must be a JSON file, but cannot be read: No such file"):
        image_processor_settings(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path} must be JSON in UTF-8"):
        image_processor_settings(tmp_path)
