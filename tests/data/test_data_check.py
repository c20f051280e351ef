"""The check of a data set: its counts against other counts, its buckets against the pipeline, and its report."""

import dataclasses
import functools
import html
import json
import os
import pickle
import re
from collections import Counter
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ilvr_jax import check_data as check
from ilvr_jax.check_data import main
from ilvr_jax.config.experiments import evaluation_file, load_config, parse
from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data import images
from ilvr_jax.data.examples import ExampleSettings, build_example
from ilvr_jax.data.export import write_records as export_records
from ilvr_jax.data.formats import find_format
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.images import load_image, patch_image, unpatch_image
from ilvr_jax.data.mirage import MirageSource
from ilvr_jax.data.pipeline import load_sample
from ilvr_jax.data.sources import config_buckets, example_settings, make_tokenizer, open_source
from ilvr_jax.data.survey import Survey, View, first_holding, measurements, reason_of, round_up, suggest_buckets
from ilvr_jax.data.tokenizer import record_texts, special_tokens, train_tokenizer
from ilvr_jax.method.layout import fits, merge_layouts, padded_tokens, required_layout
from ilvr_jax.models.qwen2_5_vl.images import PatchedImage
from ilvr_jax.reports.data_check import bucket_table, config_file, histogram, laid_out, pieces, quantile
from tests.paths import REPOSITORY
from tests.samples import GEOMETRY, random_sample

MIRAGE = REPOSITORY / "tests" / "data" / "mirage" / "sample.jsonl"
MAPS = REPOSITORY / "tests" / "data" / "vsp_planning" / "test.jsonl"
CONFIG = REPOSITORY / "configs" / "plain_maps.py"
RECORD = {
    "text_input": "<image> Which [bold]way[/bold]?",
    "image_input": "a.png",
    "image_output": "b.png",
    "text_output": "See 🦊 <output_image> there.",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run each test in its own folder, since pages are written to the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def cells(printed: str, title: str) -> dict[str, list[str]]:
    """Return the rows of a printed table by their first word(s)."""
    lines = printed[printed.index(title) :].split("\n\n")[0].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("─")) + 1
    rows = [re.split(r"  +|(?<=\S) (?=[\d–])", line.strip(" ▁▂▃▄▅▆▇█")) for line in lines[first:]]
    return {row[0]: row[1:] for row in rows}


def save_config(printed: str, folder: Path) -> Path:
    """Write the config that a check printed, as a user does, into a file."""
    path = folder / "own_data.py"
    path.write_text(re.search(r"^from ml_collections .*?^    return config\n", printed, re.DOTALL | re.MULTILINE)[0])
    return path


def write_records(folder, *changes):
    """Write mirage records, each with changes, and their two images: of 2 x 1 and 4 x 4 vision tokens."""
    for name, size in (("a.png", (56, 28)), ("b.png", (112, 112))):
        Image.new("RGB", size, "teal").save(folder / name)
    path = folder / "train.jsonl"
    path.write_text("".join(f"{json.dumps(RECORD | change)}\n" for change in changes))
    return path


def test_the_figures_are_those_of_another_count(folder, capsys):
    assert main([str(MIRAGE)]) == 0
    printed, _ = capsys.readouterr()
    assert printed.startswith("sample.jsonl (mirage): 3 records, 3 usable\n4 slots per look, attention windows of 56")
    # The published template, written by hand, and the tokens of its text counted without build_example.
    records = [json.loads(line) for line in MIRAGE.open()]
    tokenizer = train_tokenizer(record_texts(MirageSource(MIRAGE)))
    units = [(round(Image.open(MIRAGE.parent / record["image_input"]).width / 28)) ** 2 for record in records]
    prompts, answers, totals = [], [], []
    for record, vision in zip(records, units, strict=True):
        question, answer = record["text_input"].split("<image>"), record["text_output"].split("<output_image>")
        encode = tokenizer.backend_tokenizer.encode
        texts = [f"<|im_start|>user\n{question[0]}", f"{question[1]}<|im_end|>\n<|im_start|>assistant"]
        prompts.append(sum(len(encode(text).ids) for text in texts))
        answers.append(sum(len(encode(text).ids) for text in ("\n" + answer[0], f"{answer[1]}<|im_end|>")))
        totals.append(prompts[-1] + 2 + vision + answers[-1] + 2 + 4)
    table = cells(printed, "Per record (stage1, helper images: latent)")
    for name, values in (
        ("user images", [1, 1, 1]),
        ("latent segments", [1, 1, 1]),
        ("helper images", [1, 1, 1]),
        ("text tokens, prompt", prompts),
        ("text tokens, answer", answers),
        ("vision tokens, prompt", units),
        ("vision tokens for the teacher", units),
        ("all tokens", totals),
    ):
        low, middle, high = sorted(values)
        assert table[name][:6] == [str(value) for value in (low, low, middle, high, high, high)], name
    assert cells(printed, "Images after resizing")["308x308"] == ["121", "1", "1"]
    assert "Buckets of the config" not in printed and "Skipped records" not in printed
    assert "Checked without a config" in printed and "Page written to sample_check.html" in printed


