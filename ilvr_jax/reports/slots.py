"""The use of slots: accuracy with the model's own slots and with others, as a table, a plot and a page.

A row is a dictionary of

    name: one of INTERVENTIONS (ilvr_jax/evaluation/interventions.py)
    replaced: "inputs" or "states", or "" where nothing is
    accuracy: from 0 to 1
    difference, interval, p: from "own" on the row's samples (`compare` in ilvr_jax/evaluation/paired.py), or None
    groups: accuracy by name of a group of samples, such as "holes in the way"; None where it has none; optional

The row "own" comes once, anywhere. Other rows may have fewer samples than it, as those of edits have.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ilvr_jax.evaluation.interventions import INTERVENTIONS
from ilvr_jax.reports.pages import write_html
from ilvr_jax.reports.pictures import EYE, RIGHT, WRONG
from ilvr_jax.reports.tables import text_table

INK, PAPER, NEITHER, GRID = "#222222", "#ffffff", "#8a93a3", "#dddddd"
# On a page, these follow its colours for light and dark.
VARIABLES = {INK: "ink", PAPER: "paper", NEITHER: "neither", GRID: "grid", RIGHT: "higher", WRONG: "lower", EYE: "own"}
WIDTH = 4.8  # inches; the letters are readable where a phone shows them smaller
CAPTION = (
    "difference: from the accuracy with the model's own slots on the same samples, with its 95 % bootstrap interval. "
    "p: McNemar's exact test that there is none."
)
READINGS: dict[str, str] = {
    "own": "The reference of all differences.",
    "self": "Must equal own in every sample: a difference is an error in recording slots or in giving them back.",
    "zero": "As accurate as own: the answer does not need the content of slots. Less accurate: it does, or the model "
    "is confused by vectors that training never had; mean and swap separate the two.",
    "mean": "As accurate as own: all samples can share the same slots, so their content adds nothing. Less accurate: "
    "it does, or the model is confused by vectors that training never had.",
    "noise": "As accurate as own: any vectors of the usual size and spread serve. Less accurate: directions matter.",
    "pause": "As accurate as own: looks only add positions to compute in, as pause tokens do.",
    "first": "As accurate as own: the slots after the first one add nothing.",
    "permute": "As accurate as own: the order of slots does not matter.",
    "swap": "As accurate as own: slots hold nothing about their sample that the answer needs. Less accurate: they do. "
    "These are real slots, so the model has no other reason to be confused.",
    "donor": "Compared with the edited samples' own slots. Less accurate: the answers follow the original's slots; "
    "more of them are then right for the original. As accurate: they come from elsewhere, such as the image.",
    "unrelated": "Beside donor: how many answers turn out right for the original without its slots.",
    "oracle": "More accurate than own: the model can use better slots than it makes. As accurate: it cannot, or its "
    "own are as good.",
    "skip": "As accurate as own: the model does not need looks.",
    "markers": "The difference from skip is the effect of markers alone, and that from own the effect of slots.",
}


def row_label(row: Mapping[str, Any]) -> str:
    """Return the name of a row, with what is replaced."""
    return f"{row['name']} ({row['replaced']})" if row["replaced"] else row["name"]


def slot_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table as text, with a dash for a value that does not exist."""
    groups = list(dict.fromkeys(name for row in rows for name in row.get("groups", ())))
    header = ["slots", "accuracy", "difference", "95 % interval", "p", *groups]
    lines = []
    for row in rows:
        interval = "–" if row["interval"] is None else "{:+.3f} to {:+.3f}".format(*row["interval"])
        p = "–" if row["p"] is None else "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
        rates = [_number(row.get("groups", {}).get(name), ".3f") for name in groups]
        accuracy, difference = _number(row["accuracy"], ".3f"), _number(row["difference"], "+.3f")
        lines.append([row_label(row), accuracy, difference, interval, p, *rates])
    return header, lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def slot_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table for a terminal."""
    return text_table(*slot_rows(rows), caption=CAPTION)


def own_accuracy(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the accuracy with the model's own slots; raise ValueError unless one row has it."""
    own = [row["accuracy"] for row in rows if row["name"] == "own"]
    if len(own) != 1:
        raise ValueError(f'`rows` must have one row named "own", got {len(own)}')
    return own[0]


def draw_slots(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the accuracies of rows as a PNG or SVG file, by the path's suffix.

    A whisker is the difference's interval, added to the accuracy of the model's own slots on the row's samples. Where
    that is not the accuracy on all samples, a diamond marks it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_drawn(rows, path.suffix.removeprefix(".")))


def _drawn(rows: Sequence[Mapping[str, Any]], form: str) -> bytes:
    own = own_accuracy(rows)
    figure = Figure(figsize=(WIDTH, 0.32 * len(rows) + 0.95), dpi=160, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.set_facecolor(PAPER)
    panel.axvline(own, color=EYE, linestyle="--", linewidth=1.4, zorder=3)
    for place, row in enumerate(rows):
        panel.barh(place, row["accuracy"], 0.62, color=bar_colour(row), zorder=2)
        if row["interval"] is not None:
            reference = row["accuracy"] - row["difference"]
            ends = [reference + end for end in row["interval"]]
            panel.plot(ends, [place, place], color=INK, linewidth=1.6, marker="|", markersize=7, zorder=4)
            if abs(reference - own) > 0.005:
                panel.plot([reference], [place], color=EYE, marker="D", markersize=5, zorder=5)
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
    panel.set_yticks(range(len(rows)), [row_label(row) for row in rows], fontsize=10.5, color=INK)
    panel.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    panel.set_xlabel("accuracy; dashed: own slots;\nwhiskers: 95 % interval of the difference", fontsize=10, color=INK)
    panel.tick_params(length=0, labelcolor=INK, labelsize=10.5)
    panel.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    panel.spines[:].set_visible(False)
    file = io.BytesIO()
    # Without a date and with fixed ids, the same rows give the same file.
    unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type")) if form == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "slots"}):
        figure.savefig(file, format=form, metadata=unnamed)
    return file.getvalue()


def bar_colour(row: Mapping[str, Any]) -> str:
    """Return the colour of a row's bar: own, certainly higher, certainly lower, or neither, by the interval."""
    if row["interval"] is None:
        return EYE
    low, high = row["interval"]
    return RIGHT if low > 0 else WRONG if high < 0 else NEITHER


def inline_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the plot as an element of HTML: without references to the web, and in the page's colours."""
    svg = _drawn(rows, "svg").decode()
    svg = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    content = svg[svg.index(">") + 1 :]
    for colour, name in VARIABLES.items():
        content = content.replace(colour, f"var(--{name})")
    label = f"Accuracy of {len(rows)} kinds of slots; the table below has the same numbers."
    return f'<svg role="img" aria-label="{label}" {view_box}>{content}'


def write_slots_page(path: Path, rows: Sequence[Mapping[str, Any]], title: str, remark: str = "") -> None:
    """Write one HTML file with plot, table and how to read them; `remark` is a paragraph under the title.

    Raises ValueError unless one row is named "own", and as `write_text` does.
    """
    header, lines = slot_rows(rows)
    names = dict.fromkeys(row["name"] for row in rows)
    readings = [(name, INTERVENTIONS[name], READINGS.get(name, "")) for name in names]
    write_html(
        path,
        "slots.html",
        title=title,
        remark=remark,
        plot=Markup(inline_svg(rows)),
        header=header,
        lines=lines,
        own=[row["name"] for row in rows].index("own"),
        caption=CAPTION,
        readings=readings,
    )
