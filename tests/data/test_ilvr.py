"""ILVR's JSON-lines format: records, and a sentence for each kind of bad input."""

import base64
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ilvr_jax.data import json_lines
from ilvr_jax.data.formats import find_format
from ilvr_jax.data.frozen_lake.source import read_maps
from ilvr_jax.data.ilvr import IlvrSource, check_map
from ilvr_jax.data.records import BadRecord, Look, Text

REAL_MAPS = Path(__file__).parent / "vsp_planning" / "test.jsonl"


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
    json.dumps(without("text_input")): 'must have the fields text_input, image_input, sequence_plan, but lacks "text',
    json.dumps(without("image_input")): 'sequence_plan, but lacks "image_input"',
    json.dumps(without("sequence_plan")): 'sequence_plan, but lacks "sequence_plan"',
    json.dumps({**GOOD, "text_input": 3}): '"text_input" must be text, got a number',
    json.dumps({**GOOD, "text_input": "\ud800"}): '"text_input" must be Unicode text, got half of a surrogate pair',
    json.dumps({**GOOD, "image_input": "no.png"}): "/data, but 'no.png' cannot be read: No such file",
    json.dumps({**GOOD, "image_input": "deep"}): "/data, but 'deep' is not a regular file",
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


def test_bad_lines_can_be_skipped(folder):
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
    with pytest.raises(BadRecord, match="train.jsonl must hold a JSON object per line, or an array of objects, got"):
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
    with pytest.raises(
        BadRecord,
        match='test.jsonl line 1: must have the fields .*, but lacks "sequence_plan"',
    ):
        IlvrSource(path)


def test_maps_come_back_as_tuples():
    assert check_map([[1, 2]]) == ((1, 2),)


@pytest.fixture
def elsewhere(tmp_path):
    """Return a data set as a hub's cache keeps it: files are links to blobs, and a folder is one to another disk."""
    revision = tmp_path / "snapshots" / "0123"
    for folder in (revision / "images", tmp_path / "blobs", tmp_path / "disk"):
        folder.mkdir(parents=True)
    for place in ("blobs/abc", "disk/b.png", "disk.png"):
        Image.new("RGB", (28, 28)).save(tmp_path / place, "png")
    (revision / "images" / "a.png").symlink_to("../../../blobs/abc")
    (revision / "disk").symlink_to(tmp_path / "disk")
    line = GOOD | {"image_input": "images/a.png", "sequence_plan": plan_of("disk/b.png")}
    (tmp_path / "blobs" / "def").write_text(json.dumps(line))
    (revision / "train.jsonl").symlink_to("../../blobs/def")
    return revision / "train.jsonl"


def plan_of(image: str) -> list[dict]:
    return [{"type": "text", "content": "x"}, {"type": "latent", "helper_image": image}]


def test_links_of_the_owner_are_followed(elsewhere):
    record = IlvrSource(elsewhere)[0]
    assert record.images == (elsewhere.parent / "images" / "a.png",)
    assert record.steps[1] == Look(elsewhere.parent / "disk" / "b.png")
    with pytest.raises(
        BadRecord, match='line 1: "image_input" must stay inside .*, since data.follow_links is false, '
    ):
        IlvrSource(elsewhere, follow_links=False)
    inside = elsewhere.with_name("inside.png")
    Image.new("RGB", (28, 28)).save(inside)
    inside.with_name("too.png").symlink_to("inside.png")
    path = write(
        elsewhere.parent, GOOD | {"image_input": "too.png", "sequence_plan": plan_of("inside.png")}, name="x.json"
    )
    assert IlvrSource(path, follow_links=False)[0].images == (inside.with_name("too.png"),)


@pytest.mark.parametrize("path", ["../disk.png", "disk/../../disk.png", "disk/../../../disk.png", "images/../../x"])
def test_no_path_leaves_the_folder_by_its_text(elsewhere, path):
    line = GOOD | {"image_input": path, "sequence_plan": plan_of("images/a.png")}
    with pytest.raises(BadRecord, match='"image_input" must stay inside the data folder'):
        IlvrSource(write(elsewhere.parent, line, name="x.jsonl"))