@pytest.mark.parametrize("values", [[3], [1, 1, 1, 9], [5, 1, 4, 2, 3, 2, 2], list(range(100))])
def test_quantiles_and_bars(values):
    ordered = sorted(values)
    for share in (0.0, 0.25, 0.5, 0.95, 1.0):
        expected = np.quantile(ordered, share, method="inverted_cdf")
        assert quantile(Counter(values), share) == expected
    bars = histogram(Counter(values))
    assert len(bars) == min(12, max(values) - min(values) + 1) and "█" in bars and bars[-1] != " "


def test_buckets_take_what_the_pipeline_puts_in_them(folder, capsys):
    export_records(FrozenLakeSource(FrozenLakeConfig(levels=(3, 4, 5), max_moves=6), 0, 12), folder)
    flags = [f"--config={CONFIG}", "--config.data.image_scale=1", "--config.data.buckets.many_looks.images=0"]
    flags += ["--config.data.buckets.large_looks.prefix=60"]  # so that some fit none
    path = folder / "train.jsonl"
    status = main([str(path), *flags])
    printed, _ = capsys.readouterr()
    config = load_config(CONFIG)
    config.data.update(source="ilvr", path="train.jsonl", image_scale=1.0)
    config.data.buckets.many_looks.images, config.data.buckets.large_looks.prefix = 0, 60
    config = parse(config)
    source = check.FORMATS["ilvr"](path, None, "error")
    texts = [config.data.system, config.eval.question, *record_texts(source)]
    tokenizer = train_tokenizer(texts)
    left_out = set()
    for stage in config.stages:
        treatment = config.stages[stage].helper_images
        buckets = config_buckets(config, treatment)
        examples = example_settings(config, GEOMETRY, treatment)
        build = functools.partial(
            build_example, tokenizer=tokenizer, special=special_tokens(tokenizer), settings=examples
        )
        loaded = [load_sample(number, source, build, list(buckets.values()), GEOMETRY) for number in range(12)]
        left_out |= {one.number for one in loaded if one.sample is None}
        table = cells(printed, f"Buckets of the config in {stage}")
        for place, (name, bucket) in enumerate(buckets.items()):
            members = [one.sample for one in loaded if one.sample is not None and one.bucket == place]
            real = sum(
                len(one.tokens) + sum(i.vision_tokens for i in one.images + one.helper_images) for one in members
            )
            share = f"{1 - real / (len(members) * padded_tokens(bucket)):.0%}" if members else "–"
            assert table[name][-2:] == [str(len(members)), share], (stage, name)
        missing = sum(one.sample is None for one in loaded)
        assert table.get("none", ["0"])[-1] == str(missing) and table["all"][-2] == "12"
    assert status == 1 and 0 < len(left_out) < 12
    assert f"train.jsonl (ilvr): 12 records, {12 - len(left_out)} usable" in printed
    assert "must fit a bucket, but takes … images; the largest bucket holds 0 images" in printed
    # What is suggested holds all, in every stage.
    config = parse(load_config(save_config(printed, folder)))
    for stage in config.stages:
        treatment = config.stages[stage].helper_images
        buckets = list(config_buckets(config, treatment).values())
        build = functools.partial(
            build_example,
            tokenizer=tokenizer,
            special=special_tokens(tokenizer),
            settings=example_settings(config, GEOMETRY, treatment),
        )
        assert all(load_sample(number, source, build, buckets, GEOMETRY).sample is not None for number in range(12))


