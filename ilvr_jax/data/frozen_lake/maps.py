"""FrozenLake maps as squares of numbers, their cells, distances and paths."""

from collections.abc import Iterator, Mapping

import numpy as np

from ilvr_jax.data.records import MapDesc

Cell = tuple[int, int]  # row, column, from 0
MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}  # in the order that breaks ties of shortest paths
CELL_WORDS = {1: "elf", 2: "goal", -1: "hole", 0: "ice"}
MOVE_WORDS = {"U": "up", "D": "down", "L": "left", "R": "right"}


def random_map(random: np.random.Generator, side: int, hole_probability: float) -> MapDesc:
    """Draw a square map: start and goal on two random cells, any other cell a hole with the given probability."""
    cells = np.where(random.random(side * side) < hole_probability, -1, 0).tolist()
    start, goal = random.integers(side * side), random.integers(side * side - 1)
    cells[start] = 1
    cells[goal + (goal >= start)] = 2
    return tuple(tuple(cells[row * side : (row + 1) * side]) for row in range(side))


def find_cell(map_desc: MapDesc, kind: int) -> Cell:
    """Return the first cell of a kind (1 start, 2 goal); raise ValueError if there is none."""
    for row, cells in enumerate(map_desc):
        if kind in cells:
            return row, cells.index(kind)
    raise ValueError(f"the map must have a cell {kind} ({CELL_WORDS[kind]}), got none")


def empty_map_distance(map_desc: MapDesc) -> int:
    """Return the number of moves from start to goal on the map without holes."""
    (start_row, start_column), (goal_row, goal_column) = find_cell(map_desc, 1), find_cell(map_desc, 2)
    return abs(start_row - goal_row) + abs(start_column - goal_column)


def distance_to_goal(map_desc: MapDesc) -> dict[Cell, int]:
    """Return the number of moves to the goal, for each cell from which it can be reached."""
    height, width = len(map_desc), len(map_desc[0])
    goal = find_cell(map_desc, 2)
    distances, reached = {goal: 0}, [goal]
    for row, column in reached:  # breadth first: grows during the loop
        further = distances[row, column] + 1
        for down, right in MOVES.values():
            cell = next_row, next_column = row + down, column + right
            if 0 <= next_row < height and 0 <= next_column < width and cell not in distances:
                if map_desc[next_row][next_column] != -1:
                    distances[cell] = further
                    reached.append(cell)
    return distances


def shortest_path(map_desc: MapDesc) -> str | None:
    """Return the shortest path from start to goal as letters of UDLR, None if there is no path.

    Ties are broken at every cell by the first of up, down, left and right that comes nearer to the goal.
    """
    return descend(map_desc, distance_to_goal(map_desc))


def additional_moves(map_desc: MapDesc) -> int:
    """Return the number of moves by which holes make the shortest path longer; below 0 if there is no path."""
    return distance_to_goal(map_desc).get(find_cell(map_desc, 1), 0) - empty_map_distance(map_desc)


def descend(map_desc: MapDesc, distances: Mapping[Cell, int]) -> str | None:
    """Return the path from the start that always moves to the neighbour with the smallest of some distances.

    They must be numbers of moves of paths to the goal. Returns None if no neighbour of the start has one.
    """
    cell, path = find_cell(map_desc, 1), ""
    while not path or distances[cell]:
        move = best_move(cell, distances)
        if move is None:
            return None
        path, cell = path + move, step(cell, move)
    return path


def best_move(cell: Cell, distances: Mapping[Cell, int]) -> str | None:
    """Return the move to the neighbour with the smallest distance, the first of MOVES among equals.

    None if no neighbour has a distance.
    """
    near = {move: distances[step(cell, move)] for move in MOVES if step(cell, move) in distances}
    return min(near, key=near.__getitem__, default=None)


def step(cell: Cell, move: str) -> Cell:
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


def cells_of(map_desc: MapDesc) -> Iterator[tuple[int, int, int]]:
    """Yield the row, the column and the kind of each cell."""
    for row, kinds in enumerate(map_desc):
        for column, kind in enumerate(kinds):
            yield row, column, kind


def symmetries(map_desc: MapDesc) -> Iterator[MapDesc]:
    """Yield the 8 rotations and reflections of a map, with the map itself."""
    for mirrored in (map_desc, map_desc[::-1]):
        for _ in range(4):
            yield mirrored
            mirrored = tuple(zip(*mirrored[::-1], strict=True))
