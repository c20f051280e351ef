"""The results of a study: a table, a plot and a page; `row_of` in ilvr_jax/studies/comparison.py makes the rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table

from ilvr_jax.reports.bars import draw_bars, inline_bars
from ilvr_jax.reports.pages import write_html
from ilvr_jax.reports.tables import difference_cells, number_cell, text_table

CAPTION = (
    "accuracy: mean over seeds. spread: its standard deviation over seeds. difference: from the accuracy of the "
    "reference on the same questions, of each question's mean over the seeds that both have; its 95 % bootstrap "
    "interval is over questions, not over seeds. steps, minutes: of training. slots, text tokens: per answer, markers "
    "included in the text."
)
TABLE_WIDTH = 120
FIGURES = {"steps": ".0f", "minutes": ".1f", "slots": ".1f", "text_tokens": ".1f"}


def study_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table as text, with a dash for a value that does not exist."""
    groups = list(dict.fromkeys(name for row in rows for name in row["groups"]))
    header = ["variant", "seeds", "accuracy", "spread", *groups, "difference", "95 % interval"]
    header += [*(name.replace("_", " ") for name in FIGURES), "failed seeds"]
    lines = []
    for row in rows:
        numbers = [row["accuracy"], row["spread"], *(row["groups"].get(name) for name in groups)]
        cells = [number_cell(value, ".3f") for value in numbers]
        figures = [number_cell(row.get(name), form) for name, form in FIGURES.items()]
        failed = ", ".join(map(str, row.get("failed_seeds", ()))) or "–"
        lines.append([row["name"], str(len(row["seeds"])), *cells, *difference_cells(row), *figures, failed])
    return header, lines


def study_table(rows: Sequence[Mapping[str, Any]], data: str = "") -> Table:
    """Return the table for a terminal of TABLE_WIDTH columns; `data` is the name of the records in its title."""
    return text_table(*study_rows(rows), caption=CAPTION, title=data or None)


def lead_sentences(leads: Mapping[str, Mapping[str, Any]], base: str) -> list[str]:
    """Return a sentence for each lead of the base of which swapped inputs take away a share."""
    return [
        f"share of the lead of {base} over {name} ({lead['lead']:.3f}) that swapping inputs takes away: "
        f"{lead['share']:.2f}"
        for name, lead in leads.items()
    ]


def draw_study(rows: Sequence[Mapping[str, Any]], base: str, path: Path) -> None:
    """Draw the accuracies of the rows that have one as a PNG or SVG file, as `draw_bars` does."""
    drawn = _with_accuracy(rows)
    draw_bars(drawn, [row["name"] for row in drawn], _reference(rows, base), base, path)


def write_study_page(
    path: Path,
    comparisons: Mapping[str, Mapping[str, Any]],
    title: str,
    remark: str,
    base: str,
    meanings: Mapping[str, str],
    failed: Mapping[str, str],
) -> None:
    """Write one HTML file with plot and table of each of the `comparisons`, by data, and each variant's meaning.

    `failed` has the error of each failed run. Raises as `write_text` does.
    """
    write_html(
        path,
        "study.html",
        title=title,
        remark=remark,
        reference=base,
        parts=[page_part(comparison, data, base) for data, comparison in comparisons.items()],
        caption=CAPTION,
        meanings=meanings,
        failed=failed,
    )


def page_part(comparison: Mapping[str, Any], data: str, base: str) -> dict[str, Any]:
    """Return what the page shows of the comparison on some data."""
    rows = comparison["rows"]
    drawn, (header, lines) = _with_accuracy(rows), study_rows(rows)
    description = f"Accuracy of {len(drawn)} variants{data and f' on {data}'}; the table below has the same numbers."
    heading = f"Accuracy on {data}" if data else "Accuracy"
    names = [row["name"] for row in drawn]
    plot = inline_bars(drawn, names, _reference(rows, base), base, description) if drawn else ""
    sentences = lead_sentences(comparison["leads"], base)
    return {"heading": heading, "plot": Markup(plot), "header": header, "lines": lines, "sentences": sentences}


def _with_accuracy(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["accuracy"] is not None]


def _reference(rows: Sequence[Mapping[str, Any]], base: str) -> float | None:
    return next((row["accuracy"] for row in rows if row["name"] == base), None)
