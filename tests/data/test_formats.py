"""Formats by name, and the examples of docs/formats.md."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilvr_jax.config.experiments import load_config, parse
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.data.formats import FORMATS
from ilvr_jax.data.records import BadRecord, Look, Text
from ilvr_jax.data.sources import open_source

REPOSITORY = Path(__file__).parents[2]
BLOCK = re.compile(r"```(?:json|python)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def sections():
    """Return the examples of the documentation by the heading above them."""
    parts = (REPOSITORY / "docs" / "formats.md").read_text().split("\n## ")[1:]
    return {part.partition("\n")[0]: found[1] for part in parts if (found := BLOCK.search(part))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("map.png", "step.png"):
        Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_configured(source: str, path: Path, **changes):
    config = load_config(REPOSITORY / "configs" / "plain_maps.py")
    config.data.update({"source": source, "path": str(path), **changes})
    return open_source(parse(config).data, config.seed)


def write_example(folder: Path, name: str, example: str) -> Path:
    """Write the documentation's example of a format as a file."""
    if name == "zebra_cot":
        exec(example, {})
        return folder / "train.parquet"
    (folder / "train.jsonl").write_text(example)
    return folder / "train.jsonl"


def test_every_format_is_documented_by_an_example(sections):
    assert list(sections) == [*FORMATS, "Another format"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_documented_examples_are_what_a_run_reads(folder, sections, name):
    source = open_configured(name, write_example(folder, name, sections[name]))
    assert len(source) == 1 and source.skipped == []
    record = source[0]
    assert record.question == "<image> Find the way."
    images = [folder / "map.png", folder / "step.png"]
    if name == "zebra_cot":
        images = [image.read_bytes() for image in images]
    assert record.images == (images[0],)
    if name == "vsp":
        assert record.steps == () and record.map_desc == ((1, 0), (-1, 2))
    else:
        closing = "There.\n\nFinal Answer: R" if name == "zebra_cot" else "\\boxed{R}"
        assert record.steps == (Text("Right. "), Look(images[1]), Text(closing))


def test_the_documented_way_to_add_one(folder, sections):
    module = {"__name__": "caption"}
    exec(sections["Another format"], module)
    (folder / "train.jsonl").write_text('{"image": "map.png", "caption": "A map."}\n{"image": "map.png"}\n')
    source = module["CaptionSource"](folder / "train.jsonl", on_bad_record="skip")
    assert source[0].steps == (Text("A map."),) and source[0].images == (folder / "map.png",)
    assert source.skipped == ['train.jsonl line 2: must have the fields image, caption, but lacks "caption"']


@pytest.mark.parametrize("name", FORMATS)
def test_bad_records_are_skipped_if_the_config_asks_for_it(folder, sections, name):
    path = write_example(folder, name, sections[name])
    if name == "zebra_cot":
        exec(sections[name].replace("[reasoning_image_1]", "[reasoning_image_2]").replace("train.", "worse."), {})
        path = folder
    else:
        path.write_text(sections[name] + "[]\n")
    with pytest.raises(BadRecord, match=r"(train.jsonl line 2|worse.parquet row 0): "):
        open_configured(name, path)
    source = open_configured(name, path, on_bad_record="skip")
    assert len(source) == 1 and len(source.skipped) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_root_for_images(folder, sections, name):
    path = write_example(folder, name, sections[name])
    images = folder / "images"
    images.mkdir()
    for image in ("map.png", "step.png"):
        (folder / image).rename(images / image)
    expected = (images / "map.png").read_bytes() if name == "zebra_cot" else images / "map.png"
    assert open_configured(name, path, root=str(images))[0].images == (expected,)


def test_unknown_names():
    config = load_config(REPOSITORY / "configs" / "plain_maps.py")
    config.data.update(source="parquet", path="train.parquet")
    with pytest.raises(BadConfig, match="`data.source` must be one of frozen_lake, ilvr, .*, got 'parquet'"):
        open_source(parse(config).data, 0)
