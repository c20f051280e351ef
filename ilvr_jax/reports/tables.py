"""The table of success on maps, from the summaries of evaluations (JSON)."""

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

    `evaluations` are results of `Evaluation.summary()` by the name for their row, such as the stage's.
    """
    header, rows = success_rows(evaluations)
    table = Table(caption=CAPTION, caption_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for number, name in enumerate(header):
        table.add_column(name.replace(" ", "\n"), justify="right" if number else "left", vertical="bottom")
    for row in rows:
        table.add_row(*row, style="dim" if row[0] == HOLE_BLIND else None)
    return table


def success_rows(evaluations: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table as text, with a dash for a value that does not exist."""
    levels = sorted({level for summary in evaluations.values() for level in summary["success_by_level"]}, key=int)
    header = ["", "all", *(f"level {level}" for level in levels), "holes in the way", "detour needed"]
    header += ["same without holes", "no answer", "looks", "time"]
    rows = []
    for name, summary in evaluations.items():
        if not rows:
            rates = [summary["hole_blind_rate"], *(summary["hole_blind_by_level"].get(level) for level in levels)]
            rates += [summary["hole_blind_where_holes_matter"], summary["hole_blind_on_detours"], 1.0]
            rows.append([HOLE_BLIND, *_rates(rates), "–", "–", "–"])
        rates = [summary["success_rate"], *(summary["success_by_level"].get(level) for level in levels)]
        rates += [summary["success_where_holes_matter"], summary["success_on_detours"]]
        rates += [summary["unchanged_when_holes_painted_over"]]
        counts = [str(summary["unparsed"]), str(summary["latent_segments"]), f"{summary['seconds']:.0f} s"]
        rows.append([name, *_rates(rates), *counts])
    return header, rows


def _rates(values: Sequence[float | None]) -> list[str]:
    return ["–" if value is None else f"{value:.2f}" for value in values]