def test_a_step_back_after_a_link_stays_in_the_folder(elsewhere):
    # The file system would take it as one from the folder that the link leads to.
    line = GOOD | {"image_input": "disk/../images/a.png", "sequence_plan": plan_of("images/a.png")}
    record = IlvrSource(write(elsewhere.parent, line, name="x.jsonl"))[0]
    assert record.images == (elsewhere.parent / "images" / "a.png",)
    absolute = GOOD | {
        "image_input": str(elsewhere.parent / "images" / "a.png"),
        "sequence_plan": plan_of("images/a.png"),
    }
    assert IlvrSource(write(elsewhere.parent, absolute, name="x.jsonl"))[0].images == record.images


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_files_that_are_no_regular_ones(folder, tmp_path, make):
    make(tmp_path / "a.png")
    with pytest.raises(
        BadRecord, match="x.jsonl line 1: \"image_input\" must be an image file .*'a.png' is not a regular"
    ):
        IlvrSource(write(tmp_path, GOOD, name="x.jsonl"))
    make(tmp_path / "train.jsonl")
    for read in (IlvrSource, find_format, lambda path: next(iter(read_maps(path)))):
        if read is find_format and make is os.mkdir:
            continue  # a folder may hold parquet files
        with pytest.raises(
            BadRecord, match="train.jsonl must be a file of records, but cannot be read: is not a regular"
        ):
            read(tmp_path / "train.jsonl")


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "a.png").symlink_to("gone.png")
    with pytest.raises(BadRecord, match="'a.png' is a link to nothing"):
        IlvrSource(write(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("value", "answer"),
    [(3, "3"), (-2.5, "-2.5"), (3.0, "3"), (1e30, "1e+30"), (True, "true"), (False, "false"), (["B"], "B"), ([4], "4")]
    + [("", ""), (None, None), ([None], None)],
)
def test_answers_that_are_no_text(folder, value, answer):
    assert IlvrSource(write(folder, GOOD | {"original_final_answer": value}))[0].answer == answer


@pytest.mark.parametrize("value", [["A", "B"], [], {"a": 1}, [["A"]], float("nan"), float("inf"), 10**400, ["\ud800"]])
def test_answers_that_are_none(folder, value):
    with pytest.raises(BadRecord, match='^train.jsonl line 1: "original_final_answer" must be '):
        IlvrSource(write(folder, GOOD | {"original_final_answer": value}))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_array_in_place_of_lines(folder, indent, mark):
    lines = [GOOD | {"text_input": text} for text in ("a", 'b]}, "{[\\', "ü🦊")]
    path = folder / "array.json"
    path.write_text(f"{mark}\n {json.dumps(lines, indent=indent, ensure_ascii=False)}\n\n", encoding="utf-8")
    source = pickle.loads(pickle.dumps(IlvrSource(path)))
    assert [(record.name, record.question) for record in source] == [
        (f"array.json record {number}", line["text_input"]) for number, line in enumerate(lines, start=1)
    ]
    path.write_text(mark + json.dumps([lines[0], {"text_input": 3}, 7, *lines[1:]], indent=indent), encoding="utf-8")
    with pytest.raises(BadRecord, match='^array.json record 2: must have the fields .*, but lacks "image_input"'):
        IlvrSource(path)
    source = IlvrSource(path, on_bad_record="skip")
    assert [record.name[-1] for record in source] == ["1", "4", "5"]
    assert source.skipped[1] == "array.json record 3: must be one JSON object, got a number"
    assert find_format(path) == "ilvr"
    path.write_text(json.dumps(lines, indent=indent)[:-30])  # cut off
    source = IlvrSource(path, on_bad_record="skip")
    assert len(source) == 2 and source.skipped[0].startswith("array.json record 3: must be one JSON object in UTF-8")
    path.write_text("[]")
    with pytest.raises(BadRecord, match="array.json must hold a JSON object per line, or an array of objects, got"):
        IlvrSource(path)


def test_objects_over_several_lines_and_a_byte_order_mark(folder):
    texts = [json.dumps(GOOD | {"text_input": text}, indent=1) for text in "ab"]
    (folder / "x.json").write_text("\n".join(texts))
    assert [(record.name, record.question) for record in IlvrSource(folder / "x.json")] == [
        ("x.json record 1", "a"),
        ("x.json record 2", "b"),
    ]
    (folder / "x.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert IlvrSource(folder / "x.jsonl")[0].name == "x.jsonl line 2"


def test_images_as_data_uris(folder):
    content = (folder / "a.png").read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    line = GOOD | {"image_input": [uri, "a.png"], "sequence_plan": plan_of(uri.replace("data:image/png", "Data:"))}
    record = IlvrSource(write(folder, line))[0]
    assert record.images == (content, folder / "a.png") and record.steps[1] == Look(content)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("data:image/png;base64,@@@@", "must be a data URI of valid base64, got 'data:image/png;base64,@@@@' ("),
        ("data:image/png;base64,QUI", "must be a data URI of valid base64"),
        ("data:image/png;base64,", "must be a data URI with the content of an image"),
        ("data:image/svg+xml,%3Csvg/%3E", "must be a data URI such as data:image/png;base64,..."),
        ("data:" + "x" * 10**6, "must be a data URI such as"),
        ("file:///data/a.png", "must be a path in the data folder or a data URI, got the address 'file:///data/a.png'"),
        ("https://example.org/a.png", "must be a path in the data folder or a data URI, got the address"),
        ("a/" * 500_000, "must be a path of at most 4096 Unicode characters"),
        ("a" * 300 + ".png", "cannot be read: File name too long"),
        (["a.png"] * 1001, "must list at most 1000 images, got 1001"),
        (["a.png", ["a.png"]], "must be the path of an image file, got ['a.png']"),
    ],
)
def test_images_that_are_none(folder, path, sentence):
    with pytest.raises(BadRecord) as caught:
        IlvrSource(write(folder, GOOD | {"image_input": path}))
    assert str(caught.value).startswith('train.jsonl line 1: "image_input" ') and sentence in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_that_change_after_they_were_opened(folder):
    lines = [GOOD | {"text_input": text} for text in "abc"]
    path = write(folder, *lines, name="changing.jsonl")
    source = IlvrSource(path)
    write(folder, lines[0], lines[1] | {"text_input": "z"}, name="changing.jsonl")
    assert source[0].question == "a"
    for index in (1, 2):
        with pytest.raises(BadRecord, match=f"^changing.jsonl line {index + 1}: has changed since the file was opened"):
            source[index]
    path.unlink()
    with pytest.raises(BadRecord, match="^changing.jsonl line 1: the file cannot be read again: No such file"):
        source[0]


