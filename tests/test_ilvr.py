"""ILVR's JSON-lines format: what is read, and a sentence for everything that is wrong."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ilvr_jax.data.ilvr import IlvrSource, check_map
from ilvr_jax.data.records import BadRecord, Look, Text

REAL_MAPS = Path(__file__).parent / "data" / "vsp_planning" / "test.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ilvr")
    for name in ("a.png", "b.png", "deep/c.png", "../outside.png"):
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(folder / "data" / name)
    os.symlink(folder / "outside.png", folder / "data" / "link.png")
    return folder / "data"


GOOD = {
    "text_input": "Where?",
    "image_input": "a.png",
    "sequence_plan": [{"type": "text", "content": "x"}, {"type": "latent", "helper_image": "b.png"}],
    "original_final_answer": "R",
    "map_desc": [[1, 0], [-1, 2]],
    "level": 2,
}


def write(folder: Path, *lines, name: str = "train.jsonl") -> Path:
    (folder / name).write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return folder / name


def test_a_record_is_read(folder):
    source = IlvrSource(write(folder, GOOD, {**GOOD, "image_input": ["a.png", "deep/c.png"]}))
    record = source[0]
    assert (record.question, record.answer, record.name) == ("Where?", "R", "train.jsonl line 1")
    assert record.images == (folder / "a.png",)
    assert record.steps == (Text("x"), Look(folder / "b.png"))
    assert record.map_desc == ((1, 0), (-1, 2))
    assert source[1].images == (folder / "a.png", folder / "deep" / "c.png")


def test_texts_in_a_row_are_joined_and_looks_are_not(folder):
    look, text = {"type": "latent", "helper_image": "a.png"}, {"type": "text", "content": "é "}
    source = IlvrSource(write(folder, {**GOOD, "sequence_plan": [text, text, look, look, text]}))
    image = Look(folder / "a.png")
    assert source[0].steps == (Text("é é "), image, image, Text("é "))


@given(st.lists(st.tuples(st.text(), st.integers(0, 3)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_lines_are_found_again_whatever_they_hold(folder, contents):
    lines = []
    for text, blank in contents:  # written as UTF-8, with blank lines between
        lines += [json.dumps({**GOOD, "text_input": text}, ensure_ascii=blank % 2 == 0), *[""] * blank]
    (folder / "lines.jsonl").write_bytes("\r\n".join(lines).encode())
    source = pickle.loads(pickle.dumps(IlvrSource(folder / "lines.jsonl")))
    assert [source[index].question for index in range(len(source))] == [text for text, _ in contents]
    numbers = np.cumsum([1] + [1 + blank for _, blank in contents])[:-1]
    assert [source[i].name for i in range(len(source))] == [f"lines.jsonl line {number}" for number in numbers]


def without(*fields: str) -> dict:
    return {name: value for name, value in GOOD.items() if name not in fields}


def plan(*steps) -> dict:
    return {**GOOD, "sequence_plan": list(steps)}


BAD = {
    "[1, 2]": "must be one JSON object, got a list",
    '"text"': "must be one JSON object, got text",
    "{oops": "must be one JSON object in UTF-8, but is not JSON (",
    "[" * 5000: "must be one JSON object in UTF-8, but is not JSON (",
    json.dumps(without("text_input")): 'lacks the field "text_input"; text_input, image_input, sequence_plan',
    json.dumps(without("image_input")): 'lacks the field "image_input"',
    json.dumps(without("sequence_plan")): 'lacks the field "sequence_plan"',
    json.dumps({**GOOD, "text_input": 3}): '"text_input" must be text, got a number',
    json.dumps({**GOOD, "text_input": "\ud800"}): '"text_input" must be Unicode text, got half of a surrogate pair',
    json.dumps({**GOOD, "image_input": "no.png"}): "/data, but 'no.png' cannot be read: No such file",
    json.dumps({**GOOD, "image_input": "deep"}): "/data, but 'deep' is no regular file",
    json.dumps({**GOOD, "image_input": [7]}): '"image_input" must be the path of an image file, got 7',
    json.dumps({**GOOD, "image_input": "a\0.png"}): "Unicode characters without NUL, got 'a\\x00.png'",
    json.dumps({**GOOD, "image_input": "x" * 5000}): "at most 4096 Unicode characters without NUL, got 'xxx",
    json.dumps({**GOOD, "image_input": "../outside.png"}): "must stay inside the data folder",
    json.dumps({**GOOD, "image_input": "deep/../../outside.png"}): "must stay inside the data folder",
    json.dumps({**GOOD, "image_input": "/etc/hostname"}): "must stay inside the data folder",
    json.dumps({**GOOD, "sequence_plan": {}}): '"sequence_plan" must be a list of steps, got an object',
    json.dumps(plan()): '"sequence_plan" must have at least one step, got none',
    json.dumps(plan("x")): 'step 1 of "sequence_plan" must be an object with "type", got text',
    json.dumps(plan({"type": "image"})): 'must have the type "text" or "latent", got \'image\'',
    json.dumps(plan({"content": "x"})): 'must have the type "text" or "latent", got None',
    json.dumps(plan({"type": ["text"]})): 'must have the type "text" or "latent", got [\'text\']',
    json.dumps(plan({"type": "text"})): '"content" of step 1 of "sequence_plan" must be text, got null or missing',
    json.dumps(plan({"type": "latent"})): 'is latent and must have the path of an image in "helper_image", got none',
    json.dumps(plan({"type": "latent", "helper_image": "../outside.png"})): "must stay inside the data folder",
    json.dumps(
        plan({"type": "latent", "helper_image": "no.png"})
    ): 'of step 1 of "sequence_plan" must be an image file in ',
    json.dumps({**GOOD, "map_desc": [[0, 0], [-1, 2]]}): '"map_desc" must have one start (1), got 0',
    json.dumps({**GOOD, "map_desc": [[1, 1], [-1, 2]]}): '"map_desc" must have one start (1), got 2',
    json.dumps({**GOOD, "map_desc": [[1, 0], [-1, 0]]}): '"map_desc" must have one goal (2), got 0',
    json.dumps({**GOOD, "map_desc": [[1, 0], [2]]}): '"map_desc" must have rows of equal length, got 2, 1 cells',
    json.dumps({**GOOD, "map_desc": [[1, 0], [2, 5]]}): "must have cells of 1 start, 2 goal, -1 hole and 0 ice, got 5",
    json.dumps(
        {**GOOD, "map_desc": [[1, True], [2, 0]]}
    ): "must have cells of 1 start, 2 goal, -1 hole and 0 ice, got True",
    json.dumps({**GOOD, "map_desc": "12"}): '"map_desc" must be rows of 1 start',
    json.dumps({**GOOD, "map_desc": []}): '"map_desc" must be rows of 1 start',
    json.dumps({**GOOD, "map_desc": [[], []]}): '"map_desc" must have rows of equal length, got 0, 0 cells',
}


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_named_and_explained(folder, line):
    with pytest.raises(BadRecord) as caught:
        IlvrSource(write(folder, GOOD, line, GOOD, name="bad.jsonl"))
    assert str(caught.value).startswith("bad.jsonl line 2: ")
    assert BAD[line] in str(caught.value) and "\n" not in str(caught.value)


def test_bad_lines_can_be_left_out_and_are_counted(folder):
    source = IlvrSource(write(folder, GOOD, *BAD, GOOD), on_bad_record="skip")
    assert [record.name for record in source] == ["train.jsonl line 1", f"train.jsonl line {len(BAD) + 2}"]
    assert len(source) == 2 and len(source.skipped) == len(BAD)
    assert source.skipped[0].startswith("train.jsonl line 2: ")


def test_bytes_that_are_no_text(folder):
    (folder / "latin.jsonl").write_bytes(json.dumps(GOOD).replace("Where", "O\xf9").encode("latin-1"))
    with pytest.raises(BadRecord, match="latin.jsonl line 1: must be one JSON object in UTF-8, but is not JSON"):
        IlvrSource(folder / "latin.jsonl")


def test_missing_and_empty_files(folder):
    with pytest.raises(
        BadRecord, match="nothing.jsonl must be a file of records, but cannot be read: No such file or directory"
    ):
        IlvrSource(folder / "nothing.jsonl")
    with pytest.raises(BadRecord, match="train.jsonl must hold a JSON object a line, or an array of them, got none"):
        IlvrSource(write(folder, "", ""))


def test_another_root(folder):
    path = write(folder.parent, GOOD)
    with pytest.raises(BadRecord, match="cannot be read: No such file or directory"):
        IlvrSource(path)
    assert IlvrSource(path, root=folder)[0].images == (folder / "a.png",)


def test_the_real_evaluation_file():
    path = REAL_MAPS
    source = IlvrSource(path, plan_required=False)
    assert len(source) == 200
    assert source[0].map_desc == ((0, 2, 0), (0, 0, 0), (0, 1, 0))
    assert source[0].steps == () and source[199].images[0].name.startswith("level6")
    with pytest.raises(BadRecord, match='test.jsonl line 1: lacks the field "sequence_plan"'):
        IlvrSource(path)


def test_maps_come_back_as_tuples():
    assert check_map([[1, 2]]) == ((1, 2),)
