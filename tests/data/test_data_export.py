"""Exported records: they are read back unchanged, give the same training, and are never incomplete."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ilvr_jax.config.experiments import load_config, parse, resolve_path
from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.examples import ExampleSettings, build_example
from ilvr_jax.data.export import write_records
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.ilvr import IlvrSource
from ilvr_jax.data.images import load_image
from ilvr_jax.data.pipeline import make_iterator
from ilvr_jax.data.records import Text
from ilvr_jax.data.tokenizer import record_texts, special_tokens, train_tokenizer
from ilvr_jax.export_data import main
from ilvr_jax.files import locked_folder
from ilvr_jax.method.layout import Layout
from ilvr_jax.models.qwen2_5_vl.images import WindowGeometry

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "plain_maps.py"
COUNT, SEED, SCALE = 24, 5, 28 / 64


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a folder that the command wrote."""
    folder = tmp_path_factory.mktemp("data") / "new" / "exported"
    main([f"--config={CONFIG}", f"--count={COUNT}", f"--out={folder}", f"--seed={SEED}"])
    return folder


@pytest.fixture(scope="module")
def generated():
    """Return the records that a run of the same config and seed is trained on."""
    settings = parse(load_config(CONFIG)).data.frozen_lake
    exclude = tuple(str(resolve_path(path)) for path in settings.exclude)
    assert settings.cell_pixels == 28 and exclude
    return FrozenLakeSource(dataclasses.replace(settings, exclude=exclude), SEED, COUNT)


def test_the_files_hold_what_was_generated(exported, generated):
    source = IlvrSource(exported / "train.jsonl")
    assert len(source) == COUNT
    pictures = 0
    for read, made in zip(source, generated, strict=True):
        assert (read.question, read.answer, read.map_desc) == (made.question, made.answer, made.map_desc)
        assert len(read.steps) == len(made.steps) and len(read.images) == len(made.images)
        pairs = [*zip(read.images, made.images, strict=True)]
        for step, expected in zip(read.steps, made.steps, strict=True):
            if isinstance(expected, Text):
                assert step == expected
            else:
                pairs.append((step.helper_image, expected.helper_image))
        for path, pixels in pairs:
            with Image.open(path) as image:
                assert image.size == (64 * len(made.map_desc[0]), 64 * len(made.map_desc))
            np.testing.assert_array_equal(load_image(path, SCALE), pixels)
        pictures += len(pairs)
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert len(files) == pictures + 1  # no picture is shared by two, and nothing else is left


def test_training_batches_are_the_same_from_files(exported, generated):
    config = parse(load_config(CONFIG))
    tokenizer = train_tokenizer(record_texts(generated))
    special = special_tokens(tokenizer)
    size = config.latents.latent_size
    layouts = [Layout(latent_size=size, **vars(bucket)) for bucket in config.data.buckets.values() if bucket.segments]
    buckets = sorted(layouts, key=lambda layout: layout.columns)

    def batches(source, image_scale):
        settings = ExampleSettings(image_scale=image_scale, latent_size=size)
        to_sample = functools.partial(build_example, tokenizer=tokenizer, special=special, settings=settings)
        iterator = make_iterator(source, to_sample, buckets, 4, 7, special, geometry=WindowGeometry(2))
        return itertools.islice(iterator, 8)

    from_files = batches(IlvrSource(exported / "train.jsonl"), SCALE)
    met, looks = set(), 0
    for expected, read in zip(batches(generated, 1.0), from_files, strict=True):
        assert read.layout == expected.layout
        jax.tree.map(np.testing.assert_array_equal, read, expected)
        met.add(expected.layout)
        looks += int((np.array(expected.tokens) == special.latent_start).sum())
    assert len(met) > 1 and looks > 20


