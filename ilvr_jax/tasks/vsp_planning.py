r"""VSP spatial planning: the moves in an answer's \boxed{} are played on the map.

A policy that ignores holes is scored on the same maps, as a baseline: many maps can be solved without seeing them.
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
from jaxtyping import Shaped, UInt8

from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import DataConfig
from ilvr_jax.data.formats import FORMATS
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.edits import irrelevant_edit, relevant_edit
from ilvr_jax.data.frozen_lake.maps import MOVE_WORDS, MOVES, Cell, find_cell, shortest_path
from ilvr_jax.data.frozen_lake.sketches import cell_states, path_to_goal
from ilvr_jax.data.frozen_lake.source import make_record
from ilvr_jax.data.images import open_image
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import BadRecord, Look, MapDesc, Record, prefix_errors
from ilvr_jax.tasks.final_answer import find_boxed

MOVE_LETTERS = {word: letter for letter, word in MOVE_WORDS.items()}
PAINTED = "without holes"  # the control: the same map with its holes painted over

LONGEST = 10_000  # characters of a box; a longer one is not read
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
JOINED_WORD = re.compile("|".join(form for word in MOVE_LETTERS for form in (word.title(), word.upper())))
STATED_MOVE = re.compile(rf"\b({'|'.join(MOVE_LETTERS)})\b", re.IGNORECASE)


class Outcome(enum.StrEnum):
    """The cell on which an answer's moves end."""

    GOAL = "goal"
    HOLE = "hole"
    SHORT = "short"  # on ice or the start
    UNPARSED = "unparsed"  # the answer has no readable moves


def open_source(path: Path, root: Path | None, on_bad_record: str, follow_links: bool = True) -> Source:
    """Open JSON lines of maps, with steps or without; raise BadRecord if they cannot be read."""
    return FORMATS["vsp"](path, root, on_bad_record, for_evaluation=True, follow_links=follow_links)


def check(record: Record) -> None:
    """Raise BadRecord, naming the record, if it has no map or not exactly one image."""
    if record.map_desc is None:
        raise BadRecord(f'{record.name}: must have a "map_desc", on which the moves are played, got none')
    if len(record.images) != 1:
        raise BadRecord(f"{record.name}: must have one image, the drawing of its map, got {len(record.images)}")


def find_answer(text: str, record: Record | None = None) -> str | None:
    """Return the moves in a decoded text's last box (see `parse_moves`); `record` is not needed."""
    return parse_moves(text)


def canonical(answer: str) -> str:
    """Return an answer unchanged: letters of UDLR have one spelling."""
    return answer


def is_right(record: Record, answer: str) -> bool:
    """Return whether the moves end on the goal of the record's map."""
    return play(record.map_desc, answer) == Outcome.GOAL


def parse_moves(text: str) -> str | None:
    r"""Return the moves in the last `\boxed{...}` as letters of UDLR, None if it holds anything else.

    Moves are the letters, with or without spaces, the words up, down, left and right, in any case, or arrows. They may
    be separated by whitespace, punctuation, brackets, quotes, arrows to the right, LaTeX typesetting, words such as
    "and" and "then", and the numbers of a list; a heading such as "Moves:" may precede them and a count follow each:
    "R x2". An empty box, or one that is not closed, gives None.
    """
    inside = find_boxed(text)
    if not inside or len(inside) > LONGEST:
        return None
    inside = unicodedata.normalize("NFKC", inside).translate(OTHER_ARROWS).translate(CHINESE)
    if "..." in inside:  # some moves are omitted
        return None
    inside = LATEX_ARROW.sub(lambda arrow: f" {ARROWS[(arrow[1] or 'right').lower()]} ", inside)
    inside = HEADING.sub("", TYPESETTING.sub(" ", inside), count=1)
    inside = REPEATED.sub(_repeated, GLOSS.sub(_one_of_two, inside))
    inside = _without_numbers(inside)
    pieces = [piece for piece in BETWEEN.split(inside) if piece and piece.lower() not in FILLERS]
    moves = "".join(map(_moves_of, pieces)) if all(map(_moves_of, pieces)) else ""
    if not pieces:
        moves = "".join(ARROW_MOVES[arrow] for arrow in inside if arrow in ARROW_MOVES)
    elif any(arrow in inside for arrow in "←↑↓"):  # only → can separate letters
        return None
    return moves or None


def _moves_of(piece: str) -> str:
    """Return the moves of a run of letters or words without separators; "" if it is something else."""
    if set(piece.upper()) <= MOVES.keys():
        return piece.upper()
    if piece.lower() in MOVE_LETTERS:
        return MOVE_LETTERS[piece.lower()]
    words = JOINED_WORD.findall(piece)
    return "".join(MOVE_LETTERS[word.lower()] for word in words) if "".join(words) == piece else ""


