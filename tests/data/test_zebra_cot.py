"""Zebra-CoT's parquet format: records, how little of a file is read, and a sentence for each kind of bad input."""

import multiprocessing
import os
import pickle
import threading

import grain
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ilvr_jax.data.pipeline import shuffled_numbers
from ilvr_jax.data.records import BadRecord, Look, Text
from ilvr_jax.data.zebra_cot import OPEN_GROUPS, ZebraCotSource
from tests.zebra_cot import COLUMNS, IMAGE, TEXTS, mark, row, write

GOOD = row(
    f"Is {mark('problem_image_1')} a cat?",
    f"THOUGHT 0: see\n{mark('reasoning_image_1')}\nTHOUGHT 1: so",
    "yes",
    problem_image_1=b"a cat",
    reasoning_image_1=b"its ear",
)


def numbered(number: int) -> dict:
    """Return a row whose text and images tell its number; every second one has a second look."""
    trace, images = f"see {mark('reasoning_image_1')}", {"reasoning_image_1": b"look %d" % number}
    if number % 2:
        trace, images = trace + mark("reasoning_image_2"), images | {"reasoning_image_2": b"again %d" % number}
    return row(f"{number}: {mark('problem_image_1')}", trace, problem_image_1=b"image %d" % number, **images)


@pytest.fixture
def reads(monkeypatch):
    """Return the list of what is read from parquet files: row group and columns of each read."""
    made, read = [], pq.ParquetFile.read_row_group

    def record(self, i, columns=None, use_threads=True, **options):
        made.append((i, tuple(columns)))
        return read(self, i, columns=columns, use_threads=use_threads, **options)

    for whole in ("read", "read_row_groups", "iter_batches"):
        monkeypatch.delattr(pq.ParquetFile, whole)  # no other way in
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", record)
    return made


def test_a_record_is_read(tmp_path):
    record = ZebraCotSource(write(tmp_path / "train.parquet", [GOOD]))[0]
    assert record.question == "Is <image> a cat?" and record.images == (b"a cat",)
    assert record.steps == (
        Text("THOUGHT 0: see\n"),
        Look(b"its ear"),
        Text("\nTHOUGHT 1: so\n\nFinal Answer: yes"),
    )
    assert (record.answer, record.name) == ("yes", "train.parquet row 0")


def test_images_follow_their_markers(tmp_path):
    images = {name: name.encode() for name in COLUMNS}
    trace = "".join(map(mark, ("reasoning_image_3", "problem_image_2", "reasoning_image_1", "reasoning_image_2")))
    question = f"{mark('problem_image_2')}, {mark('problem_image_1')}, {mark('problem_image_2')}"
    record = ZebraCotSource(write(tmp_path / "train.parquet", [row(question, trace, None, **images)]))[0]
    assert record.question == "<image>, <image>, <image>"
    assert record.images == (b"problem_image_2", b"problem_image_1", b"problem_image_2")
    looks = (b"reasoning_image_3", b"problem_image_2", b"reasoning_image_1", b"reasoning_image_2")
    assert record.steps == tuple(map(Look, looks)) and record.answer is None


def test_questions_without_images_and_columns_of_nulls(tmp_path):
    rows = [row("2 + 2?", "It is 4.", " 4 "), row("3 + 3?", "It is 6.", "")]
    record, other = ZebraCotSource(write(tmp_path / "train.parquet", rows))
    assert (record.question, record.images, record.answer) == ("2 + 2?", (), "4")
    assert record.steps == (Text("It is 4.\n\nFinal Answer: 4"),)
    assert other.steps == (Text("It is 6."),) and other.answer is None
    untyped = pa.table({name: [rows[0][name]] for name in TEXTS} | {"problem_image_1": pa.nulls(1)})
    pq.write_table(untyped, tmp_path / "untyped.parquet")
    assert ZebraCotSource(tmp_path / "untyped.parquet")[0].images == ()