def test_the_command_takes_config_values_and_the_configs_seed(tmp_path, capsys):
    settings = FrozenLakeConfig(levels=(3,), max_moves=4, moves_per_look=1, question="Where to?")
    flags = ["levels=3", "max_moves=4", "moves_per_look=1", "question=Where to?", "exclude=()"]
    main(
        ["--config=configs/plain_maps.py", "--count=3", f"--out={tmp_path}", "--config.seed=9"]
        + [f"--config.data.frozen_lake.{flag}" for flag in flags]
    )
    for read, made in zip(IlvrSource(tmp_path / "train.jsonl"), FrozenLakeSource(settings, 9, 3), strict=True):
        assert (read.map_desc, read.question, len(read.steps)) == (made.map_desc, "Where to?", len(made.steps))
    assert capsys.readouterr().out == (
        f"3 records written to {tmp_path / 'train.jsonl'}, 64 pixels per cell; data.image_scale=0.4375 makes each cell "
        "one vision token\n"
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--count=0"], "--count must be at least 1, got 0"),
        (["--seed=-1"], "--seed must be at least 0, got -1"),
        (
            ["--config.data.frozen_lake.level=3"],
            "--config.data.frozen_lake.level must be a key of the config; the nearest is data.frozen_lake.levels",
        ),
        (
            ["--config.data.frozen_lake.levels=2"],
            "`data.frozen_lake.levels` must be from 3 to 10, got 2",
        ),
        (
            ["--config.data.frozen_lake.exclude=nothing.jsonl"],
            "data.frozen_lake.exclude: nothing.jsonl must be a file of records, but cannot be read: No such file or "
            "directory",
        ),
        (
            ["--config=nothing.py"],
            "--config must be a Python file such as configs/base.py, but there is no file nothing.py",
        ),
    ],
)
def test_bad_input_ends_the_command_with_one_sentence(tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert main([f"--config={CONFIG}", "--count=2", f"--out={out}", *flags]) == 2
    assert capsys.readouterr().err == message + "\n"
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--colour=red", "--con=x", "extra"])
def test_an_unknown_argument_is_named(tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as ended:
        main([f"--config={CONFIG}", "--count=2", f"--out={tmp_path / 'out'}", flag])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"python -m ilvr_jax.export_data: error: unrecognized arguments: {flag}\n"
    assert not (tmp_path / "out").exists()


def test_existing_data_are_not_overwritten(exported):
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    command = [f"--config={CONFIG}", "--count=1", f"--out={exported}"]
    ended = subprocess.run(
        [sys.executable, "-m", "ilvr_jax.export_data", *command],
        cwd=exported,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and ended.stdout == ""
    *_, last = ended.stderr.splitlines()
    assert last == f"{exported} must be a folder without a train.jsonl, but has one" and "Traceback" not in ended.stderr
    assert {path: path.stat().st_mtime_ns for path in exported.rglob("*")} == before


def test_two_exports_into_one_folder_are_refused(tmp_path, capsys):
    """The second would replace images of the first."""
    with locked_folder(tmp_path):
        assert main([f"--config={CONFIG}", "--count=1", f"--out={tmp_path}"]) == 2
    assert f"{tmp_path} is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert main([f"--config={CONFIG}", "--count=1", f"--out={out}"]) == 2
    assert f"{out} cannot be read or written: Not a directory\n" in capsys.readouterr().err


def test_nothing_looks_finished_after_a_failure_midway(tmp_path, capsys):
    # Of maps solved in one move none has a detour, so the first record that needs one fails.
    flags = ["levels=3", "max_moves=1", "detour_share=0.3", "exclude=()"]
    command = [f"--config={CONFIG}", "--count=99", f"--out={tmp_path}"]
    assert main(command + [f"--config.data.frozen_lake.{flag}" for flag in flags]) == 2
    assert "must allow maps of level 3, but none of 20000 maps met them" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.png"))
    assert not (tmp_path / "train.jsonl").exists()
    # What is left does not stand in the way of another attempt.
    assert write_records(FrozenLakeSource(FrozenLakeConfig(), 0, 2), tmp_path) == 2
    assert [json.loads(line)["original_final_answer"] for line in (tmp_path / "train.jsonl").open()] == [
        record.answer for record in FrozenLakeSource(FrozenLakeConfig(), 0, 2)
    ]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["train.jsonl"]