def _one_of_two(gloss: re.Match) -> str:
    """Return a move that is written twice, "Right (R)", once; an unreadable "?" where the two differ."""
    first, second = _moves_of(gloss[1]), _moves_of(gloss[2])
    return gloss[1] if first == second else "?"


def _repeated(repeated: re.Match) -> str:
    """Return a move with a count beside it as many times as the count."""
    after, number, before = repeated[2], repeated[3], repeated[4]
    return f" {repeated[1] or before} " * int(after or number or 2)


def _without_numbers(text: str) -> str:
    """Remove the numbers of a list from a text, if they count up from 1."""
    numbers = NUMBERED.findall(text)
    return NUMBERED.sub(" ", text) if numbers == [str(number + 1) for number in range(len(numbers))] else text


def stated_moves(text: str) -> str:
    """Return the moves written as words (up, down, left, right) as letters of UDLR."""
    return "".join(MOVE_LETTERS[word.lower()] for word in STATED_MOVE.findall(text))


def walk(map_desc: MapDesc, moves: str) -> list[Cell]:
    """Return the cells (row, column) that the elf visits: the start, then one for each move.

    A move off the edge repeats the cell. A hole ends the walk and is its last cell.
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


def with_steps(record: Record, data: DataConfig) -> Record:
    """Return the record with the steps that `make_record` gives its map in a run with this data.

    Its moves are those of `path_to_goal`, or of the shortest path where looks at distances do not reach the start.
    Cells of helper images are as large as in the record's image. Raises BadRecord if the map has no path or the image
    cannot be read.
    """
    path = path_to_goal(record.map_desc, data.frozen_lake) or shortest_path(record.map_desc)
    if path is None:
        raise BadRecord(f"{record.name}: the map must have a path from start to goal, got none")
    settings = dataclasses.replace(data.frozen_lake, cell_pixels=cell_pixels(record))
    return dataclasses.replace(record, steps=make_record(record.map_desc, path, settings).steps)


def slot_states(record: Record, data: DataConfig) -> Shaped[np.ndarray, "looks cells"]:
    """Return the words for what looks at distances show of each cell of the record's map, "" beside the map.

    Raises BadConfig for a run with other looks: the map between two moves depends on the moves of the answer.
    """
    if data.frozen_lake.looks != "distances":
        raise BadConfig(
            "`data.frozen_lake.looks` must be distances for slots whose states are known, got "
            f"{data.frozen_lake.looks}, with which looks depend on the answer's moves"
        )
    return cell_states(record.map_desc, data.frozen_lake)


def draw_look(record: Record, texts: Sequence[str], data: DataConfig) -> UInt8[np.ndarray, "height width 3"]:
    """Draw the picture for the look that follows `texts`, those before each look of the answer so far.

    It is the map after the moves written as words. Without moves it is the map at the start; after a move into a hole,
    the elf is in that hole. In a run whose looks show distances, it is the helper image of that look, and of the last
    one after it. Cells are as large as in the record's image.
    """
    if data.frozen_lake.looks == "distances":
        sketches = [step.helper_image for step in with_steps(record, data).steps if isinstance(step, Look)]
        return sketches[min(len(texts), len(sketches)) - 1]
    moves = stated_moves("".join(texts))
    cells = walk(record.map_desc, moves)
    played = moves[: len(cells) - 1]
    return draw_map(record.map_desc, cell_pixels(record), elf=cells[-1], last_move=played[-1:] or "D")


def cell_pixels(record: Record) -> int:
    """Return the side of a cell in the record's image, in pixels; raise BadRecord if it cannot be read."""
    image = record.images[0]
    if not isinstance(image, np.ndarray):
        with prefix_errors(record.name):
            image = np.asarray(open_image(image, record.name if isinstance(image, bytes) else str(image)))
    return max(1, round(image.shape[0] / len(record.map_desc)))


def controls(record: Record) -> dict[str, Record]:
    """Return the control of a record: its map with the holes painted over."""
    return {PAINTED: paint_holes_over(record)}


def paint_holes_over(record: Record) -> Record:
    """Return a record with ice in place of its map's holes and a new image with cells of the same size."""
    map_desc = without_holes(record.map_desc)
    drawn = draw_map(map_desc, cell_pixels(record))
    return dataclasses.replace(record, map_desc=map_desc, images=(drawn,), name=f"{record.name} without holes")