def test_a_folder_of_files_with_their_own_columns(tmp_path):
    write(tmp_path / "chess" / "train-1.parquet", [numbered(3), numbered(4)], columns=(*COLUMNS, "reasoning_image_40"))
    write(tmp_path / "chess" / "train-0.parquet", [numbered(0), numbered(1), numbered(2)], group=2)
    write(tmp_path / "sums.parquet", [row("2 + 2?", "4")], columns=())
    (tmp_path / "README.md").write_text("no data")
    source = ZebraCotSource(tmp_path)
    names = [record.name for record in source]
    assert names == [
        *(f"chess/train-0.parquet row {number}" for number in range(3)),
        *(f"chess/train-1.parquet row {number}" for number in range(2)),
        "sums.parquet row 0",
    ]
    assert [record.question for record in source][:5] == [f"{number}: <image>" for number in range(5)]


def test_opening_reads_no_image_and_a_record_its_own_row_group_once(tmp_path, reads):
    path = write(tmp_path / "train.parquet", [numbered(number) for number in range(40)], group=8)
    source = ZebraCotSource(path)
    assert [group for group, _ in reads] == [0, 1, 2, 3, 4]
    assert {column for _, columns in reads for column in columns} == {*TEXTS, *(f"{name}.path" for name in COLUMNS)}

    reads.clear()
    assert source[18].images == (b"image 18",) and source[18].steps[1] == Look(b"look 18")
    marked = ("problem_image_1", "reasoning_image_1")  # those that the row's markers name
    assert sorted(reads) == sorted((2, (column,)) for column in (*TEXTS, *marked))

    reads.clear()
    assert source[19].steps[2] == Look(b"again 19") and source[20].images == (b"image 20",)
    assert reads == [(2, ("reasoning_image_2",))]

    source = ZebraCotSource(path)
    reads.clear()
    assert [record.question for record in source] == [f"{number}: <image>" for number in range(40)]
    assert len(reads) == len(set(reads)) == 5 * (len(TEXTS) + 3)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_epoch_reads_a_row_group_once_in_each_process(tmp_path, reads, workers):
    rows = [numbered(number) for number in range(200)]
    write(tmp_path / "0.parquet", rows[:110], group=10)
    write(tmp_path / "1.parquet", rows[110:], group=10)
    source = ZebraCotSource(tmp_path)
    order = shuffled_numbers(source, seed=5)
    for worker in range(workers):
        reads.clear()
        for position in range(worker, 400, workers):
            assert source[order[position]].question == f"{order[position]}: <image>"
        assert len(reads) <= 2 * 20 * (len(TEXTS) + 3)  # two epochs of 20 row groups


