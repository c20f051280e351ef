"""Mirage's JSON-lines format: records, and a sentence for each kind of bad input."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ilvr_jax.data.mirage import MirageSource
from ilvr_jax.data.records import BadRecord, Look, Text

REAL = Path(__file__).parent / "mirage"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mirage") / "data"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png", "../outside.png"):
        Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(folder / name)
    return folder


GOOD = {
    "text_input": "Here is the map: <image> Where?",
    "image_input": "a.png",
    "image_output": "b.png",
    "text_output": "Look: <output_image>there.",
}


def write(folder: Path, *lines: dict | str, name: str = "train.jsonl") -> Path:
    (folder / name).write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return folder / name


def test_a_record_is_read(folder):
    record = MirageSource(write(folder, GOOD))[0]
    assert record.question == "Here is the map: <image> Where?" and record.images == (folder / "a.png",)
    assert record.steps == (Text("Look: "), Look(folder / "b.png"), Text("there."))
    assert (record.answer, record.map_desc, record.name) == (None, None, "train.jsonl line 1")


def test_lists_of_images_and_questions_without_markers(folder):
    output = {
        "image_output": ["b.png", "c.png", "b.png"],
        "text_output": "<output_image><output_image> x <output_image>",
    }
    source = MirageSource(
        write(
            folder,
            {**GOOD, **output, "image_input": ["a.png", "b.png"], "text_input": "Which?"},
            {**GOOD, "image_input": [], "text_input": "Two and two?", "image_output": [], "text_output": "Four."},
        )
    )
    b, c = Look(folder / "b.png"), Look(folder / "c.png")
    assert source[0].question == "Which?" and source[0].images == (folder / "a.png", folder / "b.png")
    assert source[0].steps == (b, c, Text(" x "), b)
    assert source[1].images == () and source[1].steps == (Text("Four."),)


def test_the_real_examples_are_read():
    source = MirageSource(REAL / "sample.jsonl")
    assert len(source) == 3
    for record in source:
        assert record.question.count("<image>") == 1 and len(record.images) == 1
        kinds = [type(step) for step in record.steps]
        assert kinds == [Text, Look, Text]
        assert record.steps[0].content.startswith("<think> ") and record.steps[0].content.endswith(" </think>")
        assert record.steps[2].content.endswith("The answer is \\boxed{C}.")
        paths = [record.images[0], record.steps[1].helper_image]
        assert all(path.is_relative_to(REAL.resolve()) and path.is_file() for path in paths)
        assert paths[0] != paths[1]


# Texts with pieces of markers in them: only whole markers count.
texts = st.one_of(st.text(max_size=8), st.sampled_from(["<output_image", "output_image>", "<", ">", "<image>", "\n"]))
plans = st.lists(st.one_of(texts.map(Text), st.sampled_from(["a.png", "b.png", "c.png"]).map(Look)), max_size=8)


def joined(steps: list[Text | Look]) -> list[Text | Look]:
    """Return the steps with texts that follow each other joined and empty ones dropped."""
    result: list[Text | Look] = []
    for step in steps:
        if isinstance(step, Text) and result and isinstance(result[-1], Text):
            step = Text(result.pop().content + step.content)
        if step != Text(""):
            result.append(step)
    return result


@given(plans.map(joined).filter(bool), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_interleaving_of_texts_and_looks_comes_back(folder, steps, ascii_only):
    assume(not any(isinstance(step, Text) and "<output_image>" in step.content for step in steps))
    fields = {
        **GOOD,
        "image_output": [step.helper_image for step in steps if isinstance(step, Look)],
        "text_output": "".join(step.content if isinstance(step, Text) else "<output_image>" for step in steps),
    }
    path = folder / "any.jsonl"
    path.write_text(json.dumps(fields, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    source = pickle.loads(pickle.dumps(MirageSource(path)))
    expected = [Look(folder / step.helper_image) if isinstance(step, Look) else step for step in steps]
    assert list(source[0].steps) == expected


BAD = [
    ("{oops", "must be one JSON object in UTF-8, but is not JSON ("),
    ("[]", "must be one JSON object, got a list"),
    (
        {name: value for name, value in GOOD.items() if name != "text_output"},
        'must have the fields text_input, image_input, text_output, but lacks "text_output"',
    ),
    (
        {**GOOD, "text_output": "No marker."},
        '"text_output" must have one <output_image> for each of the 1 images of "image_output", got 0',
    ),
    (
        {**GOOD, "image_output": ["b.png", "c.png"]},
        'one <output_image> for each of the 2 images of "image_output", got 1',
    ),
    ({**GOOD, "image_output": []}, 'for each of the 0 images of "image_output", got 1'),
    (
        {**GOOD, "text_input": "<image> or <image>?"},
        '"text_input" must have one <image> for each of the 1 images of "image_input", or none at all, got 2',
    ),
    ({**GOOD, "text_output": 3}, '"text_output" must be text, got a number'),
    ({**GOOD, "text_output": "", "image_output": []}, '"text_output" must be text, got an empty one'),
    ({**GOOD, "image_output": None}, 'for each of the 0 images of "image_output", got 1'),
    ({**GOOD, "image_output": "no.png"}, '"image_output" must be an image file in '),
    ({**GOOD, "image_output": "../outside.png"}, "must stay inside the data folder"),
    (
        {**GOOD, "image_input": {"path": "a.png"}},
        "must be the path of an image file, got {'path': 'a.png'}",
    ),
]


@pytest.mark.parametrize(("line", "sentence"), BAD)
def test_bad_lines_are_named_and_explained(folder, line, sentence):
    with pytest.raises(BadRecord) as caught:
        MirageSource(write(folder, GOOD, line, GOOD, name="bad.jsonl"))
    assert str(caught.value).startswith("bad.jsonl line 2: ")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_bad_lines_can_be_skipped(folder):
    lines = [GOOD, *(line for line, _ in BAD), GOOD]
    source = MirageSource(write(folder, *lines), on_bad_record="skip")
    assert [record.name for record in source] == ["train.jsonl line 1", f"train.jsonl line {len(lines)}"]
    assert len(source.skipped) == len(BAD)
    for sentence, (_, part) in zip(source.skipped, BAD, strict=True):
        assert part in sentence


def test_missing_files_and_another_root(folder):
    with pytest.raises(BadRecord, match="nothing.jsonl must be a file of records, but cannot be read: No such file"):
        MirageSource(folder / "nothing.jsonl")
    with pytest.raises(BadRecord, match="got none"):
        MirageSource(write(folder, ""))
    path = write(folder.parent, GOOD)
    assert MirageSource(path, root=folder)[0].images == (folder / "a.png",)


def test_null_and_absent_fields_of_images(folder):
    line = {**GOOD, "text_input": "Two and two?", "image_input": None, "text_output": "Four."}
    absent = {name: value for name, value in line.items() if name != "image_output"}
    for fields in (line | {"image_output": None}, absent, line | {"image_output": []}):
        record = MirageSource(write(folder, fields))[0]
        assert record.images == () and record.steps == (Text("Four."),)


def test_numbered_markers_are_read(folder):
    output = {"image_output": ["b.png", "c.png"], "text_output": "<output_image_2>x<output_image 1>y<output_image2>"}
    record = MirageSource(write(folder, GOOD | output))[0]
    b, c = Look(folder / "b.png"), Look(folder / "c.png")
    assert record.steps == (c, Text("x"), b, Text("y"), c)
    with pytest.raises(BadRecord, match='line 1: "text_output" must have a marker such as <output_image_1> for each'):
        MirageSource(write(folder, GOOD | {"text_output": "<output_image_1><output_image_2>"}))
    remarks = MirageSource(write(folder, GOOD | {"text_output": "In <image_1>: <output_image>"})).remarks
    assert len(remarks) == 1 and remarks[0].startswith("train.jsonl line 1 has <image_1>, which stays as text")


def test_evaluation_needs_no_helper_images(folder):
    line = GOOD | {"image_output": "gone.png", "text_output": "Look: <output_image_1>there<output_image>."}
    record = MirageSource(write(folder, line), for_evaluation=True)[0]
    assert record.steps == (Text("Look: there."),) and record.images == (folder / "a.png",)