@pytest.mark.parametrize(
    ("question", "images", "read"),
    [
        ("<image_1> or <image_2>?", "ab", ("<image> or <image>?", "ab")),
        ("<image 2> or <Image 1>?", "ab", ("<image> or <image>?", "ba")),
        ("<image1>, <|image_2|>", "ab", ("<image>, <image>", "ab")),
        ("<image_0> or <image_1>?", "ab", ("<image> or <image>?", "ab")),
        ("<image_1>: is <image_1> <image_2>?", "ab", ("<image>: is <image> <image>?", "aab")),
        ("<image>?", "a", ("<image>?", "a")),
        ("<image_1> or <image_3>?", "ab", '"text_input" must have a marker such as <image_1> for each of its 2 images'),
        ("<image_1>?", "ab", "got the numbers 1"),
        ("<image_1>?", "", "for each of its 0 images"),
        ("<image> or <image_2>?", "ab", '"text_input" must have <image> or markers with numbers, got both (<image_2>)'),
    ],
)
def test_numbered_markers_are_read(folder, question, images, read):
    line = GOOD | {"text_input": question, "image_input": [f"{name}.png" for name in images]}
    if isinstance(read, str):
        with pytest.raises(BadRecord) as caught:
            IlvrSource(write(folder, line))
        assert read in str(caught.value)
    else:
        record = IlvrSource(write(folder, line))[0]
        assert record.question == read[0] and [image.stem for image in record.images] == list(read[1])


def test_markers_that_stay_as_text_are_remarked(folder):
    texts = (
        "See <output_image> and <img>.",
        "<output_image>",
        "a < b, <i> and <b>",
        "In <image_2>, <image 1> and <latent>.",
    )
    lines = [GOOD | {"sequence_plan": [{"type": "text", "content": text}]} for text in texts]
    remarks = IlvrSource(write(folder, *lines, GOOD | {"text_input": "<image/>?"})).remarks
    assert [remark.partition(", which stays as text")[0] for remark in remarks] == [
        "train.jsonl line 1 has <output_image>",
        "train.jsonl line 1 has <img>",
        "train.jsonl line 4 has <image_2>",
        "train.jsonl line 4 has <image 1>",
        "train.jsonl line 4 has <latent>",
        "train.jsonl line 5 has <image/>",
    ]
    assert "(records with it: 2)" in remarks[0] and IlvrSource(write(folder, GOOD)).remarks == []


def test_evaluation_needs_questions_and_answers_alone(folder):
    lines = [without("sequence_plan"), GOOD | {"sequence_plan": plan_of("gone.png")}, GOOD | {"sequence_plan": None}]
    source = IlvrSource(write(folder, *lines), for_evaluation=True)
    assert [record.steps for record in source] == [(), (Text("x"),), ()] and source[1].answer == "R"
    with pytest.raises(BadRecord, match='line 1: "image_input" must be an image file'):
        IlvrSource(write(folder, GOOD | {"image_input": "gone.png"}), for_evaluation=True)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text_input": "a", "text_input": "b"}', "must have each field once, got 'text_input' again"),
        ('{"n": [' + "[]," * 2**20 + "[]]}", "must hold at most 1048576 values, got more"),
        (json.dumps(GOOD | {"text_input": "x" * 1_000_001}), "must have at most 1000000 characters, got 1000001"),
        (json.dumps({**GOOD, "sequence_plan": [{"type": "text", "content": "x" * 2**19}] * 2}), "must have at most"),
        ('{"n": ' + "9" * 5000 + "}", "is not JSON (Exceeds the limit"),
    ],
    ids=["twice", "values", "text", "texts", "digits"],
)
def test_lines_that_are_too_much(folder, line, sentence):
    with pytest.raises(BadRecord) as caught:
        IlvrSource(write(folder, GOOD, line))
    assert str(caught.value).startswith("train.jsonl line 2: ") and sentence in str(caught.value)


def test_a_line_of_many_megabytes_takes_little_memory(folder, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST_RECORD", 2**20)
    path = write(folder, GOOD, '{"text_input": "' + "x" * 2**24 + '"}', GOOD)
    tracemalloc.start()
    source = IlvrSource(path, on_bad_record="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [record.name for record in source] == ["train.jsonl line 1", "train.jsonl line 3"] and peak < 2**22
    assert source.skipped == ["train.jsonl line 2: must have at most 1 MB, got more"]