def test_epochs_shuffle_row_groups_and_their_rows(tmp_path):
    rows = [numbered(number) for number in range(200)]
    rows[17] = row("no trace", "")
    source = ZebraCotSource(write(tmp_path / "train.parquet", rows, group=10), on_bad_record="skip")
    epochs = ((0, 0), (0, 1), (1, 0))  # seed, epoch
    orders = [[shuffled_numbers(source, seed)[199 * epoch + i] for i in range(199)] for seed, epoch in epochs]
    for order in orders:
        assert sorted(order) == list(range(199))
        groups = [int(source[number].name.split()[-1]) // 10 for number in order]
        assert len(set(groups[:39])) == OPEN_GROUPS and len(set(groups[:10])) > 1
        assert sorted(set(groups)) != list(dict.fromkeys(groups))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_processes_and_threads_read_for_themselves(tmp_path):
    path = write(tmp_path / "train.parquet", [numbered(number) for number in range(24)], group=4)
    source = ZebraCotSource(path)
    records = list(source)  # a row group is kept when the source is copied
    copy = pickle.dumps(source)
    assert len(copy) < 5000 and list(pickle.loads(copy)) == records

    flags.FLAGS.mark_as_parsed()  # grain asks absl's flags for debug settings before it starts a worker
    mapped = grain.MapDataset.range(24).map(source.__getitem__).to_iter_dataset()
    assert list(mapped.mp_prefetch(grain.MultiprocessingOptions(num_workers=2))) == records

    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=lambda: queue.put(list(source)))
    child.start()
    assert queue.get(timeout=60) == records
    child.join()

    results = []
    threads = [threading.Thread(target=lambda: results.append(list(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [records] * 4


# Texts with pieces of markers in them: only whole markers count.
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["<image_start", "[reasoning_image_1]", "image_end>", "[", "]", "<", ">", "THOUGHT 0:\n"]),
)
plans = st.lists(st.one_of(texts, st.integers(0, 11)), max_size=12)


def steps_of(plan: list[str | int], images: dict[str, bytes]) -> list[Text | Look]:
    """Return the steps that a plan of texts and images' numbers means, texts joined and empty ones dropped."""
    steps: list[Text | Look] = []
    for part in plan:
        step = Text(part) if isinstance(part, str) else Look(images[f"reasoning_image_{part + 1}"])
        if isinstance(step, Text) and steps and isinstance(steps[-1], Text):
            step = Text(steps.pop().content + step.content)
        if step != Text(""):
            steps.append(step)
    return steps


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zebra")


@given(plans, st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_interleaving_of_texts_and_images_comes_back(module_folder, plan, asked):
    images = {f"reasoning_image_{n + 1}": b"look %d" % n for n in plan if isinstance(n, int)}
    images |= {f"problem_image_{n + 1}": b"image %d" % n for n in range(len(asked) - 1)}
    steps = steps_of([*plan, "\n\nFinal Answer: 7"], images)
    contents = [step.content for step in steps if isinstance(step, Text)]
    assume(not any(half in text for text in [*contents, *asked] for half in ("<image_start>", "<image_end>")))
    assume(not any("<image>" in text for text in asked))
    trace = "".join(part if isinstance(part, str) else mark(f"reasoning_image_{part + 1}") for part in plan)
    question = "".join((mark(f"problem_image_{number}") if number else "") + text for number, text in enumerate(asked))
    assume(trace and question)
    path = write(module_folder / "any.parquet", [row(question, trace, "7", **images)], columns=tuple(images))
    record = ZebraCotSource(path)[0]
    assert list(record.steps) == steps
    assert record.question == "<image>".join(asked)
    assert record.images == tuple(b"image %d" % number for number in range(len(asked) - 1))


BAD = [
    (
        GOOD | {"reasoning_image_1": None},
        "must have an image for every marker, got none in 'reasoning_image_1'",
    ),
    (
        GOOD | {"Text Reasoning Trace": f"see {mark('reasoning_image_9')}"},
        "must have an image for every marker, got none in 'reasoning_image_9'",
    ),
    (GOOD | {"problem_image_1": None}, "must have an image for every marker, got none in 'problem_image_1'"),
    (
        GOOD | {"Text Reasoning Trace": "seen"},
        "must have a marker <image_start>[reasoning_image_1]<image_end> for its image, got none",
    ),
    (
        GOOD | {"problem_image_2": {"bytes": b"dog", "path": "dog.png"}},
        f"must have a marker {mark('problem_image_2')}",
    ),
    (
        GOOD | {"Question": "Is [problem_image_1] a cat?"},
        f"must have a marker {mark('problem_image_1')}",
    ),
    (
        GOOD | {"Question": GOOD["Question"] + mark("reasoning_image_1")},
        "\"Question\" must mark images named problem_image_1, ..., got 'reasoning_image_1'",
    ),
    (
        GOOD | {"Question": "Is <image> a cat?"},
        '"Question" must mark images by <image_start>[problem_image_1]<image_end>, got <i',
    ),
    (
        GOOD | {"Text Reasoning Trace": GOOD["Text Reasoning Trace"] + "<image_start>reasoning_image_1<image_end>"},
        '"Text Reasoning Trace" must have markers such as <image_start>[reasoning_image_1]<image_end>, got a lone ',
    ),
    (GOOD | {"Question": None}, '"Question" must be text, got null or an empty one'),
    (GOOD | {"Text Reasoning Trace": ""}, '"Text Reasoning Trace" must be text, got null or an empty one'),
]


@pytest.mark.parametrize(("bad", "sentence"), BAD)
def test_bad_rows_are_named_and_explained(tmp_path, bad, sentence):
    write(tmp_path / "bad.parquet", [GOOD, GOOD, GOOD, bad, GOOD], group=2)
    with pytest.raises(BadRecord) as caught:
        ZebraCotSource(tmp_path / "bad.parquet")
    assert str(caught.value).startswith(f"bad.parquet row 3: {sentence}") and "\n" not in str(caught.value)


def test_bad_rows_can_be_skipped(tmp_path):
    write(tmp_path / "train.parquet", [GOOD, *(bad for bad, _ in BAD), GOOD], group=5)
    source = ZebraCotSource(tmp_path, on_bad_record="skip")
    assert [record.name for record in source] == ["train.parquet row 0", f"train.parquet row {len(BAD) + 1}"]
    assert [record.images for record in source] == [(b"a cat",)] * 2
    assert len(source.skipped) == len(BAD)
    with pytest.raises(BadRecord, match="train.parquet must hold rows of Zebra-CoT's columns, got no usable one"):
        ZebraCotSource(write(tmp_path / "train.parquet", [BAD[0][0]]), on_bad_record="skip")


def test_an_image_that_is_only_a_path(tmp_path):
    row = GOOD | {"reasoning_image_1": {"bytes": None, "path": "images/ear.png"}}
    path = write(tmp_path / "data" / "train.parquet", [row])
    with pytest.raises(BadRecord, match="train.parquet row 0: the path of reasoning_image_1 must be an image file in "):
        ZebraCotSource(path)[0]
    for root in (path.parent, tmp_path):
        (root / "images").mkdir()
        (root / "images" / "ear.png").write_bytes(b"its ear")
        record = ZebraCotSource(path, root if root == tmp_path else None)[0]
        assert record.steps[1] == Look(root / "images" / "ear.png") and record.images == (b"a cat",)
    for outside in ("../images/ear.png", str(tmp_path / "images" / "ear.png")):
        write(path, [GOOD | {"reasoning_image_1": {"bytes": None, "path": outside}}])
        with pytest.raises(BadRecord, match="row 0: the path of reasoning_image_1 must stay inside the data folder"):
            ZebraCotSource(path)[0]


def test_bytes_that_are_no_text(tmp_path):
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"O\xf9?"]).buffers())
    pq.write_table(pa.table([latin, ["so"], ["42"]], TEXTS), tmp_path / "latin.parquet")
    with pytest.raises(BadRecord, match='latin.parquet row 0: "Question" must be UTF-8, but is not'):
        ZebraCotSource(tmp_path / "latin.parquet")