SHAPES = st.tuples(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=3),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
)


@settings(max_examples=40, deadline=None)
@example([([0], [], (1, 1)), ([0, 7], [], (1, 1)), ([0, 0, 0], [], (1, 1)), ([23], [], (1, 1))], 1)
@given(st.lists(SHAPES, min_size=1, max_size=24), st.integers(1, 5))
def test_suggested_buckets_hold_every_sample(shapes, most):
    rng = np.random.default_rng(0)
    samples = [
        random_sample(rng, tuple(texts), 3, tuple(images), (helper,) * (len(texts) - 1))
        for texts, images, helper in shapes
    ]
    needs = Counter(round_up(required_layout(sample, GEOMETRY)) for sample in samples)
    buckets = suggest_buckets(needs, most)
    assert 1 <= len(buckets) <= most
    costs = [padded_tokens(bucket) for bucket in buckets.values()]
    assert costs == sorted(costs)
    for sample in samples:
        name = first_holding(round_up(required_layout(sample, GEOMETRY)), buckets)
        assert fits(sample, buckets[name], GEOMETRY)
    for bucket in buckets.values():
        assert all(getattr(bucket, side) % 8 == 0 for side in ("prefix", "text", "tail"))
    # No worse than one bucket for all.
    one = merge_layouts(list(needs))
    padded = sum(count * costs[list(buckets).index(first_holding(need, buckets))] for need, count in needs.items())
    assert padded <= needs.total() * padded_tokens(one)


def test_more_buckets_for_samples_that_differ(monkeypatch):
    rng = np.random.default_rng(0)
    sizes = ((100,), (5, 5, 5), (5, 5, 5))
    needs = Counter(round_up(required_layout(random_sample(rng, texts), GEOMETRY)) for texts in sizes)
    buckets = suggest_buckets(needs)
    assert sorted(bucket.segments for bucket in buckets.values()) == [0, 2]
    assert config_file("configs/base.py", {}, buckets).count("dict(prefix=") == 2
    assert suggest_buckets({}) == {} and len(suggest_buckets(needs, most=1)) == 1


def test_what_is_wrong_is_counted_by_kind(folder, capsys, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 112 * 112 - 1)  # b.png has one more
    path = write_records(
        folder,
        {"image_output": "c.png"},
        {"image_output": "c.png"},
        {"image_output": "b.png"},
        {"image_input": "moving.gif"},
        {"image_input": "deep.tif"},
        {"image_input": "gone_1.png"},
        {"image_input": "gone_two.png"},
        {"text_output": "no look"},
        {"text_input": "<|im_end|>"},
    )
    Image.new("RGB", (28, 28)).save(folder / "c.png")
    frames = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((28, 28), 1e6, np.float32)).save(folder / "deep.tif")
    with path.open("a") as file:
        file.write('{broken\n\n[1]\n{"text_input": "No more."}\n')
    assert main([str(path)]) == 1
    printed, _ = capsys.readouterr()
    assert printed.startswith("train.jsonl (mirage): 12 records, 2 usable\n")
    lines = printed[printed.index("Skipped records") :].split("\n\n")[0].splitlines()
    counted = {}
    for line in lines[3:]:
        if line[0] != " ":
            number, reason = line.split(maxsplit=1)
            counted[reason.strip()] = int(number)
    assert counted == {
        '"image_input" must be an image file in …, but … cannot be read: No such file or directory': 2,
        "…: must have at most … pixels in the file, got …": 1,
        "…: must be an image with a single frame, got several": 1,
        "…: must have … or … bits per channel, got …": 1,
        '"text_output" must have one <output_image> for each of the … images of "image_output", got …': 1,
        "a text must not hold special tokens, got <|im_end|>": 1,
        "must be one JSON object in UTF-8, but is not JSON": 1,
        "must be one JSON object, got a list": 1,
        'must have the fields text_input, image_input, text_output, but lacks "image_input"': 1,
    }
    for sentence in (
        "train.jsonl line 10: must be one JSON object in UTF-8, but is not JSON (",
        "train.jsonl line 12: must be one JSON object, got a list",
        f"train.jsonl line 6: \"image_input\" must be an image file in {folder}, but 'gone_1.png' cannot",
        f"train.jsonl line 4: {folder / 'moving.gif'}: must be an image with a single frame",
    ):
        assert f"- {sentence}"[:100] in printed, sentence
    assert (
        html.escape("train.jsonl line 12: must be one JSON object", quote=False)
        in (folder / "train_check.html").read_text()
    )


