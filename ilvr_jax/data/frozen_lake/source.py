"""Generated records of FrozenLake maps like those of VSP spatial planning: maps, shortest paths, answers."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.frozen_lake.drawing import draw_map, draw_signs
from ilvr_jax.data.frozen_lake.maps import (
    CELL_WORDS,
    MOVE_WORDS,
    Cell,
    additional_moves,
    distance_to_goal,
    find_cell,
    random_map,
    step,
    symmetries,
)
from ilvr_jax.data.frozen_lake.sketches import (
    in_looks,
    path_to_goal,
    sketch_side,
    sketch_signs,
    sketch_words,
)
from ilvr_jax.data.ilvr import check_map
from ilvr_jax.data.json_lines import has_no_lines, open_records, read_object, read_pieces
from ilvr_jax.data.records import Fingerprint, Look, MapDesc, Record, Text, prefix_errors

READING = "Read the map."  # the question of records that ask for the map in words
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
            # Few maps have a long detour: look for it before the moves of sketches, which take longer to find.
            if map_desc in self.excluded or (detour_needed and additional_moves(map_desc) < settings.detour_moves):
                continue
            moves = path_to_goal(map_desc, settings)
            if moves is not None and len(moves) <= settings.max_moves:
                return map_desc, moves
        raise NoMap(
            f"data.frozen_lake: hole_probability {settings.hole_probability}, detour_share {settings.detour_share}, "
            f"detour_moves {settings.detour_moves}, max_moves {settings.max_moves} and exclude must allow maps of "
            f"level {side}, but none of {ATTEMPTS} maps met them"
        )


def make_record(
    map_desc: MapDesc, moves: str, settings: FrozenLakeConfig, name: str = "", sketched: MapDesc | None = None
) -> Record:
    r"""Return the record of a map and its path: the map in words, then each move after its cell, then `\boxed{moves}`.

    A look at the map as it then is follows every `moves_per_look` moves, except at the end. Or looks at distances, one
    a sweep, and one at the best move from every cell precede the moves; they are those of `sketched`, by default the
    map. With `name_goal`, the goal's cell and the word goal follow the last move. Every word has a space before it, so
    that it is the same single token everywhere.
    """
    steps, text = make_opening(map_desc, settings, sketched or map_desc)
    cell = find_cell(map_desc, 1)
    for number, move in enumerate(moves, start=1):
        text += cell_text(cell, MOVE_WORDS[move], settings.cell_names)
        cell = step(cell, move)
        if settings.looks == "moves" and number % settings.moves_per_look == 0 and number < len(moves):
            steps += [Text(text), Look(draw_map(map_desc, settings.cell_pixels, elf=cell, last_move=move))]
            text = ""
    if settings.name_goal:
        text += cell_text(cell, CELL_WORDS[2], settings.cell_names)
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


def cell_text(cell: Cell, word: str, cell_names: str) -> str:
    """Return a move in words, or another word, after its cell if cells are named."""
    name = f" {cell[0]} {cell[1]}" if cell_names == "row_column" else ""
    return f"{name} {word}"


def make_reading(map_desc: MapDesc, settings: FrozenLakeConfig, name: str = "") -> Record:
    """Return a record that asks for the content of a map, cell by cell, in words."""
    text = lines(cell_words(map_desc, "map"))
    image = draw_map(map_desc, settings.cell_pixels)
    return Record(READING, (image,), (Text(text),), map_desc=map_desc, name=name)


def lines(words: Iterable[Iterable[str]]) -> str:
    """Return rows of words as text, a line for each."""
    return "".join("".join(f" {word}" for word in row) + "\n" for row in words)


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