def test_files_that_are_none_of_the_format(tmp_path):
    with pytest.raises(BadRecord, match="absent.parquet must be a whole parquet file, but cannot be read: No such"):
        ZebraCotSource(tmp_path / "absent.parquet")
    with pytest.raises(BadRecord, match=r"must be a parquet file or a folder with at least one \(.*\), got none"):
        ZebraCotSource(tmp_path)
    path = tmp_path / "train.parquet"
    path.write_bytes(b"no parquet file")
    with pytest.raises(BadRecord, match="train.parquet must be a whole parquet file, but cannot be read: "):
        ZebraCotSource(path)
    whole = write(path, [GOOD]).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRecord, match="train.parquet must be a whole parquet file, but cannot be read"):
        ZebraCotSource(path, on_bad_record="skip")
    pq.write_table(pa.table({"Question": ["?"], "Final Answer": ["!"]}), path)
    with pytest.raises(
        BadRecord,
        match='train.parquet: must have the columns Question, .*, but lacks "Text Reasoning Trace"',
    ):
        ZebraCotSource(path)
    pq.write_table(pa.table({name: [3] for name in TEXTS}), path)
    with pytest.raises(BadRecord, match='train.parquet: the column "Question" must be text, got int64'):
        ZebraCotSource(path)
    pq.write_table(pa.table({name: ["x"] for name in TEXTS} | {"problem_image_1": ["a.png"]}), path)
    with pytest.raises(
        BadRecord,
        match="'problem_image_1' must be binary or a struct of binary bytes and a text path, got str",
    ):
        ZebraCotSource(path)


def arrays(image=None, column: str = "reasoning_image_1", **changes) -> dict[str, pa.Array]:
    """Return the columns of GOOD, one row long, some of them exchanged."""
    columns = {name: pa.array([GOOD[name]], IMAGE if "image" in name else pa.string()) for name in GOOD}
    return columns | changes | ({} if image is None else {column: image})


BYTES_TYPES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(7), pa.dictionary(pa.int8(), pa.binary())]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_columns_of_text_of_every_type(tmp_path, kind):
    columns = {name: array.cast(kind) if "image" not in name else array for name, array in arrays().items()}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert ZebraCotSource(tmp_path)[0] == ZebraCotSource(write(tmp_path / "same" / "train.parquet", [GOOD]))[0]


