"""Edits of FrozenLake maps: one hole moved, so that the path of the map must change or so that it must not."""

from collections.abc import Callable

import numpy as np

from ilvr_jax.data.frozen_lake.maps import MOVES, Cell, cells_of, distance_to_goal, find_cell, shortest_path
from ilvr_jax.data.records import MapDesc

MOST_EXTRA_MOVES = 2  # of the path of a relevant edit
Rank = tuple[int, ...] | None  # of an edit, lower is better; None if the edit cannot be used


def relevant_edit(map_desc: MapDesc, random: np.random.Generator) -> MapDesc | None:
    """Move one hole onto the map's `shortest_path`; return None if no such map has a path.

    The new path has at most MOST_EXTRA_MOVES more moves than the old one. Edits whose new path fails on the old map are
    preferred, and among these the ones whose number of moves changes least; the rest is up to `random`. A map without
    holes gets one more, and then every new path is right on the old map, too.
    """
    path = shortest_path(map_desc)
    if path is None:
        return None

    def rank(edited: MapDesc) -> Rank:
        new_path = shortest_path(edited)
        if new_path is None or len(new_path) > len(path) + MOST_EXTRA_MOVES:
            return None
        right_on_both = all(map_desc[row][column] != -1 for row, column in _path_cells(edited, new_path))
        return int(right_on_both), abs(len(new_path) - len(path))

    return _best_edit(map_desc, _path_cells(map_desc, path)[1:-1], rank, random)


def irrelevant_edit(map_desc: MapDesc, random: np.random.Generator) -> MapDesc | None:
    """Move one hole so that `shortest_path` stays the same; return None if the map has no path or no such edit.

    The distances to the goal along the path then stay the same as well. Edits that move the hole to a cell on none of
    the shortest paths are preferred, since those leave every shortest path right; the rest is up to `random`. A map
    without holes gets one more.
    """
    path = shortest_path(map_desc)
    if path is None:
        return None
    on_path, on_shortest_paths = set(_path_cells(map_desc, path)), _cells_of_shortest_paths(map_desc)

    def rank(edited: MapDesc) -> Rank:
        if shortest_path(edited) != path:
            return None
        return (sum(edited[row][column] == -1 for row, column in on_shortest_paths),)

    return _best_edit(map_desc, [cell for cell in _cells(map_desc, 0) if cell not in on_path], rank, random)


def _best_edit(
    map_desc: MapDesc, ice: list[Cell], rank: Callable[[MapDesc], Rank], random: np.random.Generator
) -> MapDesc | None:
    """Return an edit of the lowest rank, chosen at random, that moves a hole to one of the cells `ice`."""
    edits = [(hole, cell) for hole in _cells(map_desc, -1) or [None] for cell in ice]
    best, lowest = None, None
    for number in random.permutation(len(edits)):
        edited = _with_hole_moved(map_desc, *edits[number])
        rank_of_edited = rank(edited)
        if rank_of_edited is not None and (lowest is None or rank_of_edited < lowest):
            best, lowest = edited, rank_of_edited
            if not any(lowest):
                break
    return best


def _with_hole_moved(map_desc: MapDesc, hole: Cell | None, ice: Cell) -> MapDesc:
    """Return a map with ice in place of a hole, if there is one, and a hole in place of ice."""
    rows = [list(row) for row in map_desc]
    if hole is not None:
        rows[hole[0]][hole[1]] = 0
    rows[ice[0]][ice[1]] = -1
    return tuple(map(tuple, rows))


def _cells(map_desc: MapDesc, kind: int) -> list[Cell]:
    return [(row, column) for row, column, cell in cells_of(map_desc) if cell == kind]


def _path_cells(map_desc: MapDesc, path: str) -> list[Cell]:
    """Return the cells of a path that leads from the start to the goal, both included."""
    cells = [find_cell(map_desc, 1)]
    for move in path:
        (row, column), (down, right) = cells[-1], MOVES[move]
        cells.append((row + down, column + right))
    return cells


def _cells_of_shortest_paths(map_desc: MapDesc) -> list[Cell]:
    """Return the cells that are on at least one shortest path from start to goal, these two included."""
    to_goal = distance_to_goal(map_desc)
    swapped = tuple(tuple({1: 2, 2: 1}.get(cell, cell) for cell in row) for row in map_desc)
    to_start = distance_to_goal(swapped)
    shortest = to_goal[find_cell(map_desc, 1)]
    return [cell for cell, distance in to_goal.items() if distance + to_start.get(cell, shortest) == shortest]
