"""Tables of success, from the summaries that evaluations write as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

HOLE_BLIND = "hole-blind"
CAPTION = (
    "hole-blind: a random shortest path of the map without holes. holes matter: some such path is blocked; "
    "detours: all are. stay same: answers unchanged when the holes are painted over."
)


def success_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns the table of evaluations by name, such as that of the stage; the hole-blind policy comes first.

    `evaluations` holds summaries as `Evaluation.summary()` returns them, all of the same maps.
    """
    header, rows = success_rows(evaluations)
    table = Table(caption=CAPTION, caption_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for number, name in enumerate(header):
        table.add_column(name.replace(" ", "\n"), justify="right" if number else "left", vertical="bottom")
    for row in rows:
        table.add_row(*row, style="dim" if row[0] == HOLE_BLIND else None)
    return table


def success_markdown(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the same table in markdown, for a README."""
    header, rows = success_rows(evaluations)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def success_rows(evaluations: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of the table as text; what does not apply is a dash."""
    levels = sorted({level for summary in evaluations.values() for level in summary["success_by_level"]}, key=int)
    header = ["", "all", *(f"level {level}" for level in levels), "holes matter", "detours"]
    header += ["stay same", "not parsed", "latent looks", "time"]
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
