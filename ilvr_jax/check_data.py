"""Checks a data set, and prints its sizes, bad records and buckets: python -m ilvr_jax.check_data FILE"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from ilvr_jax.checkpoints.pretrained import open_init_from
from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.config.experiments import BASE, as_file, config_errors, load_config
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
from ilvr_jax.models.base import ImageGeometry
from ilvr_jax.models.qwen2_5_vl.config import model_config
from ilvr_jax.models.tensor_files import BadCheckpoint
from ilvr_jax.reports.data_check import CONFIG_FILE, config_file, laid_out, sections, write_page
from ilvr_jax.training.run import check_choices

TREATMENTS = ("latent", "encode", "slots", "omit")  # of helper images, those that show them first
WITHOUT_CONFIG = (
    "Checked without a config: latent settings of configs/base.py, images in their own size, a tokenizer made from the "
    "texts. With --config the figures are those of its run, and its buckets are checked too."
)
ENOUGH_FOR_WORKERS = 2000  # records; processes take seconds to start


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 all usable, 1 some would be skipped, 2 bad input or nothing usable, 130 stopped."""
    parser = ArgumentParser(prog="python -m ilvr_jax.check_data", description=__doc__)
    parser.add_argument("file", type=path_flag, help="JSON lines, a parquet file or a folder of them")
    parser.add_argument("--format", help=f"{', '.join(FORMATS)} (default: found from the file)")
    parser.add_argument("--root", default="", help="the folder that images are in (default: the file's)")
    parser.add_argument("--limit", type=int, help="look at the first N records (default: all)")
    parser.add_argument("--samples", type=int, default=4, help="samples on the page (default: 4)")
    parser.add_argument("--out", type=path_flag, help="where the page is written (default: <file>_check.html, here)")
    options = read_config_flags(parser, arguments, BASE, prepare)
    with stop_sentence(lambda: "stopped; no page was written"):
        survey = check(options)
    if not survey.usable:
        print(f"{options.file}: no record is usable", file=sys.stderr)
        return 2
    return 1 if survey.left_out else 0


def prepare(options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Puts the data set into the config; without --config, makes the default one fit any data."""
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
    """Checks the data set, prints and writes what there is to say, and returns it.

    Raises BadConfig, BadRecord if nothing is usable at first sight, and OSError if the page cannot be written.
    """
    config = options.config
    check_choices(config)
    source = open_source(config.data, config.seed)
    with config_errors("model", BadCheckpoint):
        pretrained = open_init_from(config.model.init_from, weights=False) if config.model.init_from else None
    tokenizer = pretrained.tokenizer if pretrained else make_tokenizer(config, source)
    with config_errors("model"):
        vision = model_config(config.model, len(tokenizer), pretrained and pretrained.hf_config).vision
    with config_errors("tokenizer"):
        special = special_tokens(tokenizer)
    views = make_views(config, options.config_file is not None, tokenizer, special)
    survey = take(source, views, vision.geometry, options.limit, config.data.workers)
    needs = {need: int(samples) for need, (samples, _) in survey.needs().items()}
    suggested = suggest_buckets(needs)
    records = survey.usable + survey.left_out
    title = f"{options.file.name} ({config.data.source}): {records} records, {survey.usable} usable"
    remark = f"{config.latents.latent_size} slots a look, attention windows of {vision.window_size} pixels. " + (
        f"Checked with {options.config_file}." if options.config_file else WITHOUT_CONFIG
    )
    found = sections(survey, suggested)
    written = ""
    if suggested:
        written = config_file(str(options.config_file or BASE), changes(options, survey), suggested)
    console = Console()
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    remark = "\n".join([remark, *getattr(source, "remarks", ())])
    say(f"{title}\n{remark}\n")
    for section in found:
        say(section.title)
        console.print(section.table())
        say()
    if written:
        say(f"{CONFIG_FILE}\n\n{written}\n")
    samples = choose_samples(survey, source, suggested, vision.geometry, options.samples, tokenizer, special)
    write_page(options.out, title=title, remark=remark, sections=found, config=written, samples=samples)
    say(f"Written: {options.out}")
    return survey


def changes(options: argparse.Namespace, survey: Survey) -> dict[str, Any]:
    """Returns what the check used in place of the config file's values, by key, for a config that trains on the same.

    Bad records end a training unless `data.on_bad_record` is "skip", so that is among them if there are any; a record
    that only lacks a bucket has one in that config.
    """
    before = dict(leaves(load_config(options.config_file or BASE).to_dict()))
    kept, now = ("data.on_bad_record", "data.buckets."), leaves(as_file(options.config))
    changed = {key: value for key, value in now if not key.startswith(kept) and value != before.get(key)}
    return changed | ({"data.on_bad_record": "skip"} if survey.usable + survey.left_out > len(survey.samples) else {})


def make_views(
    config: RunConfig, with_buckets: bool, tokenizer: PreTrainedTokenizerFast, special: SpecialTokens
) -> list[View]:
    """Returns what stages make of records, those together that treat helper images alike; prompts alone for vsp."""
    build = {"tokenizer": tokenizer, "special": special}
    if config.data.source == "vsp":
        return [View("prompts", "", functools.partial(build_prompt, settings=prompt_settings(config), **build), {})]
    views = []
    for treatment in TREATMENTS:
        if stages := [name for name, stage in config.stages.items() if stage.helper_images == treatment]:
            to_sample = functools.partial(build_example, settings=example_settings(config, treatment), **build)
            buckets = config_buckets(config, treatment) if with_buckets else {}
            views.append(View(", ".join(stages), treatment, to_sample, buckets))
    return views


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested sections by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def take(source: Source, views: Sequence[View], geometry: ImageGeometry, limit: int | None, workers: int) -> Survey:
    """Measures the records of a source, up to a limit, with a bar on stderr."""
    count = min(len(source), limit or len(source))
    survey = Survey(views)
    columns = TextColumn("Checking"), BarColumn(), MofNCompleteColumn(), Rate()
    workers = workers if count >= ENOUGH_FOR_WORKERS else 0
    with (
        Progress(*columns, console=Console(stderr=True)) as bar,
        contextlib.closing(measurements(source, views, geometry, count, workers)) as measured,
    ):
        for number, one in enumerate(bar.track(measured, total=count)):
            survey.add(number, one)
    for sentence in getattr(source, "skipped", ()):
        survey.leave_out([sentence])
    return survey


class Rate(ProgressColumn):
    """Records a second."""

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
    """Returns samples for the page, evenly spread over the records, each in the bucket that it goes to.

    Those that no bucket of the config holds are shown in a suggested one, prompts alone as they are.
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
