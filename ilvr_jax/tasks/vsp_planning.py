r"""VSP spatial planning: moves in \boxed{} are read out of the answer and played on the map.

Beside success stands what a policy that ignores holes gets on the same maps: without it a rate says little.
"""

import dataclasses
import enum
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ilvr_jax.data.formats import FORMATS
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.source import MOVE_WORDS, MOVES, Cell, find_cell
from ilvr_jax.data.images import open_image
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import BadRecord, MapDesc, Record
from ilvr_jax.tasks.final_answer import find_boxed

LETTERS = {word: letter for letter, word in MOVE_WORDS.items()}
PAINTED = "without holes"

LONGEST = 10_000  # characters of a box that is read
ARROW_MOVES = {"→": "R", "←": "L", "↑": "U", "↓": "D"}
ARROWS = {MOVE_WORDS[move]: arrow for arrow, move in ARROW_MOVES.items()}
OTHER_ARROWS = str.maketrans("⇒⟶⟹➔➜➝➞➡⇨►▶⇐⟵⬅⇦⇑⬆⇓⬇", "→" * 11 + "←" * 4 + "↑" * 2 + "↓" * 2)
LATEX_ARROW = re.compile(r"\\(?:(?:long|x)?(?:(right|left|up|down)arrow)|to|implies)(?![A-Za-z])", re.IGNORECASE)
TYPESETTING = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|sf|it|tt)|mbox|q?quad|newline|left|right|[lr]angle|displaystyle"
    r"|cdot|[bB]igg?[lr]?|rm|bf|tt|verb|item)(?![A-Za-z])"
    r"|\\(?:begin|end)\s*\{(?:array|[pbv]?matrix|aligned|gathered|enumerate|itemize)\}(?:\{[clr|]*\})?"
    r"|\\[\\,;:!> {}]|\ufe0f"
)
HEADING = re.compile(
    r"^[\s{*]*(?:the )?(?:(?:final|action|full|correct|move|safe|shortest|optimal) ){0,3}"
    r"(?:moves?|path|plan|actions?|answer|sequence|solution)\s*[:=]",
    re.I,
)
CHINESE = str.maketrans({"右": " R ", "左": " L ", "上": " U ", "下": " D ", "向": " ", "往": " "})
# "R x2", "R^2" and "right twice", and "2R" where no number is the first of a list.
REPEATED = re.compile(
    r"(?<![A-Za-z\\])([A-Za-z]+)(?:\s*(?:[x×*]|\^|\\times(?![A-Za-z]))\s*\{?([2-9])\}?(?!\w)|\s+twice\b)"
    r"|(?<!\w)([2-9])\s?(?:[x×]\s?)?([A-Za-z]+)"
)
GLOSS = re.compile(r"([A-Za-z]+)\s*\(\s*([A-Za-z]+)\s*\)")
NUMBERED = re.compile(
    r"(?:(?<=^)|(?<=[\s{(\[,;]))(?:[Ss]tep\s*)?\(?([1-9][0-9]?)(?:[.:]|\s?\))(?=\s*[*\"'{(\[]*[A-Za-z])"
)
BETWEEN = re.compile(r"(?:[-=]+>|>|[\s,;:.。、|{}()\[\]<⟨⟩\"'`“”‘’*_$~&•·+–—→←↑↓-])+")
FILLERS = ("and", "then", "move", "go", "first", "next", "finally")
JOINED_WORD = re.compile("|".join(form for word in LETTERS for form in (word.title(), word.upper())))
STATED_MOVE = re.compile(rf"\b({'|'.join(LETTERS)})\b", re.IGNORECASE)


class Outcome(enum.StrEnum):
    """How an answer ends."""

    GOAL = "goal"
    HOLE = "hole"
    SHORT = "short"  # on the ice, but not at the goal
    UNPARSED = "unparsed"  # no moves could be read


def open_source(path: Path, root: Path | None, on_bad_record: str, follow_links: bool = True) -> Source:
    """Opens JSON lines of maps, with steps or without; raises BadRecord for what cannot be read."""
    return FORMATS["vsp"](path, root, on_bad_record, for_evaluation=True, follow_links=follow_links)


def check(record: Record) -> None:
    """Raises BadRecord, naming the record, if it has no map or not exactly one image."""
    if record.map_desc is None:
        raise BadRecord(f'{record.name}: has no "map_desc", which evaluation needs to play the moves on')
    if len(record.images) != 1:
        raise BadRecord(f"{record.name}: must have one image, that of its map, got {len(record.images)}")


def find_answer(text: str, record: Record | None = None) -> str | None:
    """Returns the moves that a decoded text ends in, as `parse_moves` reads them; the record makes no difference."""
    return parse_moves(text)


def canonical(answer: str) -> str:
    """Returns an answer as it is: letters of UDLR are one spelling already."""
    return answer


def is_right(record: Record, answer: str) -> bool:
    """Says whether the moves end on the goal of the record's map."""
    return play(record.map_desc, answer) == Outcome.GOAL


