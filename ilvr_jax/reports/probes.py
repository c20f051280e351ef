"""The content of slots, as tables and a page, from the summary of `python -m ilvr_jax.evaluate --probes`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ilvr_jax.reports.pages import write_html
from ilvr_jax.reports.tables import text_table

READERS = {  # the vectors from which states are read, in ascending order of what they should hold
    "majority": "the most frequent state of the place, without a probe",
    "text": "the final hidden state of the last token before the first look, one vector for all places",
    "pause": "the final hidden states from which slots are made, when all slots are pauses without content: what their "
    "places compute by themselves",
    "slots": "the model's own slots, as decoded",
    "targets": "the features of the true helper images: the most that a linear probe reads from slots without errors",
}
PROBES = (
    "Share of states that linear probes read on records that they were not fitted on, the mean over places; macro: the "
    "mean over states."
)
RETRIEVAL = (
    "Rank of the look's own helper image among the candidates, by the mean cosine of slots and features over places. "
    "MRR: mean reciprocal rank. cosine own, others: with the own helper image and with those of other records."
)

Rows = tuple[list[str], list[list[str]]]


def probe_rows(summary: Mapping[str, Any]) -> Rows:
    """Return the header and the rows of the table of probes as text: two rows for each look."""
    rows = []
    for number, look in enumerate(summary["looks"], start=1):
        for figure, label in (("accuracy", f"look {number}"), ("macro", f"look {number}, macro")):
            rows.append([label, str(look["places"]), *(_share(look[figure][name]) for name in READERS)])
    return ["", "places", *READERS], rows


def retrieval_rows(summary: Mapping[str, Any]) -> Rows:
    """Return the header and the rows of the table of retrieval as text."""
    header = ["", "samples", "candidates", "recall at 1", "at 10", "MRR", "cosine own", "others"]
    rows = []
    for number, look in enumerate(summary["looks"], start=1):
        found = look["retrieval"]
        for name in (name for name in READERS if name in found):
            counts = [str(found[key]) for key in ("samples", "candidates")]
            rows.append([f"look {number}, {name}", *counts, *map(_share, found[name].values())])
    return header, rows


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def probe_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the tables for a terminal."""
    parts = ((probe_rows(summary), PROBES), (retrieval_rows(summary), RETRIEVAL))
    return [text_table(*rows, caption=caption) for rows, caption in parts]


def describe_records(summary: Mapping[str, Any]) -> str:
    """Return the sentence on the records and on places without a probe."""
    skipped = ", ".join(str(look["skipped_places"]) for look in summary["looks"])
    return (
        f"Fitted on {summary['fitted_records']} records ({summary['fitted_on']}), scored on "
        f"{summary['scored_records']} of {summary['data']}. Places of each look without a probe, as their state is "
        f"always the same or too few records have one: {skipped}."
    )


def write_probes_page(path: Path, summary: Mapping[str, Any], title: str) -> None:
    """Write one HTML file with both tables; raise as `write_text` does."""
    write_html(
        path,
        "probes.html",
        title=title,
        remark=describe_records(summary),
        tables=[("Probes", *probe_rows(summary), PROBES), ("Retrieval", *retrieval_rows(summary), RETRIEVAL)],
        readings=READERS,
    )