@pytest.mark.parametrize(
    "problem, reason",
    [
        ("a.jsonl line 3: /x/my maps/1.png: is 3000x10 pixels; at most 9", "…: is … pixels; at most 9"),
        ("x.parquet row 1: image_1: is no image; a PNG", "image_1: is no image; a PNG"),
        ("a.jsonl line 3: /x/b.png: must be a PNG, got b'(1; 2)'", "…: must be a PNG, got …"),
        (
            "x row 1: an image of 17 bytes: cannot be decoded (broken); one",
            "an image of … bytes: cannot be decoded; one",
        ),
    ],
)
def test_reasons(problem, reason):
    assert reason_of(problem) == reason


def test_the_page_shows_samples_column_by_column(folder, capsys):
    path = write_records(
        folder,
        {},
        {"text_input": "A & B"},
        {"image_output": ["b.png", "a.png"], "text_output": "1<output_image>2<output_image>3"},
    )
    assert main([str(path), "--samples=3", "--out=pages/look.html"]) == 0
    page = (folder / "pages" / "look.html").read_text()
    assert "Page written to pages/look.html" in capsys.readouterr().out
    assert page.count("<img") == 3 + 4 and page.count("data:image/png;base64,") == 7
    assert "http" not in page and "<script" not in page  # nothing is fetched
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    for shown in ("Which [bold]way[/bold]?", "A & B", "See 🦊 ", "<|vision_start|>", "<|latent_start|>", "<|im_end|>"):
        assert shown in text, shown
    assert text.count("2 vision tokens") == 3 and text.count("4 latent slots; the teacher's image:") == 4
    assert main([str(path), "--samples=0"]) == 0
    assert "<img" not in (folder / "train_check.html").read_text()


def test_a_sample_is_laid_out_in_the_order_of_its_columns():
    source = MirageSource(MIRAGE)
    tokenizer = train_tokenizer(record_texts(source))
    special = special_tokens(tokenizer)
    sample = build_example(source[1], tokenizer, special, ExampleSettings(latent_size=4))
    layout = dataclasses.replace(required_layout(sample, GEOMETRY), segments=2, text=8, latent_size=6)
    shown = laid_out("name", "bucket", sample, layout, tokenizer, special)
    runs = shown["runs"]
    assert [run["first"] for run in runs] == list(np.cumsum([0, *(run["count"] for run in runs)])[:-1])
    assert sum(run["count"] for run in runs) == layout.columns
    kinds = [(run["kind"], run["loss"]) for run in runs if run["kind"] != "padding"]
    assert kinds == [
        ("prompt", False),
        ("marker", False),
        ("image", False),
        ("marker", False),
        ("prompt", False),
        ("answer", False),
        ("answer", True),
        ("marker", True),
        ("slots", False),
        ("marker", True),
        ("answer", True),
    ]
    slots = next(run for run in runs if run["kind"] == "slots")
    assert (slots["first"], slots["count"]) == (layout.slot_columns[0, 0], 4)
    assert sum(run["count"] for run in runs if run["loss"]) == (sample.labels != -100).sum()
    spoken = "".join(piece for run in runs if run["loss"] for piece in run["pieces"])
    first, second = (step.content for step in source[1].steps[::2])
    assert spoken == f"\n{first}<|latent_start|><|latent_end|>{second}<|im_end|>"
    assert [run["image"] is not None for run in runs] == [run["kind"] in ("image", "slots") for run in runs]


def test_letters_of_several_tokens_are_one_piece():
    tokenizer = train_tokenizer(["nothing of it"])
    text = "a 🦊é of"
    tokens = tokenizer.encode(text)
    assert "🦊" in list(pieces(tokens, tokenizer)) and "".join(pieces(tokens, tokenizer)) == text
    assert "".join(pieces(tokens[:3], tokenizer)).endswith("\ufffd")


def test_patches_go_back_to_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    np.testing.assert_array_equal(unpatch_image(patch_image(pixels)), pixels)
    assert isinstance(patch_image(load_image(pixels)), PatchedImage)


