"""Generated records of FrozenLake maps like those of VSP spatial planning: maps, shortest paths, answers."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.frozen_lake.drawing import draw_map, draw_signs
from ilvr_jax.data.ilvr import check_map
from ilvr_jax.data.json_lines import has_no_lines, open_records, read_object, read_pieces
from ilvr_jax.data.records import Fingerprint, Look, MapDesc, Record, Text, prefix_errors

Cell = tuple[int, int]  # row, column, from 0

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}  # in the order that breaks ties of shortest paths

CELL_WORDS = {1: "elf", 2: "goal", -1: "hole", 0: "ice"}
MOVE_WORDS = {"U": "up", "D": "down", "L": "left", "R": "right"}
READING = "Read the map."  # the question of records that ask for the map in words
FARTHEST_SIGN = 12  # cells up to this many moves from the goal have the sign of their distance
HOLE_SIGN, START_SIGN, UNKNOWN_SIGN = 13, 14, 15
GOAL_SIGN = 12  # at moves; at distances it is that of 0
# The signs in words. At moves the sign of the start tells its move too.
DISTANCE_SIGN_WORDS = np.array([*map(str, range(FARTHEST_SIGN + 1)), "hole", "elf", "far"])
MOVE_SIGN_WORDS = np.array([*MOVE_WORDS.values(), *MOVE_WORDS.values(), *4 * [""], "goal", "hole", "", "far"])
FARTHEST = 9  # larger distances are written as "far"
ATTEMPTS = 20_000  # to draw a map for a record: with the defaults, one map in 25 to 120 needs a detour


class NoMap(ValueError):
    """No map meets the settings. Not a BadRecord, since skipping the record would hide the problem."""


class FrozenLakeSource:
    """`count` records, generated when they are read; record i is a pure function of (settings, seed, i).

    Raises BadRecord if a file of `settings.exclude` cannot be read.
    """

    def __init__(self, settings: FrozenLakeConfig, seed: int, count: int):
        self.settings = settings
        self.seed = seed
        self.count = count
        self.excluded = frozenset(
            variant for path in settings.exclude for map_desc in read_maps(path) for variant in symmetries(map_desc)
        )

    def fingerprint(self) -> str:
        """Return a digest of the settings, the seed, the number of records and the excluded maps."""
        fingerprint = Fingerprint()
        settings = dataclasses.asdict(self.settings) | {"exclude": None}
        fingerprint.add(tuple(sorted(settings.items())), self.seed, self.count, tuple(sorted(self.excluded)))
        return fingerprint.text(self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        """Generate a record; raise IndexError for a number out of range, NoMap if no map meets the settings."""
        if not 0 <= index < self.count:
            raise IndexError(f"the record must be from 0 to {self.count - 1}, got {index}")
        random, name = np.random.default_rng((self.seed, index)), f"frozen_lake record {index}"
        map_desc, moves = self._make_map(random)
        if self.settings.readings and random.random() < self.settings.readings:
            return make_reading(map_desc, self.settings, name)
        sketched = self._make_map(random)[0] if self.settings.sketches == "unrelated" else map_desc
        return make_record(map_desc, moves, self.settings, name, sketched)

    def _make_map(self, random: np.random.Generator) -> tuple[MapDesc, str]:
        """Draw maps until one can be solved, is not excluded, and needs a detour if this record is one that must."""
        settings = self.settings
        side = settings.levels[random.integers(len(settings.levels))]
        detour_needed = random.random() < settings.detour_share
        for _ in range(ATTEMPTS):
            map_desc = random_map(random, side, settings.hole_probability)
            moves = path_to_goal(map_desc, settings)
            if moves is None or len(moves) > settings.max_moves or map_desc in self.excluded:
                continue
            if not detour_needed or len(shortest_path(map_desc)) > empty_map_distance(map_desc):
                return map_desc, moves
        raise NoMap(
            f"data.frozen_lake: hole_probability {settings.hole_probability}, detour_share {settings.detour_share}, "
            f"max_moves {settings.max_moves} and exclude must allow maps of level {side}, but none of {ATTEMPTS} maps "
            "met them"
        )


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


def descend(map_desc: MapDesc, distances: Mapping[Cell, int]) -> str | None:
    """Return the path from the start that always moves to the neighbour with the smallest of some distances.

    They must be numbers of moves of paths to the goal. Among equals the first of MOVES is taken. Returns None if no
    neighbour of the start has a distance.
    """
    cell, path = find_cell(map_desc, 1), ""
    while not path or distances[cell]:
        near = {move: distances.get(_step(cell, move), math.inf) for move in MOVES}
        move = min(near, key=near.__getitem__)
        if near[move] == math.inf:
            return None
        path, cell = path + move, _step(cell, move)
    return path


def path_to_goal(map_desc: MapDesc, settings: FrozenLakeConfig) -> str | None:
    """Return the path that an answer writes: with looks at distances that of their moves, else the shortest one."""
    if settings.looks == "distances":
        return descend(map_desc, sweep_distances(map_desc, settings.sweeps)[-1])
    return shortest_path(map_desc)


def _step(cell: Cell, move: str) -> Cell:
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


def make_record(
    map_desc: MapDesc, moves: str, settings: FrozenLakeConfig, name: str = "", sketched: MapDesc | None = None
) -> Record:
    r"""Return the record of a map and its path: the map in words, then each move after its cell, then `\boxed{moves}`.

    A look at the map as it then is follows every `moves_per_look` moves, except at the end. Or looks at distances, one
    a sweep, and one at the best move from every cell precede the moves; they are those of `sketched`, by default the
    map. Every word has a space before it, so that it is the same single token everywhere.
    """
    steps, text = make_opening(map_desc, settings, sketched or map_desc)
    cell = find_cell(map_desc, 1)
    for number, move in enumerate(moves, start=1):
        text += move_text(cell, move, settings.cell_names)
        cell = _step(cell, move)
        if settings.looks == "moves" and number % settings.moves_per_look == 0 and number < len(moves):
            steps += [Text(text), Look(draw_map(map_desc, settings.cell_pixels, elf=cell, last_move=move))]
            text = ""
    return Record(
        question=settings.question,
        images=(draw_map(map_desc, settings.cell_pixels),),
        steps=(*steps, Text(f"{text} \\boxed{{{moves}}}")),
        answer=moves,
        map_desc=map_desc,
        name=name,
    )


def make_opening(map_desc: MapDesc, settings: FrozenLakeConfig, sketched: MapDesc) -> tuple[list[Text | Look], str]:
    """Return what precedes the moves: steps with looks at the distances of `sketched`, and the text after them.

    With `read_out` the text begins with the map in words, before the looks if there are any.
    """
    text, steps = "", []
    if settings.read_out == "sketches":
        text = "".join(map(lines, sketch_words(map_desc, settings.sweeps, len(map_desc))))
    elif settings.read_out != "none":
        text = lines(cell_words(map_desc, settings.read_out))
    if settings.looks == "distances":
        for signs in in_looks(sketch_signs(sketched, settings.sweeps, sketch_side(sketched, settings)), settings):
            steps += [Text(text), Look(draw_signs(signs, settings.cell_pixels))]
            text = ""
    return steps, text


def move_text(cell: Cell, move: str, cell_names: str) -> str:
    """Return a move in words, after its cell if cells are named."""
    name = f" {cell[0]} {cell[1]}" if cell_names == "row_column" else ""
    return f"{name} {MOVE_WORDS[move]}"


def make_reading(map_desc: MapDesc, settings: FrozenLakeConfig, name: str = "") -> Record:
    """Return a record that asks for the content of a map, cell by cell, in words."""
    text = lines(cell_words(map_desc, "map"))
    image = draw_map(map_desc, settings.cell_pixels)
    return Record(READING, (image,), (Text(text),), map_desc=map_desc, name=name)


def lines(words: Iterable[Iterable[str]]) -> str:
    """Return rows of words as text, a line for each."""
    return "".join("".join(f" {word}" for word in row) + "\n" for row in words)


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
            known = [distances[near] for near in (_step(cell, move) for move in MOVES) if near in distances]
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

    They are the moves' numbers in MOVES, and 4 more at the start. Among equals it is the first of MOVES; a cell without
    such a neighbour is unknown.
    """
    signs = np.full((side, side), HOLE_SIGN)
    for row, column, kind in cells_of(map_desc):
        near = [distances.get(_step((row, column), move), math.inf) for move in MOVES]
        best = near.index(min(near)) if min(near) < math.inf else UNKNOWN_SIGN
        from_start = best + len(MOVES) if best < len(MOVES) else UNKNOWN_SIGN
        signs[row, column] = {1: from_start, 2: GOAL_SIGN, -1: HOLE_SIGN}.get(kind, best)
    return signs


