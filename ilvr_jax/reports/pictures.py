"""Pictures of results: maps with the decoded moves and the places of looks drawn on them."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, PathPatch
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke

from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.maps import Cell
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import MapDesc
from ilvr_jax.inference.transcript import LOOK
from ilvr_jax.tasks.vsp_planning import Outcome, holes_matter, is_detour, play, stated_moves, walk

COLUMNS = 4
CELL_PIXELS = 64
RIGHT, WRONG, EYE = "#0b7a3b", "#d0202e", "#173a8c"
TITLES = {
    Outcome.GOAL: "reaches the goal",
    Outcome.HOLE: "falls into a hole",
    Outcome.SHORT: "does not end at the goal",
    Outcome.UNPARSED: "no moves could be read",
}
# Offsets (x, y) of a cell's eyes from its middle, in cells: the corners, since moves run through the middle.
CORNERS = ((-0.27, -0.32), (0.27, -0.32), (-0.27, 0.32), (0.27, 0.32))


@dataclasses.dataclass(frozen=True)
class Solution:
    """The moves that an answer gives for a map, and those written in words before each of its looks."""

    map_desc: MapDesc
    moves: str | None  # letters of UDLR; None if no moves could be read
    moves_before_looks: tuple[str, ...]

    @property
    def outcome(self) -> Outcome:
        return play(self.map_desc, self.moves)

    @property
    def success(self) -> bool:
        return self.outcome == Outcome.GOAL

    @property
    def level(self) -> int:
        return len(self.map_desc)


def read_solutions(source: Source, lines: Iterable[Mapping[str, Any]]) -> list[Solution]:
    """Return the first solution of each map, from the lines of a results file about the records of a source."""
    return [
        Solution(source[line["number"]].map_desc, line["answer"], moves_before_looks(line["text"]))
        for line in lines
        if not line["form"] and not line["sample"]
    ]


def moves_before_looks(text: str) -> tuple[str, ...]:
    """Return the moves in words before each look of a decoded text."""
    return tuple(stated_moves(LOOK.sub("", text[: look.start()])) for look in LOOK.finditer(text))


def draw_solutions(answers: Sequence[Solution], path: Path, count: int = 12, wrong: int = 4) -> None:
    """Draw up to `count` maps with the decoded moves, up to `wrong` of them wrong, as a PNG file.

    Maps that need a detour or have holes in the way come first, from all levels. An eye marks each look, in the cell
    that the moves written before it lead to.
    """
    chosen = choose_answers(answers, count, wrong)
    rows = max(1, -(-len(chosen) // COLUMNS))
    height = 3.75 * rows + 1.2  # inches
    figure = Figure(figsize=(3.2 * COLUMNS, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, answer in zip(panels, chosen, strict=False):
        draw_answer(panel, answer)
    solved = sum(answer.success for answer in answers)
    title = f"{solved} of {len(answers)} maps solved; {len(chosen)} are shown"
    figure.suptitle(title, fontsize=15, weight="bold", y=1 - 0.12 / height, va="top")
    figure.subplots_adjust(
        left=0.015, right=0.985, bottom=0.55 / height, top=1 - 0.95 / height, wspace=0.06, hspace=0.2
    )
    _draw_legend(figure.add_axes((0.015, 0, 0.97, 0.5 / height)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def choose_answers(answers: Sequence[Solution], count: int, wrong: int) -> list[Solution]:
    """Return up to `count` answers, sorted by level; at most `wrong` are wrong, unless too few are right."""
    solved = _varied([answer for answer in answers if answer.success])
    failed = _varied([answer for answer in answers if not answer.success])
    failed = failed[: max(wrong, count - len(solved))][:count]
    chosen = solved[: count - len(failed)] + failed
    return sorted(chosen, key=lambda answer: (answer.level, not answer.success))


def _varied(answers: Sequence[Solution]) -> list[Solution]:
    """Sort answers so that levels alternate and each level's maps that need a detour come first."""
    levels = defaultdict(list)
    for answer in answers:
        levels[answer.level].append(answer)
    for group in levels.values():
        group.sort(key=lambda answer: (not is_detour(answer.map_desc), not holes_matter(answer.map_desc)))
    turns = zip_longest(*(levels[level] for level in sorted(levels, reverse=True)))
    return [answer for turn in turns for answer in turn if answer is not None]


