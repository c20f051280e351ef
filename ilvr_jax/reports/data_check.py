"""The result of checking a data set: tables, and a page with samples laid out as the model sees them."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from rich import box
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from ilvr_jax.data.images import UNIT, unpatch_image
from ilvr_jax.data.survey import Survey, Tally, View, first_holding, pair_of_zeros
from ilvr_jax.method.layout import Layout, Sample, padded_tokens, sample_columns
from ilvr_jax.method.tokens import Role, SpecialTokens
from ilvr_jax.reports.pages import image_uri, write_html

CONFIG_FILE = (
    "A config file with the suggested buckets. Save it under a new name, such as own_data.py, and train with: "
    "python -m ilvr_jax.train --config=own_data.py"
)
BARS = " ▁▂▃▄▅▆▇█"
BINS = 12
IMAGE_SIZES = 8  # the most frequent ones are shown
REASONS = 20  # the most frequent ones are shown
SHOWN_TOKENS = 2000  # of a run of text in a sample; the page counts the others
SHOWN_PIXELS = 560  # the longer side of an image in a sample
QUANTILES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
SIDES = ("prefix", "segments", "text", "tail", "images", "image_tokens", "helper_tokens")
RUN_KINDS = {Role.PADDING: "padding", Role.PROMPT: "prompt", Role.IMAGE: "image", Role.MARKER: "marker"}
RUN_KINDS |= {Role.ANSWER: "answer"}


class Section(NamedTuple):
    """A table under a title.

    With `numbers` its cells are numbers behind a name in the first column, without it text of any length.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True

    def table(self) -> Table:
        """Return the table for a terminal, without the title, which may be wider."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        for column, name in enumerate(self.header):
            if self.numbers:
                justify = "right" if column else "left"
                table.add_column(name.replace(" ", "\n"), justify=justify, vertical="bottom", no_wrap=True)
            else:
                table.add_column(name)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


def sections(survey: Survey, suggested: Mapping[str, Layout]) -> list[Section]:
    """Return the tables of a survey, without empty ones."""
    tables = [quantities(view, tally) for view, tally in survey.distinct()]
    tables.append(image_sizes(survey.tallies[0].images))
    for view, tally in zip(survey.views, survey.tallies, strict=True):
        filled = ((bucket, pair) for (bucket, _), pair in tally.filled.items())
        tables.append(bucket_table(f"Buckets of the config in {view.stages}", view.buckets, filled))
    filled = ((first_holding(need, suggested), pair) for need, pair in survey.needs().items())
    tables.append(bucket_table("Suggested buckets", suggested, filled))
    reasons = []
    for reason, count in survey.reasons.most_common(REASONS):
        reasons += [(str(count), reason), *(("", f"- {sentence}") for sentence in survey.sentences[reason])]
    tables.append(Section("Skipped records", ("records", "reason, and the first records"), reasons, numbers=False))
    return [section for section in tables if section.rows]


def quantities(view: View, tally: Tally) -> Section:
    """Return the table of quantities per record, without those that are always 0."""
    treatment = f", helper images: {view.helper_images}" if view.helper_images else ""
    rows = [
        (name, *(str(quantile(values, share)) for share in QUANTILES.values()), histogram(values))
        for name, values in tally.quantities.items()
        if any(values)
    ]
    return Section(f"Per record ({view.stages}{treatment})", ("", *QUANTILES, "distribution"), rows)


def quantile(values: Counter[int], share: float) -> int:
    """Return the smallest value that a share of the counted values does not exceed."""
    ordered = sorted(values)
    below = np.cumsum([values[value] for value in ordered])
    return ordered[int(np.searchsorted(below, share * below[-1]))]


def histogram(values: Counter[int]) -> str:
    """Return bars for bins of equal width from the smallest value to the largest."""
    bins = min(BINS, max(values) - min(values) + 1)
    counts, _ = np.histogram(list(values), bins, weights=list(values.values()))
    heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights)


def image_sizes(images: Counter[tuple[int, int, bool]]) -> Section:
    """Return the table of the most frequent sizes of images after resizing."""
    sizes = Counter()
    for (width, height, _), count in images.items():
        sizes[width, height] += count
    rows = [
        (
            f"{width}x{height}",
            str(width * height // UNIT**2),
            *(str(images[width, height, helper]) for helper in (0, 1)),
        )
        for (width, height), _ in sizes.most_common(IMAGE_SIZES)
    ]
    if len(sizes) > IMAGE_SIZES:
        rows.append((f"{len(sizes) - IMAGE_SIZES} other sizes", "", "", ""))
    header = ("pixels", "vision tokens", "user images", "helper images")
    return Section("Images after resizing", header, rows)


def bucket_table(
    title: str, buckets: Mapping[str, Layout], filled: Iterable[tuple[str, Int[np.ndarray, " pair"]]]
) -> Section:
    """Return the table of buckets with the number of their samples and the share of padding in their batches.

    `filled` yields pairs of counts, samples and their tokens, by bucket ("" for none); a bucket may come several times.
    """
    sums = defaultdict(pair_of_zeros)
    for name, pair in filled:
        sums[name] += pair

    def share(names: Iterable[str]) -> str:
        padded = sum(sums[name][0] * padded_tokens(buckets[name]) for name in names)
        return f"{1 - sum(sums[name][1] for name in names) / padded:.0%}" if padded else "–"

    rows = [
        (name, *(str(getattr(layout, side)) for side in SIDES), str(sums[name][0]), share([name]))
        for name, layout in buckets.items()
    ]
    blank = [""] * len(SIDES)
    if buckets and "" in sums:
        rows.append(("none", *blank, str(sums[""][0]), ""))
    if len(rows) > 1:
        rows.append(("all", *blank, str(sum(samples for samples, _ in sums.values())), share(buckets)))
    return Section(title, ("", *(side.replace("_", " ") for side in SIDES), "samples", "padding"), rows)


def config_file(base: str, changes: Mapping[str, Any], buckets: Mapping[str, Layout]) -> str:
    """Return the text of a config file: the one at `base` with changes, by dotted key, and with new buckets."""
    lines = [
        "from ml_collections import ConfigDict",
        "",
        "from ilvr_jax.config.experiments import load_config",
        "",
        "",
        "def get_config():",
        f"    config = load_config({base!r})",
        *(f"    config.{key} = {value!r}" for key, value in changes.items()),
        "    config.data.buckets = ConfigDict(",
        "        {",
    ]
    for name, layout in buckets.items():
        sides = ", ".join(f"{side}={getattr(layout, side)}" for side in SIDES)
        lines.append(f'            "{name}": dict({sides}),')
    return "\n".join([*lines, "        }", "    )", "    return config"])


def write_page(path: Path, **parts: Any) -> None:
    """Write one HTML file: `title`, `remark`, `sections`, `config` (a file's text), `samples` of `laid_out`.

    Raises as `write_text` does.
    """
    write_html(path, "data_check.html", config_file=CONFIG_FILE, **parts)


def laid_out(
    name: str, bucket: str, sample: Sample, layout: Layout, tokenizer: PreTrainedTokenizerFast, special: SpecialTokens
) -> dict[str, Any]:
    """Return a sample for the page, as runs of columns with the same role and loss, in order."""
    tokens, roles, loss = (np.zeros(layout.columns, np.int32) for _ in range(3))
    place = sample_columns(sample, layout)
    tokens[place], roles[place], loss[place] = sample.tokens, sample.roles, sample.labels != -100
    kinds = [
        ("slots" if role == Role.MARKER and token == special.latent_pad else RUN_KINDS[Role(role)], bool(has_loss))
        for token, role, has_loss in zip(tokens, roles, loss, strict=True)
    ]
    pictures = {"image": iter(sample.images), "slots": iter(sample.helper_images)}
    runs, first = [], 0
    for (kind, has_loss), members in itertools.groupby(kinds):
        count = len(list(members))
        picture = next(pictures[kind], None) if kind in pictures else None
        image = picture and image_uri(unpatch_image(picture), SHOWN_PIXELS)
        run = {"kind": kind, "loss": has_loss, "first": first, "count": count, "image": image}
        if kind in ("prompt", "answer", "marker"):
            run["pieces"] = list(pieces(tokens[first : first + min(count, SHOWN_TOKENS)], tokenizer))
            run["hidden"] = max(0, count - SHOWN_TOKENS)
        runs.append(run)
        first += count
    return {"name": name, "bucket": bucket, "layout": layout, "tokens": len(place), "runs": runs}


def pieces(tokens: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Yield the text of each token; tokens that only together form a letter come as one."""
    waiting = []
    for token in tokens:
        waiting.append(int(token))
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)