def test_prompts_of_questions_without_answers(folder, capsys):
    assert main([str(MAPS), "--limit=20"]) == 0
    printed, _ = capsys.readouterr()
    assert printed.startswith("test.jsonl (vsp): 20 records, 20 usable")
    assert "Per record (prompts)" in printed and "uckets" not in printed.replace("its buckets are checked as well", "")
    table = cells(printed, "Per record (prompts)")
    assert table["vision tokens, prompt"][:1] == ["49"] and "text tokens, answer" not in table
    page = (folder / "test_check.html").read_text()
    assert page.count("<img") == 4 and "professional maze solver" in html.unescape(re.sub(r"<[^>]*>", "", page))


def test_parquet_and_images_without_bytes(folder, capsys, monkeypatch):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    png = folder / "a.png"
    Image.new("RGB", (56, 56), "teal").save(png)
    fields = {"Question": "A?", "Text Reasoning Trace": "So <image_start>[reasoning_image_1]<image_end> it is."}
    rows = [
        fields | {"Final Answer": "yes", "reasoning_image_1": {"bytes": content, "path": None}}
        for content in (png.read_bytes(), b"", b"broken", png.read_bytes())
    ]
    schema = pa.schema([(name, pa.string()) for name in (*fields, "Final Answer")] + [("reasoning_image_1", image)])
    (folder / "parts").mkdir()
    pq.write_table(pa.Table.from_pylist([*rows, {"Question": ""}], schema), folder / "parts" / "one.parquet")
    for name in ("parts", "parts/one.parquet"):
        assert main([name]) == 1
        printed, _ = capsys.readouterr()
        assert "(zebra_cot): 5 records, 2 usable" in printed
        assert "- one.parquet row 1: must have an image for every marker, got none in 'reasoning_image_1'" in printed
        assert "- one.parquet row 2: an image of 6 bytes: must be a whole PNG, " in printed
        assert '- one.parquet row 4: "Question" must be text, got null or an empty one' in printed
        assert cells(printed, "Images after resizing")["56x56"] == ["4", "0", "2"]
    (folder / "elsewhere").mkdir()
    png.rename(folder / "elsewhere" / "a.png")
    rows = [fields | {"Final Answer": "yes", "reasoning_image_1": {"bytes": None, "path": "a.png"}}]
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "parts" / "one.parquet")
    assert main(["parts"]) == 2 and main(["parts", "--root=elsewhere"]) == 0


