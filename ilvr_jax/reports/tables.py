"""Tables of evaluations, from their summaries (JSON)."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

HOLE_BLIND = "hole-blind"
CAPTION = (
    "Shares of maps that are solved. hole-blind: a policy that ignores holes and takes a random shortest path. "
    "holes in the way: maps where holes block some of these paths; detour needed: all of them. "
    "same without holes: answers that do not change when the holes are painted over. "
    "no answer: answers without readable moves."
)


def success_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of evaluations on the same maps, the hole-blind policy in its first row.

    `evaluations` are summaries of the task vsp_planning by the name for their row, such as the stage's.
    """
    return text_table(*success_rows(evaluations), caption=CAPTION)


def accuracy_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of evaluations of any task, by the name for their row."""
    return text_table(*accuracy_rows(evaluations), caption=None)


def accuracy_rows(evaluations: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of accuracies as text."""
    header = ["", "questions", "accuracy", "95 % interval", "no answer", "cut off", "looks", "slots", "time"]
    rows = []
    for name, summary in evaluations.items():
        interval = "–".join(_rates(summary.get("accuracy_interval", ())))
        counts = [str(summary[key]) for key in ("unparsed", "cut_off", "looks", "slots")]
        accuracy = [str(summary["questions"]), *_rates([summary.get("accuracy")]), interval]
        rows.append([name, *accuracy, *counts, f"{summary['seconds']:.0f} s"])
    return header, rows


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None, title: str | None = None
) -> Table:
    """Return a table of text: names in the first column, numbers in the others."""
    table = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for number, name in enumerate(header):
        table.add_column(name.replace(" ", "\n"), justify="right" if number else "left", vertical="bottom")
    for row in rows:
        table.add_row(*row, style="dim" if row[0] == HOLE_BLIND else None)
    return table


def number_cell(value: float | None, form: str) -> str:
    """Return a number as text, a dash for none."""
    return "–" if value is None else format(value, form)


def difference_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the `difference` and the `interval` of a row as text."""
    interval = "–" if row["interval"] is None else "{:+.3f} to {:+.3f}".format(*row["interval"])
    return [number_cell(row["difference"], "+.3f"), interval]


def success_rows(evaluations: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table as text, with a dash for a value that does not exist."""
    levels = sorted({level for summary in evaluations.values() for level in summary["success_by_level"]}, key=int)
    header = ["", "all", *(f"level {level}" for level in levels), "holes in the way", "detour needed"]
    header += ["same without holes", "no answer", "looks", "time"]
    rows = []
    for name, summary in evaluations.items():
        if not rows:
            rates = [summary["hole_blind_success"], *(summary["hole_blind_by_level"].get(level) for level in levels)]
            rates += [summary["hole_blind_where_holes_matter"], summary["hole_blind_on_detours"], 1.0]
            rows.append([HOLE_BLIND, *_rates(rates), "–", "–", "–"])
        rates = [summary.get("accuracy"), *(summary["success_by_level"].get(level) for level in levels)]
        rates += [summary["success_where_holes_matter"], summary["success_on_detours"]]
        rates += [summary["unchanged_when_holes_painted_over"]]
        counts = [str(summary["unparsed"]), str(summary["looks"]), f"{summary['seconds']:.0f} s"]
        rows.append([name, *_rates(rates), *counts])
    return header, rows


def _rates(values: Sequence[float | None]) -> list[str]:
    return ["–" if value is None else f"{value:.2f}" for value in values]
