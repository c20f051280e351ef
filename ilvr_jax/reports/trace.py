"""A page of answers, one at a time: input images, the text with its looks, and where the slots of each look point.

The page holds everything and fetches nothing. What it shows comes from records and models of strangers, so it is JSON
in elements that run nothing, of which the page's script makes text and pictures alone.
"""

import base64
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup

from ilvr_jax.reports.pages import image_uri, write_html

SHOWN_PIXELS = 448  # the longer side of an image on the page, at most
UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}  # in a script element
CAPTION = (
    "A look is an act of latent reasoning: a run of slots, vectors that the model writes between its words. Cosine: of "
    "the slots with the vision features of the image, in the places of its vision tokens. Attention: the share that "
    "these tokens get from the places of the slots, the mean over heads and the last decoder layers; helper images are "
    "not in the answer, so nothing attends to them. The colour runs from the lowest value that is shown to the highest."
)


@dataclasses.dataclass(frozen=True)
class LookTrace:
    """A look of an answer.

    Attributes:
        slots: how many it has.
        columns: of the grid that its slots are shown in.
        cosines: with the features of the input images; None for a look that was cut off or could not be measured.
        attention: to the vision tokens of the input images, or None.
        helper_image: the pixels of the true helper image, or None.
        helper_grid: rows and columns of its vision tokens.
        helper_cosines: with its features, or None.
        states: the true states of places, "" where there is none; empty without any.
        read: the states that probes read, "" where none is read.
    """

    slots: int
    columns: int
    cosines: Float[np.ndarray, "slots tokens"] | None = None
    attention: Float[np.ndarray, "slots tokens"] | None = None
    helper_image: UInt8[np.ndarray, "height width 3"] | None = None
    helper_grid: tuple[int, int] = (0, 0)
    helper_cosines: Float[np.ndarray, "slots helper_tokens"] | None = None
    states: Sequence[str] = ()
    read: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Trace:
    """An answer.

    Attributes:
        number: of the record, from 0.
        name: of the record.
        question: as it is asked.
        texts: of the answer, around its looks: one more than looks.
        answer: as it was read, None if it was not.
        right: whether it is.
        tokens: of the answer, slots and markers included.
        level: of the record, "" without one.
        groups: that the record belongs to.
        images: the pixels of the input images.
        grids: rows and columns of their vision tokens.
        looks: in their order.
        remark: a sentence on what is missing, or "".
    """

    number: int
    name: str
    question: str
    texts: Sequence[str]
    answer: str | None
    right: bool
    tokens: int
    level: str
    groups: Sequence[str]
    images: Sequence[UInt8[np.ndarray, "height width 3"]]
    grids: Sequence[tuple[int, int]]
    looks: Sequence[LookTrace]
    remark: str = ""

    @property
    def outcome(self) -> str:
        """Whether the answer is "right", "wrong" or "unparsed"."""
        return "unparsed" if self.answer is None else "right" if self.right else "wrong"


def write_trace_page(path: Path, traces: Iterable[Trace], title: str, remark: str) -> None:
    """Write one HTML file with all answers; raise as `write_text` does.

    Each answer is JSON of its own, which the page reads when it shows it; an index has what filters and order need.
    """
    index, samples = [], []
    for trace in traces:
        index.append(index_entry(trace))
        samples.append(safe_json(sample_content(trace)))
    write_html(path, "trace.html", title=title, remark=remark, caption=CAPTION, index=safe_json(index), samples=samples)


def index_entry(trace: Trace) -> dict[str, Any]:
    """Return what the list of answers has of one."""
    names = ("number", "name", "outcome", "tokens", "level")
    return {**{name: getattr(trace, name) for name in names}, "groups": list(trace.groups)}


def sample_content(trace: Trace) -> dict[str, Any]:
    """Return what the page shows of an answer, as JSON values."""
    return {
        **{name: getattr(trace, name) for name in ("question", "answer", "remark")},
        "texts": list(trace.texts),
        "images": [picture(pixels, grid) for pixels, grid in zip(trace.images, trace.grids, strict=True)],
        "looks": [look_content(look, trace.grids) for look in trace.looks],
    }


def look_content(look: LookTrace, grids: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return what the page shows of a look, as JSON values; `grids` are those of the input images."""
    maps = {name: pack_map(getattr(look, name)) for name in ("cosines", "attention", "helper_cosines")}
    helper = None if look.helper_image is None else picture(look.helper_image, look.helper_grid)
    states = {name: list(map(str, getattr(look, name))) for name in ("states", "read")}
    shares = None if look.attention is None else attention_shares(look.attention, grids)
    content = {"slots": look.slots, "columns": look.columns, "helper_image": helper, "attention_shares": shares}
    return {**content, **maps, **states}


def attention_shares(
    attention: Float[np.ndarray, "slots tokens"], grids: Sequence[tuple[int, int]]
) -> list[list[float]]:
    """Return the attention of each slot to each image in all, which the steps of `pack_map` would round."""
    ends = np.cumsum([rows * columns for rows, columns in grids])
    return [[float(f"{image.sum():.4g}") for image in np.split(row, ends)[:-1]] for row in attention]


def picture(pixels: UInt8[np.ndarray, "height width 3"], grid: tuple[int, int]) -> dict[str, Any]:
    """Return an image as JSON values, no larger than it is shown."""
    return {"image": image_uri(pixels, SHOWN_PIXELS), "rows": grid[0], "columns": grid[1]}


def pack_map(values: Float[np.ndarray, "slots tokens"] | None) -> dict[str, Any] | None:
    """Return a map as JSON values: its lowest and highest value, and in base64 bytes that divide their distance."""
    if values is None:
        return None
    values = np.nan_to_num(np.asarray(values, np.float64))
    low, high = (float(f"{bound(values):.6g}") for bound in (np.min, np.max)) if values.size else (0.0, 0.0)
    quantised = np.clip(np.round((values - low) / ((high - low) or 1) * 255), 0, 255).astype(np.uint8)
    return {"low": low, "high": high, "data": base64.b64encode(quantised.tobytes()).decode()}


def safe_json(content: Any) -> Markup:
    """Return JSON in ASCII that cannot end, or be taken for anything but text in, the script element it is put in."""
    return Markup(json.dumps(content, separators=(",", ":")).translate(UNSAFE))