def cells_of(map_desc: MapDesc) -> Iterator[tuple[int, int, int]]:
    """Yield the row, the column and the kind of each cell."""
    for row, kinds in enumerate(map_desc):
        for column, kind in enumerate(kinds):
            yield row, column, kind


def cell_words(map_desc: MapDesc, read_out: str) -> list[list[str]]:
    """Return a word for each cell: its kind or, for ice with `read_out="distances"`, its distance to the goal.

    Ice farther than FARTHEST is "far", and ice without a path to the goal is "cut".
    """
    words = [[CELL_WORDS[kind] for kind in row] for row in map_desc]
    if read_out == "distances":
        distances = distance_to_goal(map_desc)
        for row, cells in enumerate(map_desc):
            for column, kind in enumerate(cells):
                if kind == 0:
                    distance = distances.get((row, column))
                    words[row][column] = "cut" if distance is None else str(distance) if distance <= FARTHEST else "far"
    return words


def symmetries(map_desc: MapDesc) -> Iterator[MapDesc]:
    """Yield the 8 rotations and reflections of a map, with the map itself."""
    for mirrored in (map_desc, map_desc[::-1]):
        for _ in range(4):
            yield mirrored
            mirrored = tuple(zip(*mirrored[::-1], strict=True))


def read_maps(path: str | Path) -> Iterable[MapDesc]:
    """Yield the `map_desc` of every record of a JSON-lines file or JSON array; other fields are ignored.

    Raises BadRecord, naming file and line, if the file cannot be read or a line has no valid map.
    """
    path = Path(path)
    with prefix_errors("data.frozen_lake.exclude"), open_records(path) as file:
        word = "record" if has_no_lines(file) else "line"
        for piece in read_pieces(file, path):
            with prefix_errors(f"{path} {word} {piece.number}"):
                map_desc = check_map(read_object(piece.content).get("map_desc"))
            yield map_desc