def draw_answer(panel: Axes, answer: Solution) -> None:
    """Draw one map with its moves and an eye for each look."""
    colour = RIGHT if answer.success else WRONG
    panel.imshow(draw_map(answer.map_desc, CELL_PIXELS))
    cells = walk(answer.map_desc, answer.moves or "")
    for start, end in zip(cells[:-1], cells[1:], strict=True):
        if start != end:
            _draw_move(panel, start, end, colour)
    looks = defaultdict(int)
    size = answer.level * CELL_PIXELS / 19  # the same size on paper at every level
    for number, moves in enumerate(answer.moves_before_looks, start=1):
        cell = walk(answer.map_desc, moves)[-1]
        down, right = CORNERS[looks[cell] % len(CORNERS)][::-1]
        x, y = _middle((cell[0] + down, cell[1] + right))
        _draw_eye(panel, x, y, size, str(number))
        looks[cell] += 1
    kind = ", detour" if is_detour(answer.map_desc) else ", holes in the way" if holes_matter(answer.map_desc) else ""
    moves = f"{answer.moves}: " if answer.moves else ""
    moves = moves if len(moves) <= 16 else f"{moves[:14]}…: "
    panel.set_title(f"{moves}{TITLES[answer.outcome]}", fontsize=10, color=colour, pad=5)
    panel.annotate(
        f"level {answer.level}{kind}",
        (0.5, 1),
        (0, 19),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        fontsize=11,
        weight="bold",
    )


def _middle(cell: Cell) -> tuple[float, float]:
    """Return x and y of a cell's middle, in pixels."""
    return (cell[1] + 0.5) * CELL_PIXELS, (cell[0] + 0.5) * CELL_PIXELS


def _draw_move(panel: Axes, start: Cell, end: Cell, colour: str) -> None:
    arrow = FancyArrowPatch(
        _middle(start),
        _middle(end),
        arrowstyle="-|>,head_length=5,head_width=3.5",
        shrinkA=0,
        shrinkB=0,
        linewidth=2.6,
        color=colour,
        joinstyle="miter",
        path_effects=[withStroke(linewidth=5, foreground="white")],
        zorder=3,
    )
    panel.add_patch(arrow)


def _draw_eye(panel: Axes, x: float, y: float, size: float, number: str) -> None:
    """Draw an eye of `size` pixels with a number in its pupil."""
    half, lid = size / 2, size * 0.66
    points = [(x - half, y), (x, y - lid), (x + half, y), (x, y + lid), (x - half, y)]
    outline = Curve(points, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3, Curve.CURVE3, Curve.CURVE3])
    panel.add_patch(PathPatch(outline, facecolor="white", edgecolor=EYE, linewidth=1.3, zorder=4))
    panel.add_patch(Circle((x, y), size * 0.29, facecolor=EYE, edgecolor="none", zorder=5))
    panel.text(x, y, number, color="white", fontsize=8.5, weight="bold", ha="center", va="center_baseline", zorder=6)


def _draw_legend(panel: Axes) -> None:
    panel.set_axis_off()
    box = panel.get_window_extent()
    panel.set(xlim=(0, box.width), ylim=(box.height, 0))
    middle, arrow, gap = box.height / 2, 45, 10
    texts = (
        "moves that reach the goal",
        "moves that do not",
        "the elf's cell at the model's first look",
    )
    for text, start, colour in zip(texts, (0.09, 0.30, 0.46), (RIGHT, WRONG, None), strict=True):
        x = start * box.width
        if colour:
            style = {"arrowstyle": "-|>,head_length=.5,head_width=.35", "color": colour, "linewidth": 2.6}
            panel.annotate("", (x + arrow, middle), (x, middle), arrowprops=style)
        else:
            _draw_eye(panel, x + arrow / 2, middle, 24, "1")
        panel.text(x + arrow + gap, middle, text, fontsize=11, va="center_baseline")
