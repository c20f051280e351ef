"""The use of slots: accuracy with the model's own slots and with others, as a table, a plot and a page.

A row is a dictionary of

    name: one of INTERVENTIONS (ilvr_jax/evaluation/interventions.py)
    replaced: "inputs" or "states", or "" where nothing is
    accuracy: from 0 to 1
    difference, interval, p: from "own" on the row's samples (`compare` in ilvr_jax/evaluation/paired.py), or None
    groups: accuracy by name of a group of samples, such as "holes in the way"; None where it has none; optional

The row "own" comes once, anywhere. Other rows may have fewer samples than it, as those of edits have.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table

from ilvr_jax.evaluation.interventions import INTERVENTIONS
from ilvr_jax.reports.bars import draw_bars, inline_bars
from ilvr_jax.reports.pages import write_html
from ilvr_jax.reports.tables import difference_cells, number_cell, text_table

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
        p = "–" if row["p"] is None else "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
        rates = [number_cell(row.get("groups", {}).get(name), ".3f") for name in groups]
        lines.append([row_label(row), number_cell(row["accuracy"], ".3f"), *difference_cells(row), p, *rates])
    return header, lines


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
    """Draw the accuracies of rows as a PNG or SVG file, as `draw_bars` does."""
    draw_bars(rows, list(map(row_label, rows)), own_accuracy(rows), "own slots", path)


def inline_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the plot as an element of HTML, as `inline_bars` does."""
    description = f"Accuracy of {len(rows)} kinds of slots; the table below has the same numbers."
    return inline_bars(rows, list(map(row_label, rows)), own_accuracy(rows), "own slots", description)


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
        reference="own",
        parts=[{"heading": "Accuracy", "plot": Markup(inline_svg(rows)), "header": header, "lines": lines}],
        caption=CAPTION,
        readings=readings,
    )
