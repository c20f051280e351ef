"""Sketches of a map, which looks at distances show: sweeps of distances to the goal, and the best moves."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Shaped

from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.frozen_lake.maps import (
    MOVE_WORDS,
    MOVES,
    Cell,
    best_move,
    cells_of,
    descend,
    find_cell,
    shortest_path,
    step,
)
from ilvr_jax.data.records import MapDesc

FARTHEST_SIGN = 12  # cells up to this many moves from the goal have the sign of their distance
HOLE_SIGN, START_SIGN, UNKNOWN_SIGN = 13, 14, 15
GOAL_SIGN = 12  # at moves; at distances it is that of 0
# The signs in words. At moves the sign of the start includes its move.
DISTANCE_SIGN_WORDS = np.array([*map(str, range(FARTHEST_SIGN + 1)), "hole", "elf", "far"])
MOVE_SIGN_WORDS = np.array([*MOVE_WORDS.values(), *MOVE_WORDS.values(), *4 * [""], "goal", "hole", "", "far"])


def path_to_goal(map_desc: MapDesc, settings: FrozenLakeConfig) -> str | None:
    """Return the path that an answer writes: with looks at distances that of their moves, else the shortest one."""
    if settings.looks == "distances":
        return descend(map_desc, sweep_distances(map_desc, settings.sweeps)[-1])
    return shortest_path(map_desc)


def sketch_signs(map_desc: MapDesc, sweeps: int, side: int) -> list[Int[np.ndarray, "side side"]]:
    """Return the signs of the looks at distances: one a sweep, and one of the best move from every cell."""
    found = sweep_distances(map_desc, sweeps)
    return [*(distance_signs(map_desc, distances, side) for distances in found), move_signs(map_desc, found[-1], side)]


def sketch_words(map_desc: MapDesc, sweeps: int, side: int) -> list[Shaped[np.ndarray, "side side"]]:
    """Return the signs of `sketch_signs` in words."""
    *distances, moves = sketch_signs(map_desc, sweeps, side)
    return [*(DISTANCE_SIGN_WORDS[signs] for signs in distances), MOVE_SIGN_WORDS[moves]]


def sketch_side(sketched: MapDesc, settings: FrozenLakeConfig) -> int:
    """Return the cells along a side of the sketches of a map: those of the largest map."""
    return max(len(sketched), *settings.levels)


def in_looks(
    sketches: Sequence[Shaped[np.ndarray, "side side"]], settings: FrozenLakeConfig
) -> list[Shaped[np.ndarray, "side side"]]:
    """Return those of a map's sketches that an answer's looks show, every second one turned by half a turn.

    A look is filled in reading order: a sweep from the last cell to the first is in that order when turned.
    """
    turned = [one[::-1, ::-1] if number % 2 else one for number, one in enumerate(sketches)]
    return turned[-1:] if settings.sketches == "last" else turned


def cell_states(map_desc: MapDesc, settings: FrozenLakeConfig) -> Shaped[np.ndarray, "looks cells"]:
    """Return the words of the signs that looks at distances show, in reading order; "" for cells beside the map."""
    sketches = sketch_words(map_desc, settings.sweeps, sketch_side(map_desc, settings))
    for words in sketches:
        words[len(map_desc) :] = words[:, len(map_desc[0]) :] = ""
    return np.stack([words.reshape(-1) for words in in_looks(sketches, settings)])


def sweep_distances(map_desc: MapDesc, sweeps: int) -> list[dict[Cell, int]]:
    """Return the distances to the goal that are known after each sweep over a map, without paths through the start.

    A sweep visits all cells in reading order, every second one in the reverse order, and gives each the smallest
    distance of its neighbours plus one (Gauss-Seidel). Such distances are those of some path; most are the shortest
    after two sweeps.
    """
    distances = {find_cell(map_desc, 2): 0}
    cells = [(row, column) for row, column, kind in cells_of(map_desc) if kind == 0]
    found = []
    for number in range(sweeps):
        for cell in cells[::-1] if number % 2 else cells:
            known = [distances[near] for near in (step(cell, move) for move in MOVES) if near in distances]
            if known:
                distances[cell] = min(min(known) + 1, distances.get(cell, min(known) + 1))
        found.append(dict(distances))
    return found


def distance_signs(map_desc: MapDesc, distances: Mapping[Cell, int], side: int) -> Int[np.ndarray, "side side"]:
    """Return the numbers of the SIGNS of a map's distances, known so far, in the upper left of a square of holes.

    Each distance up to FARTHEST_SIGN has its own; holes, the start, and cells with no or a larger distance share one.
    """
    signs = np.full((side, side), HOLE_SIGN)
    for row, column, kind in cells_of(map_desc):
        distance = distances.get((row, column), UNKNOWN_SIGN)
        sign = distance if distance <= FARTHEST_SIGN else UNKNOWN_SIGN
        signs[row, column] = {1: START_SIGN, -1: HOLE_SIGN}.get(kind, sign)
    return signs


def move_signs(map_desc: MapDesc, distances: Mapping[Cell, int], side: int) -> Int[np.ndarray, "side side"]:
    """Return the numbers of the SIGNS of the move from each cell to its neighbour with the smallest distance.

    They are the numbers in MOVES of each cell's `best_move`, and 4 more at the start; a cell without one is unknown.
    """
    signs = np.full((side, side), HOLE_SIGN)
    for row, column, kind in cells_of(map_desc):
        move = best_move((row, column), distances)
        best = UNKNOWN_SIGN if move is None else list(MOVES).index(move)
        from_start = best + len(MOVES) if best < len(MOVES) else UNKNOWN_SIGN
        signs[row, column] = {1: from_start, 2: GOAL_SIGN, -1: HOLE_SIGN}.get(kind, best)
    return signs