def parse_moves(text: str) -> str | None:
    r"""Returns the moves in the last `\boxed{...}` as letters of UDLR, None if that is not a list of moves and no more.

    Moves are the letters, together or apart, the words up, down, left and right, in any case, or arrows. Between them
    may stand whitespace, punctuation, brackets, quotes, arrows to the right, LaTeX that typesets them, words such as
    "and" and "then", and the numbers of a numbered list; before them a heading such as "Moves:", beside each a count,
    "R x2". An empty box, or one that is not closed, is None.
    """
    inside = find_boxed(text)
    if not inside or len(inside) > LONGEST:
        return None
    inside = unicodedata.normalize("NFKC", inside).translate(OTHER_ARROWS).translate(CHINESE)
    if "..." in inside:  # moves that are not written
        return None
    inside = LATEX_ARROW.sub(lambda arrow: f" {ARROWS[(arrow[1] or 'right').lower()]} ", inside)
    inside = HEADING.sub("", TYPESETTING.sub(" ", inside), count=1)
    inside = REPEATED.sub(_repeated, GLOSS.sub(_one_of_two, inside))
    inside = _without_numbers(inside)
    pieces = [piece for piece in BETWEEN.split(inside) if piece and piece.lower() not in FILLERS]
    moves = "".join(map(_moves_of, pieces)) if all(map(_moves_of, pieces)) else ""
    if not pieces:
        moves = "".join(ARROW_MOVES[arrow] for arrow in inside if arrow in ARROW_MOVES)
    elif any(arrow in inside for arrow in "←↑↓"):  # which separate no letters
        return None
    return moves or None


def _moves_of(piece: str) -> str:
    """Returns the moves of letters or words without anything between them; "" if they are something else."""
    if set(piece.upper()) <= MOVES.keys():
        return piece.upper()
    if piece.lower() in LETTERS:
        return LETTERS[piece.lower()]
    words = JOINED_WORD.findall(piece)
    return "".join(LETTERS[word.lower()] for word in words) if "".join(words) == piece else ""


def _one_of_two(gloss: re.Match) -> str:
    """Returns a move that is given twice, "Right (R)", once; what it was, unreadable, where they are two moves."""
    first, second = _moves_of(gloss[1]), _moves_of(gloss[2])
    return gloss[1] if first == second else "?"


def _repeated(repeated: re.Match) -> str:
    """Returns a move that stands once, with its count beside it, as often as that."""
    after, number, before = repeated[2], repeated[3], repeated[4]
    return f" {repeated[1] or before} " * int(after or number or 2)


def _without_numbers(text: str) -> str:
    """Returns a text without the numbers of a list, if they count its moves from 1."""
    numbers = NUMBERED.findall(text)
    return NUMBERED.sub(" ", text) if numbers == [str(number + 1) for number in range(len(numbers))] else text


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


def draw_look(record: Record, text: str) -> UInt8[np.ndarray, "height width 3"]:
    """Draws a record's map after the moves told in `text`, which is what a look that follows it should show.

    Before any move that is the map at the start; after one into a hole, the elf in that hole. Cells are of the size
    that they have in the record's image.
    """
    moves = stated_moves(text)
    cells = walk(record.map_desc, moves)
    played = moves[: len(cells) - 1]
    return draw_map(record.map_desc, cell_pixels(record), elf=cells[-1], last_move=played[-1:] or "D")


def cell_pixels(record: Record) -> int:
    """Returns the side of a cell in the record's image; raises BadRecord if that cannot be read."""
    image = record.images[0]
    if not isinstance(image, np.ndarray):
        try:
            image = np.asarray(open_image(image, record.name if isinstance(image, bytes) else str(image)))
        except BadRecord as error:
            raise BadRecord(f"{record.name}: {error}") from error
    return max(1, round(image.shape[0] / len(record.map_desc)))


def controls(record: Record) -> dict[str, Record]:
    """Returns the records that are asked beside this one and not scored: its map with its holes painted over."""
    return {PAINTED: paint_holes_over(record)}


def paint_holes_over(record: Record) -> Record:
    """Returns a map's record with ice in place of its holes; the image is drawn anew with cells of the same size."""
    map_desc = without_holes(record.map_desc)
    drawn = draw_map(map_desc, cell_pixels(record))
    return dataclasses.replace(record, map_desc=map_desc, images=(drawn,), name=f"{record.name} without holes")


def figures(records: Mapping[int, Record], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what success means on these maps: by groups of them, and beside a policy that ignores holes.

    `records` are by number; `lines` as `tasks.results` keeps them. A map's success is the mean of its samples.
    """
    right, first, painted = defaultdict(list), {}, {}
    for line in lines:
        if line["form"] == PAINTED:
            painted[line["number"]] = line["answer"]
        else:
            right[line["number"]].append(line["right"])
            if line["sample"] == 0 and line["answer"] is not None:
                first[line["number"]] = line["answer"]
    maps = [record.map_desc for record in records.values()]
    success, hole_blind = mean_success(maps, [fmean(right[number]) for number in records]), hole_blind_rates(maps)
    both = first.keys() & painted.keys()
    return {
        "success_by_level": {str(level): rate for level, rate in success.by_level.items()},
        "success_where_holes_matter": success.where_holes_matter,
        "success_on_detours": success.on_detours,
        "hole_blind_success": hole_blind.overall,
        "hole_blind_where_holes_matter": hole_blind.where_holes_matter,
        "unchanged_when_holes_painted_over": fmean(first[n] == painted[n] for n in both) if both else None,
    }


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