@pytest.mark.parametrize("kind", BYTES_TYPES)
@pytest.mark.parametrize("shape", ["plain", "list", "struct", "bytes alone", "extra"])
def test_columns_of_images_of_every_type(tmp_path, kind, shape):
    array = (
        pa.array([b"its ear"], pa.binary()).cast(kind)
        if not pa.types.is_dictionary(kind)
        else (pa.array([b"its ear"]).dictionary_encode())
    )
    paths = pa.array(["/etc/hostname"])
    image = {
        "plain": array,
        "list": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), array),
        "struct": pa.StructArray.from_arrays([paths, array], ["path", "bytes"]),
        "bytes alone": pa.StructArray.from_arrays([array], ["bytes"]),
        "extra": pa.StructArray.from_arrays([array, pa.array([3]), paths], ["bytes", "width", "path"]),
    }[shape]
    pq.write_table(pa.table(arrays(image)), tmp_path / "train.parquet")
    assert ZebraCotSource(tmp_path)[0].steps[1] == Look(b"its ear")


@pytest.mark.parametrize(
    ("answers", "read"),
    [
        (pa.array([3]), "3"),
        (pa.array([2.5]), "2.5"),
        (pa.array([42.0], pa.float32()), "42"),
        (pa.array([True]), "true"),
        (pa.array([["B"]]), "B"),
        (pa.array(["1.50"]).cast(pa.decimal128(5, 2)), "1.50"),
        (pa.array([7]).dictionary_encode(), "7"),
        (pa.array([None], pa.int64()), None),
    ],
)
def test_answers_that_are_no_text(tmp_path, answers, read):
    pq.write_table(pa.table(arrays(**{"Final Answer": answers})), tmp_path / "train.parquet")
    record = ZebraCotSource(tmp_path)[0]
    assert record.answer == read
    assert record.steps[-1].content.partition("\n\nFinal Answer: ")[2] == (read or "")


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (pa.array([{"bytes": "/etc/hostname", "path": "a.png"}]), "'reasoning_image_1' must be binary or a struct of"),
        (pa.array(["/etc/hostname"]), "'reasoning_image_1' must be binary or a struct of binary bytes and a text path"),
        (pa.array([[1, 2]]), "'reasoning_image_1' must be binary or a struct of"),
        (pa.array([{"path": 3}]), "'reasoning_image_1' must be binary or a struct of"),
        (pa.array([{"width": 3}]), "'reasoning_image_1' must be binary or a struct of"),
        (pa.array([[b"a", b"b"]]), "row 0: reasoning_image_1 must be one image, got 2"),
        (pa.array([{"bytes": None, "path": "/etc/hostname"}]), "row 0: the path of reasoning_image_1 must stay inside"),
        (pa.array([{"bytes": b"", "path": ""}]), "row 0: must have an image for every marker, got none in"),
        (pa.array([[]], pa.list_(pa.binary())), "row 0: must have an image for every marker, got none in"),
    ],
)
def test_columns_that_hold_no_images(tmp_path, image, sentence):
    pq.write_table(pa.table(arrays(image)), tmp_path / "train.parquet")
    with pytest.raises(BadRecord) as caught:
        ZebraCotSource(tmp_path)[0]
    assert sentence in str(caught.value) and len(str(caught.value)) < 400


def test_columns_that_are_there_twice(tmp_path):
    columns = arrays()
    for name in ("Question", "problem_image_1"):
        table = pa.Table.from_arrays([*columns.values(), columns[name]], [*columns, name])
        pq.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(BadRecord, match=f"^train.parquet: must have one column '{name}', got 2"):
            ZebraCotSource(tmp_path)
    table = pa.Table.from_arrays([*columns.values(), columns["Question"], columns["Question"]], [*columns, "x", "x"])
    pq.write_table(table, tmp_path / "train.parquet")
    assert len(ZebraCotSource(tmp_path)) == 1  # others are not read


def test_structs_of_nulls_are_no_images(tmp_path):
    row = GOOD | {"problem_image_2": {"bytes": None, "path": None}}
    assert ZebraCotSource(write(tmp_path / "train.parquet", [row]))[0].images == (b"a cat",)


