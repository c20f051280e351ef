"""Images: scaling, the patch order of the Qwen2-VL image processor, damaged files."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ilvr_jax.data.images import load_image, patch_image
from ilvr_jax.data.records import BadRecord

REAL_IMAGES = Path(__file__).parent / "data" / "vsp_planning" / "images"


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("height,width", [(56, 56), (84, 140), (280, 56), (196, 112)])
def test_patches_equal_the_published_image_processor(height, width):
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil()
    pixels = noise(height, width)
    expected = processor(images=[Image.fromarray(pixels)], return_tensors="np")
    patched = patch_image(pixels)
    assert [1, patched.height, patched.width] == expected["image_grid_thw"][0].tolist()
    mean, std = np.array(processor.image_mean)[:, None], np.array(processor.image_std)[:, None]
    normalised = (patched.pixels.reshape(-1, 3, 196) / 255 - mean) / std
    frames = expected["pixel_values"].reshape(-1, 3, 2, 196)
    np.testing.assert_allclose(normalised, frames[:, :, 0], atol=1e-5)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])


def test_patches_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="30x28 pixels; multiples of 28"):
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


def test_bad_images_are_named(tmp_path):
    Image.fromarray(noise(84, 84)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name, message in [
        ("missing.png", "missing.png: there is no such file"),
        ("half.png", "half.png: cannot be decoded as an image .*truncated"),
        ("text.png", "text.png: is not an image; a PNG, JPEG or other image file is accepted"),
        ("empty.png", "empty.png: is not an image"),
    ]:
        with pytest.raises(BadRecord, match=message):
            load_image(tmp_path / name)
    with pytest.raises(BadRecord, match=r"float64 \[28, 28, 3\]; uint8 \[height, width, 3\] is accepted"):
        load_image(np.zeros((28, 28, 3)))
    with pytest.raises(BadRecord, match=r"uint8 \[28, 28\]"):
        load_image(np.zeros((28, 28), np.uint8))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, about the damage
@given(st.sampled_from(["png", "jpeg", "gif", "webp", "bmp", "tiff"]), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_files_load_or_are_bad_records(tmp_path_factory, kind, data):
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 30)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
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
