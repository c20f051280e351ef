"""Drawing maps: against the pictures of the real maps, Pillow's resampling and Pillow's blending."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.records import Look, Text
from tests.vectors import SHARED

VSP = Path(__file__).parent / "vsp_planning"
SPRITES = Path(importlib.util.find_spec("gymnasium").origin).parent / "envs" / "toy_text" / "img"
REASONING = SHARED / "data" / "vsp_reasoning_examples"
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


@pytest.fixture(scope="module")
def real_maps():
    lines = [json.loads(line) for line in (VSP / "test.jsonl").read_text().splitlines()]
    files = [line["image_input"] for line in lines]
    files = [file[0] if isinstance(file, list) else file for file in files]
    return [(line["map_desc"], VSP / file) for line, file in zip(lines, files, strict=True)]


def test_the_real_pictures_are_drawn_pixel_for_pixel(real_maps):
    assert len(real_maps) == 200
    for map_desc, path in real_maps:
        with Image.open(path) as image:
            np.testing.assert_array_equal(draw_map(map_desc), np.asarray(image.convert("RGB")), err_msg=path.name)


@pytest.mark.parametrize("cell_pixels", [28, 16, 37])
def test_a_small_picture_is_the_whole_large_one_averaged_in_boxes(real_maps, cell_pixels):
    for map_desc, path in real_maps[::5]:
        size = (len(map_desc[0]) * cell_pixels, len(map_desc) * cell_pixels)
        with Image.open(path) as image:
            expected = image.convert("RGB").resize(size, Image.Resampling.BOX)
        drawn = draw_map(map_desc, cell_pixels)
        assert drawn.dtype == np.uint8
        np.testing.assert_array_equal(drawn, np.asarray(expected), err_msg=path.name)


def cells_of(picture: np.ndarray, cell_pixels: int) -> np.ndarray:
    """Return a picture as cells: [row, column, height, width, 3]."""
    rows, columns = picture.shape[0] // cell_pixels, picture.shape[1] // cell_pixels
    return picture.reshape(rows, cell_pixels, columns, cell_pixels, 3).transpose(0, 2, 1, 3, 4)


def test_helper_images_differ_only_in_the_cells_the_elf_left_and_reached():
    source = FrozenLakeSource(FrozenLakeConfig(read_out="none", moves_per_look=1), seed=4, count=40)
    looks = 0
    for record in source:
        start = tuple(np.argwhere(np.array(record.map_desc) == 1)[0].tolist())
        first, elf = cells_of(record.images[0], 28), start
        for text, look in zip(record.steps[::2], record.steps[1::2], strict=False):
            assert isinstance(text, Text) and isinstance(look, Look)
            elf = tuple(np.add(elf, STEPS[text.content.split()[2]]).tolist())
            changed = (cells_of(look.helper_image, 28) != first).any(axis=(2, 3, 4))
            assert set(zip(*(axis.tolist() for axis in np.nonzero(changed)), strict=True)) == {start, elf}
            looks += 1
    assert looks > 80


def sprite(name: str) -> Image.Image:
    with Image.open(SPRITES / f"{name}.png") as image:
        return image.convert("RGBA").resize((64, 64), Image.Resampling.NEAREST)


@pytest.mark.parametrize("move, elf", [("L", "elf_left"), ("D", "elf_down"), ("R", "elf_right"), ("U", "elf_up")])
@pytest.mark.parametrize("kind, lying", [(0, None), (1, "stool"), (2, "goal"), (-1, "hole")])
def test_the_elf_is_drawn_over_the_cell_and_faces_its_last_move(move, elf, kind, lying):
    expected = sprite("ice")
    for name in [lying] * bool(lying) + ["cracked_hole" if kind == -1 else elf]:
        expected = Image.alpha_composite(expected, sprite(name))
    drawn = draw_map(((0, kind, 0),), elf=(0, 1), last_move=move)
    # Pillow rounds otherwise than pygame; the outermost pixels are the border's.
    difference = drawn[1:-1, 65:127].astype(int) - np.asarray(expected)[1:-1, 1:-1, :3]
    assert abs(difference).max() <= 2
    np.testing.assert_array_equal(drawn[:, :64], draw_map(((0,),)))
    np.testing.assert_array_equal(drawn[:, 128:], draw_map(((0,),)))


@pytest.mark.skipif(not REASONING.is_dir(), reason="optional data: the real examples are not in ../shared")
def test_the_real_helper_images_are_drawn_pixel_for_pixel():
    """The images show the stool at the start, the elf in four directions and at the goal, and the cracks of a hole."""
    seen = set()
    for line in (REASONING / "sample.jsonl").read_text().splitlines():
        record = json.loads(line)
        with Image.open(REASONING / record["image_input"]) as image:
            map_desc = map_of(np.asarray(image.convert("RGB")))
        with Image.open(REASONING / record["image_output"]) as image:
            real = np.asarray(image.convert("RGB"))
        elf = tuple(np.argwhere(np.array(map_desc) == 1)[0].tolist())
        plan = record["text_input"].split("Full Action Plan: ")[1].splitlines()[0].lower().split(", ")
        for move in plan:  # the example does not say after which move its picture was taken
            elf = tuple(np.clip(np.add(elf, STEPS[move]), 0, len(map_desc) - 1).tolist())
            if np.array_equal(draw_map(map_desc, elf=elf, last_move=move[0].upper()), real):
                seen.add((map_desc[elf[0]][elf[1]], move))
                break
        else:
            raise AssertionError(f"no picture along {plan} is {record['image_output']}")
    assert {kind for kind, _ in seen} == {0, 2, -1} and {move for _, move in seen} == set(STEPS)


def map_of(picture: np.ndarray) -> tuple[tuple[int, ...], ...]:
    kinds = {draw_map(((kind,),)).tobytes(): kind for kind in (0, 1, 2, -1)}
    return tuple(tuple(kinds[cell.tobytes()] for cell in row) for row in cells_of(picture, 64))