def edits(record: Record, seed: int) -> dict[str, Record]:
    """Return the record with one hole of its map moved, where such maps exist; the same for the same map and seed.

    "relevant": the map's `shortest_path` fails on the edited map, which has another one. "irrelevant": `shortest_path`
    is the same. A map without holes gets one more (see data/frozen_lake/edits.py). The image is new, with cells of the
    same size; the answer, if there is one, is the new shortest path; steps are removed, since they are those of the old
    map. Raises BadRecord if the record's image cannot be read.
    """
    map_desc = record.map_desc
    random = np.random.default_rng([seed, len(map_desc), *(cell + 1 for row in map_desc for cell in row)])
    edited_maps = {"relevant": relevant_edit(map_desc, random), "irrelevant": irrelevant_edit(map_desc, random)}
    size = cell_pixels(record)
    return {
        name: dataclasses.replace(
            record,
            map_desc=edited,
            images=(draw_map(edited, size),),
            steps=(),
            answer=None if record.answer is None else shortest_path(edited),
            name=f"{record.name} {name} edit",
        )
        for name, edited in edited_maps.items()
        if edited is not None
    }


def figures(records: Mapping[int, Record], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return success by groups of maps, the success of a policy that ignores holes, and the effect of the control.

    `records` are by number; `lines` are those of the results file (`evaluation.results.FIELDS`). A map's success is the
    mean over its samples.
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
        "hole_blind_by_level": {str(level): rate for level, rate in hole_blind.by_level.items()},
        "hole_blind_where_holes_matter": hole_blind.where_holes_matter,
        "hole_blind_on_detours": hole_blind.on_detours,
        "unchanged_when_holes_painted_over": fmean(first[n] == painted[n] for n in both) if both else None,
    }


def play(map_desc: MapDesc, moves: str | None) -> Outcome:
    """Return the outcome of moves on a map.

    The last cell must be the goal: moves that reach it and leave it again do not succeed. gymnasium is more lenient: it
    ends an episode at the goal.
    """
    if moves is None:
        return Outcome.UNPARSED
    row, column = walk(map_desc, moves)[-1]
    return {2: Outcome.GOAL, -1: Outcome.HOLE}.get(map_desc[row][column], Outcome.SHORT)


def hole_blind_success(map_desc: MapDesc) -> float:
    """Return the probability that a policy which ignores holes succeeds.

    The policy plays one of the shortest paths from start to goal on the map without holes, chosen uniformly.
    """
    (row, column), (goal_row, goal_column) = find_cell(map_desc, 1), find_cell(map_desc, 2)
    down, right = (1 if goal_row >= row else -1), (1 if goal_column >= column else -1)
    safe: dict[Cell, int] = {}  # number of shortest paths to a cell that avoid holes
    for r in range(row, goal_row + down, down):
        for c in range(column, goal_column + right, right):
            paths = 1 if (r, c) == (row, column) else safe.get((r - down, c), 0) + safe.get((r, c - right), 0)
            safe[r, c] = 0 if map_desc[r][c] == -1 else paths
    height, width = abs(goal_row - row), abs(goal_column - column)
    return safe[goal_row, goal_column] / math.comb(height + width, height)


def holes_matter(map_desc: MapDesc) -> bool:
    """Return whether holes block at least one shortest path of the map without holes."""
    return hole_blind_success(map_desc) < 1


def is_detour(map_desc: MapDesc) -> bool:
    """Return whether holes block every shortest path of the map without holes."""
    return hole_blind_success(map_desc) == 0


GROUPS = {"holes in the way": holes_matter, "detour needed": is_detour}


def groups(record: Record) -> list[str]:
    """Return the names of the groups of maps, of GROUPS, that the record's map belongs to."""
    return [name for name, contains in GROUPS.items() if contains(record.map_desc)]


def level(record: Record) -> str:
    """Return the name of the level of the record's map, which is the length of its side."""
    return f"level {len(record.map_desc)}"


def without_holes(map_desc: MapDesc) -> MapDesc:
    """Return the map with ice in place of its holes."""
    return tuple(tuple(max(cell, 0) for cell in row) for row in map_desc)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Mean success on groups of maps, None for a group without maps."""

    overall: float | None
    by_level: dict[int, float]  # a map's level is the length of its side
    where_holes_matter: float | None
    on_detours: float | None


def mean_success(maps: Sequence[MapDesc], success: Sequence[float]) -> Rates:
    """Average the success on each of `maps`, from 0 to 1, over the groups of maps."""

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
    """Return the success of the policy that ignores holes on groups of maps."""
    return mean_success(maps, [hole_blind_success(map_desc) for map_desc in maps])
