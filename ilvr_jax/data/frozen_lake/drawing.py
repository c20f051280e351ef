"""FrozenLake maps as pictures: gymnasium's sprites, put together as pygame does and without it."""

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from ilvr_jax.data.records import MapDesc

CELL_PIXELS = 64  # pixels a side of a cell in gymnasium's pictures
BORDER = (180, 200, 230)
SPRITES = {1: "stool", 2: "goal", -1: "hole"}  # what lies on the ice of a cell; the elf hides the stool under it
ELVES = {"L": "elf_left", "D": "elf_down", "R": "elf_right", "U": "elf_up"}
TILES_DIGEST = "6b8e053155dce23a9198a3bb7a161021676dc69d2708894b5e39a49ce8d95bc4"


def draw_map(
    map_desc: MapDesc, cell_pixels: int = CELL_PIXELS, elf: tuple[int, int] | None = None, last_move: str = "D"
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws a map of 1 start, 2 goal, -1 hole, 0 ice as gymnasium does, each cell `cell_pixels` on a side.

    `elf` is its (row, column), by default the start; it looks where `last_move` (one of U, D, L, R) went, down
    at first. In a hole only the cracks are seen. Smaller sizes than 64 are the 64-pixel picture shrunk by averaging
    boxes: for a square map exactly what `PIL.Image.resize(size, Image.Resampling.BOX)` makes of it, for one more than
    twice as high as wide within 1, since Pillow then averages and rounds in another order.

    Raises RuntimeError if gymnasium's sprites cannot be found or are others.
    """
    tiles = _tiles(cell_pixels)
    picture = np.empty((len(map_desc) * cell_pixels, len(map_desc[0]) * cell_pixels, 3), np.uint8)
    for row, cells in enumerate(map_desc):
        for column, cell in enumerate(cells):
            here = cell == 1 if elf is None else (row, column) == elf
            top, left = row * cell_pixels, column * cell_pixels
            picture[top : top + cell_pixels, left : left + cell_pixels] = tiles[cell, last_move if here else ""]
    return picture


@functools.cache
def _tiles(cell_pixels: int) -> dict[tuple[int, str], UInt8[np.ndarray, "cell_pixels cell_pixels 3"]]:
    """Returns the picture of each (cell, move that brought the elf there, "" without elf).

    A pixel of the shrunk picture depends on its own cell alone, so cells can be shrunk one by one.
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
        raise RuntimeError("gymnasium must be >=1.0,<1.4, but its FrozenLake pictures are not those of these releases")
    if cell_pixels == CELL_PIXELS:
        return tiles
    size = (cell_pixels, cell_pixels)
    return {key: np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BOX)) for key, tile in tiles.items()}


def _sprite(name: str) -> Int[np.ndarray, "64 64 4"]:
    gymnasium = importlib.util.find_spec("gymnasium")  # only its files are needed, and importing it is slow
    if gymnasium is None:
        raise RuntimeError("gymnasium is not installed, and FrozenLake maps are drawn with its pictures; install it")
    path = Path(gymnasium.origin).parent / "envs" / "toy_text" / "img" / f"{name}.png"
    with Image.open(path) as image:
        sprite = image.convert("RGBA").resize((CELL_PIXELS, CELL_PIXELS), Image.Resampling.NEAREST)
    return np.asarray(sprite).astype(int)


def _blend(under: Int[np.ndarray, "64 64 3"], sprite: Int[np.ndarray, "64 64 4"]) -> Int[np.ndarray, "64 64 3"]:
    """Lays a sprite over a tile with SDL's integer arithmetic, which pygame uses."""
    colour, alpha = sprite[..., :3], sprite[..., 3:]
    return under + (((colour - under) * alpha + colour) >> 8)