@pytest.mark.parametrize("lines, format", [("\n{bad\n{}", "vsp"), ('{"a": 1}\n{"text_output": 1}', "mirage")])
def test_formats_are_found(folder, lines, format):
    (folder / "x.jsonl").write_text(lines)
    assert find_format(folder / "x.jsonl") == format
    (folder / "x.jsonl").write_text('{"sequence_plan": 1}\n' + lines)
    assert find_format(folder / "x.jsonl") == "ilvr"
    assert find_format(MAPS) == "vsp" and find_format(folder) == "zebra_cot"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["x.jsonl"], "x.jsonl must be a file of records, but cannot be read: No such file or directory"),
        ([str(MIRAGE), "--format=mirag"], "--format must be one of ilvr, mirage, vsp, zebra_cot, got 'mirag'"),
        ([str(MIRAGE), "--limit=0"], "--limit must be at least 1, got 0"),
        ([str(MIRAGE), "--samples=-1"], "--samples must be at least 0, got -1"),
        (
            [str(MIRAGE), "--format=ilvr"],
            f"{MIRAGE} must hold a JSON object per line, or an array of objects, got none (sample.jsonl line 1: "
            'must have the fields text_input, image_input, sequence_plan, but lacks "sequence_plan")',
        ),
        (
            [str(MIRAGE), "--config=x.py"],
            "--config must be a Python file such as configs/base.py, but there is no file x.py",
        ),
        (
            [str(MIRAGE), "--config.latents.latent_size=-1"],
            "`latents.latent_size` must be from 0 to 1048576, got -1",
        ),
        ([str(MIRAGE), "--out=."], ". must be a regular file or a new one, but it is a folder"),
    ],
)
def test_bad_input_ends_the_command_with_one_sentence(capsys, flags, message):
    assert main([*flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.mark.parametrize("flags", [[], [f"--config={CONFIG}", "--config.data.image_scale=2", "--config.seed=3"]])
def test_the_printed_config_trains_on_the_data(folder, capsys, flags):
    path = write_records(folder, {}, {"image_input": "gone.png"}, {"text_input": "Long. " * 200})
    assert main([str(path), *flags, "--config.stages=warm_up,stage1,stage2"]) in (1, 2)
    config = parse(load_config(save_config(capsys.readouterr().out, folder)))
    assert list(config.stages) == ["warm_up", "stage1", "stage2"] and evaluation_file(config) is None
    assert (config.data.source, config.data.path, config.data.on_bad_record) == ("mirage", str(path), "skip")
    assert (config.data.image_scale, config.seed) == ((2.0, 3) if flags else (1.0, 0))
    source = open_source(config.data, config.seed)
    tokenizer = make_tokenizer(config, source)
    for stage in config.stages:
        settings = example_settings(config, GEOMETRY, config.stages[stage].helper_images)
        build = special_tokens(tokenizer)
        to_sample = functools.partial(build_example, tokenizer=tokenizer, special=build, settings=settings)
        buckets = list(config_buckets(config, config.stages[stage].helper_images).values())
        loaded = [load_sample(number, source, to_sample, buckets, GEOMETRY) for number in range(len(source))]
        assert len(loaded) == 2 and all(one.sample is not None for one in loaded)


def test_a_printed_config_without_bad_records_keeps_errors(folder, capsys):
    path = write_records(folder, {}, {"text_input": "Long. " * 200})  # no bucket of the config holds it
    assert main([str(path), f"--config={CONFIG}", "--config.data.image_scale=1"]) == 1
    assert load_config(save_config(capsys.readouterr().out, folder)).data.on_bad_record == "error"


def test_the_page_fits_phones_and_stays_small(folder, capsys):
    long = "x" * 10**6
    usable = {}, {"text_input": "<image> " + "word " * 50_000}, {"image_input": "large.png"}
    bad = {"text_output": long}, {"image_input": long}, {"image_output": {long: 1}}
    path = write_records(folder, *usable, *bad)
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large.png")
    with path.open("a") as file:
        file.write("{" * 10**6 + "\n" + json.dumps(["z" * 10**6]) + "\n")
    assert main([str(path), "--samples=3"]) == 1
    page = (folder / "train_check.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count('<div class="table">\n<table') == page.count("<table") == page.count("</table>\n</div>") == 4
    assert ".table { overflow-x: auto; }" in page and "overflow-wrap: anywhere" in page
    assert "more tokens</span>" in page and len(page) < 2_000_000
    assert max(map(len, re.sub(r"data:image[^\"]*", "", page[: page.index("Samples, column")]).splitlines())) < 1000
    assert len(capsys.readouterr().out) < 20_000


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_pages_are_regular_files(folder, capsys, kind):
    path = write_records(folder, {})
    (folder / "page").mkdir() if kind == "folder" else os.mkfifo(folder / "page")
    assert main([str(path), "--out=page"]) == 2
    assert "page must be a regular file or a new one" in capsys.readouterr().err


def test_nothing_usable_after_all(folder, capsys):
    path = write_records(folder, {"image_input": "train.jsonl"})
    assert main([str(path)]) == 2
    printed, err = capsys.readouterr()
    assert err.endswith(f"{path} must hold usable records, got none\n")
    assert "1 records, 0 usable" in printed and "must be a whole PNG, " in printed and "ConfigDict" not in printed


def test_samples_that_no_bucket_holds_are_shown_too(folder, capsys):
    path = write_records(folder, {}, {"text_input": "Long. " * 200})
    flags = [f"--config={CONFIG}", "--config.data.image_scale=1", "--config.stages=stage1"]
    assert main([str(path), *flags]) == 1
    page = (folder / "train_check.html").read_text()
    assert "columns of small_looks: " in page and "columns of the suggested bucket_" in page


def test_ctrl_c(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "measure", interrupt)
    assert main([str(MIRAGE)]) == 130
    assert capsys.readouterr().err == "stopped; no page was written\n"


def test_the_settings_of_a_config_are_used(folder, capsys):
    path = write_records(folder, *[{}] * 3)
    flags = [f"--config={CONFIG}", "--config.data.image_scale=2", "--config.latents.latent_size=3"]
    flags += ["--config.data.system=Be brief.", "--config.stages=warm_up", "--config.warm_up.helper_images=encode"]
    flags += [f"--config.data.buckets.many_looks.{side}" for side in ("images=2", "image_tokens=64")]
    assert main([str(path), *flags]) == 0
    printed, _ = capsys.readouterr()
    assert "3 slots per look" in printed and f"Checked with {CONFIG}." in printed
    table = cells(printed, "Per record (warm_up, helper images: encode)")
    assert table["vision tokens, prompt"][0] == "8" and table["vision tokens, answer"][0] == "64"
    sizes = cells(printed, "Images after resizing")
    assert sizes == {"112x56": ["8", "3", "0"], "224x224": ["64", "0", "3"]}
    assert "Be brief." in html.unescape(re.sub(r"<[^>]*>", "", (folder / "train_check.html").read_text()))


def test_a_checkpoint_on_the_hub_is_asked_for_no_weights(folder, capsys, monkeypatch):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    path = write_records(folder, {})
    assert main([str(path), f"--config={REPOSITORY / 'configs' / 'qwen2_5_vl.py'}"]) == 2
    assert asked == [("Qwen/Qwen2.5-VL-7B-Instruct", ["*.json", "*.txt", "*.jinja"])]
    assert "could not be fetched from the hub (no network)" in capsys.readouterr().err


def test_what_goes_to_a_process_and_back_counts_the_same(folder):
    source = MirageSource(write_records(folder, *[{}] * 3, {"text_input": "<|im_end|>"}))
    tokenizer = train_tokenizer(record_texts(source))
    to_sample = functools.partial(
        build_example, tokenizer=tokenizer, special=special_tokens(tokenizer), settings=ExampleSettings()
    )
    views = [View("stage1", "latent", to_sample, {})]
    there = pickle.loads(
        pickle.dumps(list(measurements(source, pickle.loads(pickle.dumps(views)), GEOMETRY, 4, workers=0)))
    )
    here = [one for one in measurements(source, views, GEOMETRY, 4, workers=0)]
    assert here == there and [bool(one.problem) for (one,) in here] == [False, False, False, True]
    survey = Survey(views)
    for number, measured in enumerate(there):
        survey.add(number, measured)
    assert (
        list(survey.samples) == [0, 1, 2]
        and (survey.usable, survey.left_out) == (3, 1)
        and sum(survey.needs().values())[0] == 3
    )
    assert bucket_table("", {}, []).rows == []


def test_markers_that_stay_as_text_are_remarked(folder, capsys):
    path = write_records(folder, {}, {"text_output": "<latent>See<output_image> <img>"}, {"text_input": "<latent>?"})
    assert main([str(path)]) == 0
    printed, _ = capsys.readouterr()
    remarks = [
        "train.jsonl line 2 has <latent>, which stays as text, since it has no image (records with it: 2)",
        "train.jsonl line 2 has <img>, which stays as text, since it has no image (records with it: 1)",
    ]
    assert all(f"\n{remark}\n" in printed for remark in remarks)
    assert all(html.escape(remark, quote=False) in (folder / "train_check.html").read_text() for remark in remarks)


def test_links_out_of_the_folder_are_followed_unless_the_config_refuses_them(folder, capsys):
    path = write_records(folder, {})
    (folder / "data").mkdir()
    for name in ("a.png", "b.png", "train.jsonl"):
        (folder / "data" / name).symlink_to(folder / name)
    assert main(["data/train.jsonl"]) == 0 and (folder / "train_check.html").exists()
    assert main(["data/train.jsonl", "--config.data.follow_links=false"]) == 2
    assert "must stay inside the data folder" in capsys.readouterr().err and path.exists()


def test_long_values_are_cut_on_the_page_and_in_sentences(folder, capsys):
    path = write_records(folder, {"text_input": "<image>" + "word, " * 20_000}, {"image_input": "x" * 10**6})
    assert main([str(path)]) == 1
    printed, _ = capsys.readouterr()
    assert len(printed) < 5000 and len((folder / "train_check.html").read_text()) < 100_000
    assert " more tokens</span>" in (folder / "train_check.html").read_text()