def test_evaluation_needs_questions_and_answers_alone(tmp_path):
    rows = [GOOD | {"reasoning_image_1": None}, GOOD | {"Text Reasoning Trace": None}, GOOD]
    rows += [GOOD | {"Text Reasoning Trace": "<image_start> seen"}, GOOD | {"problem_image_1": None}]
    write(tmp_path / "train.parquet", rows)
    source = ZebraCotSource(tmp_path, on_bad_record="skip", for_evaluation=True)
    assert [record.name[-1] for record in source] == ["0", "1", "2", "3"]
    assert all(record.answer == "yes" and record.images == (b"a cat",) for record in source)
    assert source[2].steps == (Text("THOUGHT 0: see\n\nTHOUGHT 1: so\n\nFinal Answer: yes"),)
    pq.write_table(
        pa.table(arrays()).select(["Question", "Final Answer", "problem_image_1"]), tmp_path / "train.parquet"
    )
    assert ZebraCotSource(tmp_path, for_evaluation=True)[0].answer == "yes"


def test_parquet_files_that_are_links(tmp_path):
    blobs, data = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    write(blobs / "abc", [GOOD])
    write(tmp_path / "disk" / "deep" / "c.parquet", [GOOD])
    (data / "x.parquet").mkdir(parents=True)
    (data / "x.parquet" / "a.parquet").symlink_to("../../../blobs/abc")
    (data / "disk").symlink_to(tmp_path / "disk")
    (data / "round").symlink_to(data)
    assert [record.name for record in ZebraCotSource(data)] == [
        "disk/deep/c.parquet row 0",
        "x.parquet/a.parquet row 0",
    ]
    with pytest.raises(BadRecord, match="must stay inside the data folder .*, since data.follow_links is false, but"):
        ZebraCotSource(data, follow_links=False)
    (data / "disk").unlink()
    (data / "round").unlink()
    with pytest.raises(BadRecord, match="a.parquet must stay inside the data folder"):
        ZebraCotSource(data, follow_links=False)
    link = tmp_path / "link.parquet"
    link.symlink_to(blobs / "abc")
    assert len(ZebraCotSource(link, follow_links=False)) == 1  # named by who asks


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_parquet_files_that_are_no_regular_ones(tmp_path, make):
    write(tmp_path / "a.parquet", [GOOD])
    make(tmp_path / "p.parquet")
    for path in (tmp_path, tmp_path / "p.parquet"):
        with pytest.raises(
            BadRecord, match="p.parquet must be a whole parquet file, but cannot be read: is not a regular"
        ):
            ZebraCotSource(path, on_bad_record="skip")


def test_files_that_change_after_they_were_opened(tmp_path):
    path = write(tmp_path / "train.parquet", [numbered(number) for number in range(8)], group=2)
    source = ZebraCotSource(path)
    source[0]
    content = path.read_bytes()
    path.unlink()
    assert source[1].name == "train.parquet row 1"  # its row group is in memory
    with pytest.raises(BadRecord, match="^train.parquet row 7: the file must be a whole parquet file.* No such file"):
        source[7]
    write(path, [numbered(number) for number in range(9)], group=2)
    with pytest.raises(BadRecord, match="^train.parquet row 7: .*train.parquet has changed since it was opened"):
        source[7]
    path.write_bytes(content[:-100])
    with pytest.raises(BadRecord, match="^train.parquet row 7: "):
        source[7]


def test_a_damaged_row_group_is_named_and_the_rest_is_read(tmp_path):
    path = write(tmp_path / "train.parquet", [numbered(number) for number in range(6)], group=2)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    content[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    with pytest.raises(BadRecord, match="^train.parquet rows 2 to 3: the file must be a whole parquet file, but"):
        ZebraCotSource(path)
    source = ZebraCotSource(path, on_bad_record="skip")
    assert [record.name[-1] for record in source] == ["0", "1", "4", "5"] and len(source.skipped) == 1


def test_pointers_of_large_file_storage_are_named(tmp_path):
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(BadRecord, match="is a pointer of Git's large-file storage; fetch the file itself"):
        ZebraCotSource(tmp_path)
