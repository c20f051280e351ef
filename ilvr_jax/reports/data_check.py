"""What a check of a data set found: tables, and a page with samples laid out as the model sees them."""

import base64
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Int
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from ilvr_jax.data.images import UNIT, unpatch_image
from ilvr_jax.data.survey import Survey, Tally, View, first_holding, pair_of_zeros
from ilvr_jax.files import write_text
from ilvr_jax.method.layout import Layout, Sample, padded_tokens, sample_columns
from ilvr_jax.method.tokens import Role, SpecialTokens
from ilvr_jax.models.qwen2_5_vl.images import PatchedImage

CONFIG_FILE = (
    "A config file with the suggested buckets. Save it under a new name, such as own_data.py, and train with: "
    "python -m ilvr_jax.train --config=own_data.py"
)
BARS = " ▁▂▃▄▅▆▇█"
BINS = 12
IMAGE_SIZES = 8  # the most frequent ones are shown
REASONS = 20
SHOWN_TOKENS = 2000  # of a run of text in a sample
SHOWN_PIXELS = 560  # a side of a picture in a sample
QUANTILES = {"least": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "most": 1.0}
SIDES = ("prefix", "segments", "text", "tail", "images", "image_tokens", "helper_tokens")
KINDS = {Role.PADDING: "padding", Role.PROMPT: "prompt", Role.IMAGE: "image", Role.MARKER: "marker"}
KINDS |= {Role.ANSWER: "answer"}


class Section(NamedTuple):
    """A table under a title; cells are numbers, each row with a name in front, or else text that may be long."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True

    def table(self) -> Table:
        """Returns it for the terminal, without the title, which may be wider."""
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
    """Returns the tables of a survey; what there is nothing to say about is left out."""
    found = [quantities(view, tally) for view, tally in survey.distinct()]
    found.append(image_sizes(survey.tallies[0].images))
    for view, tally in zip(survey.views, survey.tallies, strict=True):
        filled = ((bucket, pair) for (bucket, _), pair in tally.filled.items())
        found.append(bucket_table(f"Buckets of the config in {view.stages}", view.buckets, filled))
    filled = ((first_holding(need, suggested), pair) for need, pair in survey.needs().items())
    found.append(bucket_table("Suggested buckets", suggested, filled))
    reasons = []
    for why, count in survey.reasons.most_common(REASONS):
        reasons += [(str(count), why), *(("", f"- {sentence}") for sentence in survey.sentences[why])]
    found.append(Section("Left out", ("records", "why, and the first of them"), reasons, numbers=False))
    return [section for section in found if section.rows]


def quantities(view: View, tally: Tally) -> Section:
    """Returns the table of how much there is in a record, by quantity; those that are always 0 are left out."""
    treatment = f", helper images: {view.helper_images}" if view.helper_images else ""
    rows = [
        (name, *(str(quantile(values, share)) for share in QUANTILES.values()), histogram(values))
        for name, values in tally.quantities.items()
        if any(values)
    ]
    return Section(f"In a record ({view.stages}{treatment})", ("", *QUANTILES, "spread"), rows)


def quantile(values: Counter[int], share: float) -> int:
    """Returns the smallest value that at least this share of the counted values does not exceed."""
    ordered = sorted(values)
    below = np.cumsum([values[value] for value in ordered])
    return ordered[int(np.searchsorted(below, share * below[-1]))]


def histogram(values: Counter[int]) -> str:
    """Returns bars for equal spans from the least value to the greatest."""
    bins = min(BINS, max(values) - min(values) + 1)
    counts, _ = np.histogram(list(values), bins, weights=list(values.values()))
    heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights)


def image_sizes(images: Counter[tuple[int, int, bool]]) -> Section:
    """Returns the table of the most frequent sizes of images as the model gets them."""
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
    return Section("Images as the model gets them", header, rows)


def bucket_table(
    title: str, buckets: Mapping[str, Layout], filled: Iterable[tuple[str, Int[np.ndarray, " pair"]]]
) -> Section:
    """Returns the table of buckets with their samples, and the share of the batches that their tokens do not fill.

    `filled` are samples and their tokens by bucket ("" for none), any number of pairs to each.
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
    """Returns a config file: the one at `base` with changes, by dotted key, and buckets in place of its own."""
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
    """Writes one HTML file: `title`, `remark`, `sections`, `config` (a file's text), `samples` of `laid_out`.

    Raises as `write_text` does.
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.get_template("data_check.html").render(config_file=CONFIG_FILE, **parts))


def laid_out(
    name: str, bucket: str, sample: Sample, layout: Layout, tokenizer: PreTrainedTokenizerFast, special: SpecialTokens
) -> dict[str, Any]:
    """Returns a sample for the page: runs of columns that play the same part, in order."""
    tokens, roles, loss = (np.zeros(layout.columns, np.int32) for _ in range(3))
    place = sample_columns(sample, layout)
    tokens[place], roles[place], loss[place] = sample.tokens, sample.roles, sample.labels != -100
    kinds = [
        ("slots" if role == Role.MARKER and token == special.latent_pad else KINDS[Role(role)], bool(carries))
        for token, role, carries in zip(tokens, roles, loss, strict=True)
    ]
    pictures = {"image": iter(sample.images), "slots": iter(sample.helper_images)}
    runs, first = [], 0
    for (kind, carries), members in itertools.groupby(kinds):
        count = len(list(members))
        picture = next(pictures[kind], None) if kind in pictures else None
        run = {"kind": kind, "loss": carries, "first": first, "count": count, "image": picture and png(picture)}
        if kind in ("prompt", "answer", "marker"):
            run["pieces"] = list(pieces(tokens[first : first + min(count, SHOWN_TOKENS)], tokenizer))
            run["hidden"] = max(0, count - SHOWN_TOKENS)
        runs.append(run)
        first += count
    return {"name": name, "bucket": bucket, "layout": layout, "tokens": len(place), "runs": runs}


def pieces(tokens: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Yields the text of each token; those that only together are letters come as one."""
    waiting = []
    for token in tokens:
        waiting.append(int(token))
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)


def png(image: PatchedImage) -> str:
    """Returns an image as a data address for HTML, no larger than it is shown."""
    file, picture = io.BytesIO(), Image.fromarray(unpatch_image(image))
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
