"""Bars of accuracies with the intervals of their differences from a reference, as a file or inside a page.

A row is a dictionary with `accuracy`, from 0 to 1, and `difference` and `interval`, from the reference on the row's
samples, or None.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ilvr_jax.reports.pictures import EYE, RIGHT, WRONG

INK, PAPER, NEITHER, GRID = "#222222", "#ffffff", "#8a93a3", "#dddddd"
# On a page, these follow its colours for light and dark.
VARIABLES = {INK: "ink", PAPER: "paper", NEITHER: "neither", GRID: "grid", RIGHT: "higher", WRONG: "lower", EYE: "own"}
WIDTH = 4.8  # inches; the letters are readable where a phone shows them smaller


def draw_bars(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], reference: float | None, name: str, path: Path
) -> None:
    """Draw rows as a PNG or SVG file, by the path's suffix, with a dashed line at the reference of that name.

    A whisker is the difference's interval, added to the accuracy of the reference on the row's samples. Where that is
    not its accuracy on all samples, a diamond marks it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_drawn(rows, labels, reference, name, path.suffix.removeprefix(".")))


def inline_bars(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], reference: float | None, name: str, description: str
) -> str:
    """Return the plot as an element of HTML: without references to the web, and in the page's colours."""
    svg = _drawn(rows, labels, reference, name, "svg").decode()
    svg = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    content = svg[svg.index(">") + 1 :]
    for colour, variable in VARIABLES.items():
        content = content.replace(colour, f"var(--{variable})")
    return f'<svg role="img" aria-label="{description}" {view_box}>{content}'


def _drawn(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], reference: float | None, name: str, form: str
) -> bytes:
    figure = Figure(figsize=(WIDTH, 0.32 * len(rows) + 0.95), dpi=160, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.set_facecolor(PAPER)
    if reference is not None:
        panel.axvline(reference, color=EYE, linestyle="--", linewidth=1.4, zorder=3)
    for place, row in enumerate(rows):
        panel.barh(place, row["accuracy"], 0.62, color=bar_colour(row), zorder=2)
        if row["interval"] is not None:
            own = row["accuracy"] - row["difference"]
            ends = [own + end for end in row["interval"]]
            panel.plot(ends, [place, place], color=INK, linewidth=1.6, marker="|", markersize=7, zorder=4)
            if abs(own - reference) > 0.005:
                panel.plot([own], [place], color=EYE, marker="D", markersize=5, zorder=5)
        panel.annotate(
            f"{row['accuracy']:.2f}",
            (1, place),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            color=INK,
        )
    panel.set_yticks(range(len(rows)), labels, fontsize=10.5, color=INK)
    panel.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    label = f"accuracy; dashed: {name};\nwhiskers: 95 % interval of the difference"
    panel.set_xlabel(label, fontsize=10, color=INK)
    panel.tick_params(length=0, labelcolor=INK, labelsize=10.5)
    panel.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    panel.spines[:].set_visible(False)
    file = io.BytesIO()
    # Without a date and with fixed ids, the same rows give the same file.
    unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type")) if form == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "bars"}):
        figure.savefig(file, format=form, metadata=unnamed)
    return file.getvalue()


def bar_colour(row: Mapping[str, Any]) -> str:
    """Return the colour of a row's bar: own, certainly higher, certainly lower, or neither, by the interval."""
    if row["interval"] is None:
        return EYE
    low, high = row["interval"]
    return RIGHT if low > 0 else WRONG if high < 0 else NEITHER
