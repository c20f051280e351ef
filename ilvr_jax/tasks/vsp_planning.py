r"""VSP spatial planning: moves in \boxed{} are read out of the answer and played on the map.

Beside success stands what a policy that ignores holes gets on the same maps: without it a rate says little.
"""

import dataclasses
import enum
import math
import re
from collections.abc import Sequence
from statistics import fmean

from ilvr_jax.data.frozen_lake import MOVE_WORDS, MOVES, Cell, find_cell
from ilvr_jax.data.records import MapDesc

LETTERS = {word: letter for letter, word in MOVE_WORDS.items()}
STATED_MOVE = re.compile(rf"\b({'|'.join(LETTERS)})\b", re.IGNORECASE)


class Outcome(enum.StrEnum):
    """How an answer ends."""

    GOAL = "goal"
    HOLE = "hole"
    SHORT = "short"  # on the ice, but not at the goal
    UNPARSED = "unparsed"  # no moves could be read


def parse_moves(text: str) -> str | None:
    r"""Returns the moves in the last `\boxed{...}` as letters of UDLR, None if that is not a list of moves.

    Accepted are the letters and the words up, down, left and right, in any case, with spaces and commas anywhere
    between them. An empty box, or one that is not closed, is None.
    """
    _, box, rest = text.rpartition("\\boxed")
    inside = re.match(r"\s*\{([^{}]*)\}", rest)
    if not box or not inside:
        return None
    moves = ""
    for piece in re.split(r"[\s,]+", inside[1].strip(" \t\n,")):
        if piece.lower() in LETTERS:
            moves += LETTERS[piece.lower()]
        elif piece and set(piece.upper()) <= MOVES.keys():
            moves += piece.upper()
        else:
            return None
    return moves


def stated_moves(text: str) -> str:
    """Returns the moves told in words (up, down, left, right) as letters of UDLR."""
    return "".join(LETTERS[word.lower()] for word in STATED_MOVE.findall(text))


def walk(map_desc: MapDesc, moves: str) -> list[Cell]:
    """Returns the cells (row, column) that the elf stands on, the start first, one more with each move.

    A move off the edge leaves it where it is. A hole ends the walk: the hole is the last cell.
    """
    cells = [find_cell(map_desc, 1)]
    for move in moves:
        row, column = cells[-1]
        if map_desc[row][column] == -1:
            break
        down, right = MOVES[move]
        inside = 0 <= row + down < len(map_desc) and 0 <= column + right < len(map_desc[0])
        cells.append((row + down, column + right) if inside else (row, column))
    return cells


def play(map_desc: MapDesc, moves: str | None) -> Outcome:
    """Returns how moves end on a map.

    The last cell must be the goal: moves that pass over it and leave it again do not succeed. gymnasium is more
    lenient there, as it stops an episode at the goal.
    """
    if moves is None:
        return Outcome.UNPARSED
    row, column = walk(map_desc, moves)[-1]
    return {2: Outcome.GOAL, -1: Outcome.HOLE}.get(map_desc[row][column], Outcome.SHORT)


def hole_blind_success(map_desc: MapDesc) -> float:
    """Returns the probability that a policy which ignores holes succeeds.

    It plays a random one, each as likely, of the shortest paths from start to goal on the map without holes.
    """
    (row, column), (goal_row, goal_column) = find_cell(map_desc, 1), find_cell(map_desc, 2)
    down, right = (1 if goal_row >= row else -1), (1 if goal_column >= column else -1)
    safe: dict[Cell, int] = {}  # shortest paths to a cell that avoid holes
    for r in range(row, goal_row + down, down):
        for c in range(column, goal_column + right, right):
            paths = 1 if (r, c) == (row, column) else safe.get((r - down, c), 0) + safe.get((r, c - right), 0)
            safe[r, c] = 0 if map_desc[r][c] == -1 else paths
    height, width = abs(goal_row - row), abs(goal_column - column)
    return safe[goal_row, goal_column] / math.comb(height + width, height)


def holes_matter(map_desc: MapDesc) -> bool:
    """Says whether holes block some shortest path of the map without holes."""
    return hole_blind_success(map_desc) < 1


def is_detour(map_desc: MapDesc) -> bool:
    """Says whether holes block every shortest path of the map without holes."""
    return hole_blind_success(map_desc) == 0


def without_holes(map_desc: MapDesc) -> MapDesc:
    """Returns the map with ice in place of its holes."""
    return tuple(tuple(max(cell, 0) for cell in row) for row in map_desc)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Mean success on maps, None where there are none."""

    overall: float | None
    by_level: dict[int, float]  # a map's level is the length of its side
    where_holes_matter: float | None
    on_detours: float | None


def mean_success(maps: Sequence[MapDesc], success: Sequence[float]) -> Rates:
    """Averages the success on each of `maps`, from 0 to 1, over the groups of maps that are reported."""

    def mean(chosen: Sequence[bool]) -> float | None:
        values = [value for value, taken in zip(success, chosen, strict=True) if taken]
        return fmean(values) if values else None

    return Rates(
        overall=mean([True] * len(maps)),
        by_level={level: mean([len(m) == level for m in maps]) for level in sorted({len(m) for m in maps})},
        where_holes_matter=mean([holes_matter(m) for m in maps]),
        on_detours=mean([is_detour(m) for m in maps]),
    )


def hole_blind_rates(maps: Sequence[MapDesc]) -> Rates:
    """Returns what the hole-blind policy gets on maps."""
    return mean_success(maps, [hole_blind_success(map_desc) for map_desc in maps])
