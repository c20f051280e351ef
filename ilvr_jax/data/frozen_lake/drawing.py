"""Drawings of FrozenLake maps from gymnasium's sprites, composed as by pygame but without it."""

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from ilvr_jax.data.records import MapDesc

CELL_PIXELS = 64  # side of a cell in gymnasium's pictures
BORDER = (180, 200, 230)
SPRITES = {1: "stool", 2: "goal", -1: "hole"}  # on the ice of a cell; the elf hides the stool
ELVES = {"L": "elf_left", "D": "elf_down", "R": "elf_right", "U": "elf_up"}
# Signs of cells in a sketch, each four squares of colours: rows of a Hadamard matrix of order 16, so that
# any two signs differ in half of their values. A vision tower then sees them as very different from the start, where
# plain colours have features of almost the same direction, and slots must match directions.
SIGNS = 255 * (
    np.array([[bin(row & column).count("1") % 2 for column in range(4, 16)] for row in range(16)], np.uint8)
).reshape(16, 2, 2, 3)
TILES_DIGEST = "6b8e053155dce23a9198a3bb7a161021676dc69d2708894b5e39a49ce8d95bc4"


def draw_map(
    map_desc: MapDesc, cell_pixels: int = CELL_PIXELS, elf: tuple[int, int] | None = None, last_move: str = "D"
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw a map of 1 start, 2 goal, -1 hole, 0 ice as gymnasium does, with cells of `cell_pixels` pixels a side.

    `elf` is the (row, column) of the elf, by default the start, and it faces in the direction of `last_move`, one of U,
    D, L and R. In a hole only cracks are drawn. Sizes below 64 are the 64-pixel picture, box-averaged: equal to
    `PIL.Image.resize(size, Image.Resampling.BOX)` for a square map, and within 1 for a map more than twice as high as
    wide, for which Pillow averages and rounds in another order.

    Raises RuntimeError if gymnasium's sprites are missing or of another release.
    """
    tiles = _tiles(cell_pixels)
    picture = np.empty((len(map_desc) * cell_pixels, len(map_desc[0]) * cell_pixels, 3), np.uint8)
    for row, cells in enumerate(map_desc):
        for column, cell in enumerate(cells):
            has_elf = cell == 1 if elf is None else (row, column) == elf
            top, left = row * cell_pixels, column * cell_pixels
            picture[top : top + cell_pixels, left : left + cell_pixels] = tiles[cell, last_move if has_elf else ""]
    return picture


def draw_signs(signs: Int[np.ndarray, "rows columns"], cell_pixels: int) -> UInt8[np.ndarray, "height width 3"]:
    """Draw a sketch of cells that each show one of SIGNS; `cell_pixels` must be even."""
    rows, columns = signs.shape
    squares = SIGNS[signs].swapaxes(1, 2).reshape(2 * rows, 2 * columns, 3)
    return squares.repeat(cell_pixels // 2, axis=0).repeat(cell_pixels // 2, axis=1)


@functools.cache
def _tiles(cell_pixels: int) -> dict[tuple[int, str], UInt8[np.ndarray, "cell_pixels cell_pixels 3"]]:
    """Return the picture of each (kind of cell, last move of the elf on it, "" without elf).

    A pixel of the smaller picture depends only on its own cell, so cells can be resized one by one.
    """
    tiles = {}
    for cell in (0, 1, 2, -1):
        tile = _sprite("ice")[..., :3]
        if cell in SPRITES:
            tile = _blend(tile, _sprite(SPRITES[cell]))
        tile[[0, -1]] = tile[:, [0, -1]] = BORDER
        tiles[cell, ""] = tile
        for move, elf in ELVES.items():
            tiles[cell, move] = _blend(tile, _sprite("cracked_hole" if cell == -1 else elf))
    tiles = {key: tile.astype(np.uint8) for key, tile in tiles.items()}
    if hashlib.sha256(b"".join(tile.tobytes() for tile in tiles.values())).hexdigest() != TILES_DIGEST:
        raise RuntimeError("gymnasium must have the FrozenLake sprites of >=1.0,<1.4, but has others")
    if cell_pixels == CELL_PIXELS:
        return tiles
    size = (cell_pixels, cell_pixels)
    return {key: np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BOX)) for key, tile in tiles.items()}


def _sprite(name: str) -> Int[np.ndarray, "64 64 4"]:
    gymnasium = importlib.util.find_spec("gymnasium")  # only its files are needed; importing it is slow
    if gymnasium is None:
        raise RuntimeError("gymnasium must be installed, since FrozenLake maps are drawn with its sprites, but is not")
    path = Path(gymnasium.origin).parent / "envs" / "toy_text" / "img" / f"{name}.png"
    with Image.open(path) as image:
        sprite = image.convert("RGBA").resize((CELL_PIXELS, CELL_PIXELS), Image.Resampling.NEAREST)
    return np.asarray(sprite).astype(int)


def _blend(under: Int[np.ndarray, "64 64 3"], sprite: Int[np.ndarray, "64 64 4"]) -> Int[np.ndarray, "64 64 3"]:
    """Blend a sprite over a tile with SDL's integer arithmetic, as pygame does."""
    colour, alpha = sprite[..., :3], sprite[..., 3:]
    return under + (((colour - under) * alpha + colour) >> 8)
