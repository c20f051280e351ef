"""python -m ilvr_jax.check_data FILE: the sizes, bad records and buckets of a data set."""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from ilvr_jax.checkpoints.pretrained import open_init_from
from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.config.experiments import OWN_DATA, by_key, config_errors, load_config, parse
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.flags import read_config_flags
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.data.examples import build_example, build_prompt
from ilvr_jax.data.formats import FORMATS, find_format
from ilvr_jax.data.pipeline import Source, find_bucket
from ilvr_jax.data.sources import config_buckets, example_settings, make_tokenizer, open_source, prompt_settings
from ilvr_jax.data.survey import Survey, View, measurements, suggest_buckets
from ilvr_jax.data.tokenizer import special_tokens
from ilvr_jax.interrupts import stop_sentence
from ilvr_jax.method.layout import Layout, required_layout
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models import build_model
from ilvr_jax.models.base import ImageGeometry
from ilvr_jax.models.tensor_files import BadCheckpoint
from ilvr_jax.reports.data_check import CONFIG_FILE, config_file, laid_out, sections, write_page
from ilvr_jax.training.run import check_choices

TREATMENTS = ("latent", "encode", "slots", "omit")  # of helper images; those that show images come first
WITHOUT_CONFIG = (
    "Checked without a config: latent settings of configs/plain_maps.py, images in their own size, a tokenizer trained "
    "on the texts. With --config, all of these are the config's, and its buckets are checked as well."
)
ENOUGH_FOR_WORKERS = 2000  # records; fewer are checked faster in one process


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 all usable, 1 some would be skipped, 2 bad input or nothing usable, 130 stopped."""
    parser = ArgumentParser(prog="python -m ilvr_jax.check_data", description=__doc__)
    parser.add_argument("file", type=path_flag, help="JSON lines, a parquet file or a folder of them")
    parser.add_argument("--format", help=f"{', '.join(FORMATS)} (default: read from the file)")
    parser.add_argument("--root", default="", help="the folder that images are in (default: the file's)")
    parser.add_argument("--limit", type=int, help="check only the first LIMIT records")
    parser.add_argument("--samples", type=int, default=4, help="samples shown on the page (default: 4)")
    parser.add_argument("--out", type=path_flag, help="the page to write (default: <file>_check.html, here)")
    options = read_config_flags(parser, arguments, OWN_DATA, prepare)
    with stop_sentence(lambda: "stopped; no page was written"):
        survey = check(options)
    if not survey.usable:
        print(f"{options.file} must hold usable records, got none", file=sys.stderr)
        return 2
    return 1 if survey.left_out else 0


def prepare(options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Put the data set into the config; without --config, make the default one fit any data."""
    for name, least in (("limit", 1), ("samples", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise BadConfig(f"--{name} must be at least {least}, got {value}")
    if options.format not in (None, *FORMATS):
        raise BadConfig(f"--format must be one of {', '.join(FORMATS)}, got {options.format!r}")
    options.out = options.out or Path(f"{Path(os.path.abspath(options.file)).stem}_check.html")
    source = options.format or find_format(options.file)
    values["data"] |= {"source": source, "path": str(options.file), "root": options.root, "on_bad_record": "skip"}
    if options.config_file is None:
        values["data"]["image_scale"] = 1.0
        values["stages"] = ("stage1",)
        values["eval"]["question"] = ""


def check(options: argparse.Namespace) -> Survey:
    """Check the data set, print the report, write the page and return the survey.

    Raises BadConfig, BadRecord if the file holds no usable record, and OSError if the page cannot be written.
    """
    config = options.config
    check_choices(config)
    source = open_source(config.data, config.seed)
    with config_errors("model", BadCheckpoint):
        pretrained = open_init_from(config.model.init_from, weights=False) if config.model.init_from else None
    tokenizer = pretrained.tokenizer if pretrained else make_tokenizer(config, source)
    with config_errors("model"):
        model = build_model(config.model, len(tokenizer), pretrained and pretrained.hf_config)
    with config_errors("tokenizer"):
        special = special_tokens(tokenizer)
    views = make_views(config, model.geometry, options.config_file is not None, tokenizer, special)
    survey = measure(source, views, model.geometry, options.limit, config.data.workers)
    needs = {need: int(samples) for need, (samples, _) in survey.needs().items()}
    suggested = suggest_buckets(needs)
    records = survey.usable + survey.left_out
    title = f"{options.file.name} ({config.data.source}): {records} records, {survey.usable} usable"
    remark = (
        f"{config.latents.latent_size} slots per look, attention windows of {model.config.vision.window_size} pixels. "
        + (f"Checked with {options.config_file}." if options.config_file else WITHOUT_CONFIG)
    )
    tables = sections(survey, suggested)
    config_text = ""
    if suggested:
        config_text = config_file(str(options.config_file or OWN_DATA), changes(options, survey), suggested)
    console = Console()
    print_line = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    remark = "\n".join([remark, *getattr(source, "remarks", ())])
    print_line(f"{title}\n{remark}\n")
    for section in tables:
        print_line(section.title)
        console.print(section.table())
        print_line()
    if config_text:
        print_line(f"{CONFIG_FILE}\n\n{config_text}\n")
    samples = choose_samples(survey, source, suggested, model.geometry, options.samples, tokenizer, special)
    write_page(options.out, title=title, remark=remark, sections=tables, config=config_text, samples=samples)
    print_line(f"Page written to {options.out}")
    return survey


def changes(options: argparse.Namespace, survey: Survey) -> dict[str, Any]:
    """Return the values that the check changed in the config file, by dotted key, for a config that trains on the data.

    They have `data.on_bad_record="skip"` only if there are bad records. A record that merely lacks a bucket is not bad,
    since the config has new buckets.
    """
    in_file, checked = by_key(parse(load_config(options.config_file or OWN_DATA))), by_key(options.config)
    separate = ("data.on_bad_record", "data.buckets.")
    changed = {
        key: value for key, value in checked.items() if not key.startswith(separate) and value != in_file.get(key)
    }
    return changed | ({"data.on_bad_record": "skip"} if survey.usable + survey.left_out > len(survey.samples) else {})


def make_views(
    config: RunConfig,
    geometry: ImageGeometry,
    with_buckets: bool,
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialTokens,
) -> list[View]:
    """Return a view for the stages of each treatment of helper images, or of prompts alone for the format vsp."""
    build = {"tokenizer": tokenizer, "special": special}
    if config.data.source == "vsp":
        settings = prompt_settings(config, geometry)
        return [View("prompts", "", functools.partial(build_prompt, settings=settings, **build), {})]
    views = []
    for treatment in TREATMENTS:
        if stages := [name for name, stage in config.stages.items() if stage.helper_images == treatment]:
            settings = example_settings(config, geometry, treatment)
            to_sample = functools.partial(build_example, settings=settings, **build)
            buckets = config_buckets(config, treatment) if with_buckets else {}
            views.append(View(", ".join(stages), treatment, to_sample, buckets))
    return views


def measure(source: Source, views: Sequence[View], geometry: ImageGeometry, limit: int | None, workers: int) -> Survey:
    """Measure the records of a source, up to a limit, with a progress bar on stderr."""
    count = min(len(source), limit or len(source))
    survey = Survey(views)
    columns = TextColumn("Checking"), BarColumn(), MofNCompleteColumn(), Rate()
    workers = workers if count >= ENOUGH_FOR_WORKERS else 0
    with (
        Progress(*columns, console=Console(stderr=True)) as bar,
        contextlib.closing(measurements(source, views, geometry, count, workers)) as measured,
    ):
        for number, record_views in enumerate(bar.track(measured, total=count)):
            survey.add(number, record_views)
    for sentence in getattr(source, "skipped", ()):
        survey.leave_out([sentence])
    return survey


class Rate(ProgressColumn):
    """Records per second, as a column of the progress bar."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        return Text(f"{task.completed / seconds:.0f} records/s" if seconds else "")


def choose_samples(
    survey: Survey,
    source: Source,
    suggested: Mapping[str, Layout],
    geometry: ImageGeometry,
    count: int,
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialTokens,
) -> list[dict[str, Any]]:
    """Return samples for the page, evenly spread over the records, each in its bucket.

    A sample that fits no bucket of the config is shown in a suggested one; a prompt without an answer has no bucket.
    """
    view, numbers, chosen = survey.views[0], survey.samples, []
    for place in np.linspace(0, len(numbers) - 1, min(count, len(numbers)), dtype=int):
        record = source[numbers[place]]
        sample = view.to_sample(record, number=numbers[place])
        buckets = [*view.buckets.items(), *((f"the suggested {name}", layout) for name, layout in suggested.items())]
        buckets.append(("no bucket", required_layout(sample, geometry)))
        name, layout = buckets[find_bucket(sample, record.name, [layout for _, layout in buckets], geometry)]
        chosen.append(laid_out(record.name, name, sample, layout, tokenizer, special))
    return chosen


if __name__ == "__main__":
    sys.exit(main())
