"""The input pipeline: order, buckets, exact state, bad records."""

import collections
import dataclasses
import functools
import itertools
import json
import logging
import pickle

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.examples import ExampleSettings, build_example
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.ilvr import IlvrSource
from ilvr_jax.data.pipeline import fingerprint, make_iterator, next_epoch, skipped_records
from ilvr_jax.data.records import BadRecord, Look, Record, Text
from ilvr_jax.data.tokenizer import special_tokens, train_tokenizer
from ilvr_jax.data.zebra_cot import ZebraCotSource
from ilvr_jax.method.layout import Layout
from ilvr_jax.models.qwen2_5_vl.images import WindowGeometry

TOKENIZER = train_tokenizer(["go on look there"])
SPECIAL = special_tokens(TOKENIZER)
TO_SAMPLE = functools.partial(
    build_example, tokenizer=TOKENIZER, special=SPECIAL, settings=ExampleSettings(latent_size=2)
)
BUCKETS = [
    Layout(prefix=24, segments=segments, text=4, tail=6, latent_size=2, images=1, image_tokens=4, helper_tokens=4)
    for segments in (1, 3)
]
STEP = {"type": "text", "content": "so"}
MAP = [[1, 0, 0], [0, -1, 0], [0, 0, 2]]


class LookSource:
    """Record i has an image of colour i and i % 4 looks; the records in `bad` cannot be used."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()):
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if index in self.bad:
            raise BadRecord(f"source line {index}: is bad")
        image = np.full((28, 28, 3), index, np.uint8)
        steps = [Text("go on"), *[Look(image), Text("look")] * (index % 4)]
        return Record("there", (image,), tuple(steps), name=f"source line {index}")


class BlockSource(LookSource):
    """Record i belongs to block i // 5, and blocks stay together in its order."""

    def shuffled(self, random: np.random.Generator) -> list[int]:
        blocks = [range(first, min(first + 5, self.count)) for first in range(0, self.count, 5)]
        return [number for block in random.permutation(len(blocks)) for number in random.permutation(blocks[block])]


def iterator(source=None, buckets=BUCKETS, batch_size=4, seed=3, **settings):
    source = LookSource(23) if source is None else source
    return make_iterator(source, TO_SAMPLE, buckets, batch_size, seed, SPECIAL, geometry=WindowGeometry(2), **settings)


def records(batches, count: int) -> list[list[int]]:
    return [batch.record.tolist() for batch in itertools.islice(batches, count)]


def test_batches_hold_what_their_records_say():
    for batch in itertools.islice(iterator(), 12):
        assert batch.layout in BUCKETS and batch.tokens.shape == (4, batch.layout.columns)
        looks = np.array(batch.record) % 4
        assert (np.array(batch.tokens) == SPECIAL.latent_start).sum(1).tolist() == looks.tolist()
        assert looks.max() <= 1 if batch.layout == BUCKETS[0] else looks.min() >= 2
        assert batch.images.pixels.max((1, 2, 3, 4)).tolist() == batch.record.tolist()


@pytest.mark.parametrize("kind", [LookSource, BlockSource])
def test_an_epoch_holds_every_record_once_and_epochs_differ(kind):
    flat = list(itertools.chain(*records(iterator(kind(24), BUCKETS[1:], seed=0), 12)))
    assert sorted(flat[:24]) == sorted(flat[24:48]) == list(range(24))
    assert flat[:24] != flat[24:48] != list(range(24))
    other = itertools.chain(*records(iterator(kind(24), BUCKETS[1:], seed=1), 6))
    assert list(other) != flat[:24]


def test_a_source_may_say_in_which_order_its_records_come():
    flat = list(itertools.chain(*records(iterator(BlockSource(20), BUCKETS[1:]), 10)))
    for first in range(0, 40, 5):
        assert len({number // 5 for number in flat[first : first + 5]}) == 1
    numbers = itertools.chain(*records(iterator(LookSource(12), BUCKETS[1:]), 6))
    # The order of all other sources, by which runs go on that began before there was a choice.
    assert list(numbers) == [4, 6, 9, 7, 5, 3, 1, 11, 10, 0, 2, 8, 8, 1, 3, 7, 9, 10, 5, 4, 2, 6, 11, 0]


def test_part_full_buckets_are_carried_over_epochs():
    batches = records(iterator(LookSource(5), batch_size=8), 10)
    counts = collections.Counter(itertools.chain(*batches))
    assert len(counts) == 5 and all(len(batch) == 8 for batch in batches)


@pytest.mark.parametrize("kind", [LookSource, BlockSource])
def test_worker_processes_give_the_same_batches(kind):
    settings = {"source": kind(23, bad=(7, 2)), "on_bad_record": "skip"}
    alone, workers = iterator(**settings), iterator(**settings, workers=2)
    records(alone, 3)
    workers.set_state(alone.get_state())  # a state holds for any number of workers
    for expected, got in itertools.islice(zip(alone, workers, strict=True), 8):
        jax.tree.map(np.testing.assert_array_equal, expected, got)
    state = workers.get_state()
    assert state == alone.get_state()
    assert len(state["pending"]) > 0 and skipped_records(workers) == [2, 7]
    workers.close()
    resumed = iterator(**settings)
    resumed.set_state(state)
    assert records(resumed, 3) == records(alone, 3)


@pytest.mark.parametrize("kind", [LookSource, BlockSource])
@pytest.mark.parametrize("taken", range(7))
def test_a_restored_iterator_continues_exactly(taken, kind):
    source = kind(23, bad=(4, 11))
    first = iterator(source, on_bad_record="skip")
    records(first, taken)
    state = json.loads(json.dumps(first.get_state()))
    expected = list(itertools.islice(first, 6))
    skipped = skipped_records(first)
    second = iterator(source, on_bad_record="skip")
    records(second, 2)
    second.set_state(state)
    assert second.get_state() == state
    for left, right in zip(expected, itertools.islice(second, 6), strict=True):
        jax.tree.map(np.testing.assert_array_equal, left, right)
    assert skipped_records(second) == skipped


def test_orbax_saves_and_restores_the_iterator(tmp_path):
    import grain

    first = iterator()
    records(first, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first)))
        manager.wait_until_finished()
        second = iterator()
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(second)))
    assert records(second, 4) == records(first, 4)


def test_a_bad_record_stops_the_run_with_its_sentence():
    batches = iterator(LookSource(23, bad=(7,)))
    for _ in range(2):  # asking again does not get round it
        with pytest.raises(BadRecord, match="^source line 7: is bad$"):
            records(batches, 30)


def test_bad_records_are_left_out_and_counted_once(caplog):
    batches = iterator(LookSource(23, bad=(7, 2)), on_bad_record="skip")
    with caplog.at_level(logging.WARNING):
        seen = set(itertools.chain(*records(batches, 30)))
    assert seen == set(range(23)) - {2, 7}
    assert skipped_records(batches) == [2, 7]
    assert sorted(caplog.messages) == ["skipped: source line 2: is bad", "skipped: source line 7: is bad"]


def test_a_source_of_bad_records_alone_ends():
    for _ in range(2):
        with pytest.raises(BadRecord, match="every record was skipped, the last because: source line [01]: is bad"):
            next(iterator(LookSource(2, bad=(0, 1)), on_bad_record="skip"))
    with pytest.raises(BadRecord, match="the source holds no records"):
        iterator(LookSource(0))


def test_a_record_too_large_for_every_bucket_is_named():
    problem = "must fit a bucket, but takes 2 latent segments; the largest bucket holds 1 latent segments"
    with pytest.raises(BadRecord, match=f"^source line 2: {problem}$"):
        next(iterator(LookSource(3), buckets=BUCKETS[:1]))
    message = "source line 0: must fit a bucket, but takes 16 tokens; the largest bucket holds 9 tokens"
    with pytest.raises(BadRecord, match=f"^{message}$"):
        next(iterator(LookSource(1), buckets=[dataclasses.replace(BUCKETS[0], prefix=1, tail=4)]))
    batches = iterator(LookSource(23), buckets=BUCKETS[:1], on_bad_record="skip")
    assert set(itertools.chain(*records(batches, 30))) == {i for i in range(23) if i % 4 < 2}
    assert skipped_records(batches) == [i for i in range(23) if i % 4 >= 2]


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="on_bad_record must be error or skip, got 'stop'"):
        iterator(on_bad_record="stop")
    with pytest.raises(ValueError, match="the number of buckets must be at least 1, got 0"):
        iterator(buckets=[])


def json_lines(folder, lines=("one", "two", "three"), side=28, on_bad_record="error", bad=False):
    Image.new("RGB", (side, side)).save(folder / "a.png")
    fields = [{"text_input": text, "image_input": "a.png", "sequence_plan": [STEP]} for text in lines]
    text = "".join(json.dumps(one) + "\n" for one in fields) + ("{}\n" if bad else "")
    (folder / "train.jsonl").write_text(text)
    return IlvrSource(folder / "train.jsonl", on_bad_record=on_bad_record)


def parquet(folder, lines=("one", "two", "three"), image=b"image"):
    mark = "<image_start>[problem_image_1]<image_end>"
    rows = [
        {
            "Question": f"{text} {mark}",
            "Text Reasoning Trace": "so",
            "Final Answer": "1",
            "problem_image_1": {"bytes": image, "path": None},
        }
        for text in lines
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return ZebraCotSource(folder / "train.parquet")


def maps(folder, exclude=MAP, seed=0, count=20, **settings):
    (folder / "maps.jsonl").write_text(json.dumps({"map_desc": exclude}) + "\n")
    return FrozenLakeSource(FrozenLakeConfig(**settings, exclude=(str(folder / "maps.jsonl"),)), seed, count)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (json_lines, {"lines": ("one", "two")}),
        (json_lines, {"lines": ("two", "one", "three")}),
        (json_lines, {"lines": ("one", "too", "three")}),
        (json_lines, {"side": 56}),
        (parquet, {"lines": ("one", "two")}),
        (parquet, {"lines": ("two", "one", "three")}),
        (parquet, {"image": b"another one"}),
        (maps, {"exclude": [*MAP, [0, 0, 0]]}),
        (maps, {"seed": 1}),
        (maps, {"count": 21}),
        (maps, {"levels": (3,)}),
    ],
)
def test_a_fingerprint_is_that_of_the_records(kind, changes, tmp_path):
    """Not that of their folder: copies have the same."""
    prints = []
    for name, settings in (("a", {}), ("b", {}), ("c", changes)):
        (tmp_path / name).mkdir()
        source = kind(tmp_path / name, **settings)
        prints.append(fingerprint(pickle.loads(pickle.dumps(source))))
        assert prints[-1].startswith(f"{len(source)} records with digest ")
    assert prints[0] == prints[1] != prints[2]


def test_lines_that_are_left_out_are_no_part_of_a_fingerprint(tmp_path):
    assert fingerprint(json_lines(tmp_path, bad=True, on_bad_record="skip")) == fingerprint(json_lines(tmp_path))


def test_a_source_without_a_fingerprint_is_known_by_its_length():
    assert fingerprint(LookSource(5)) == "5 records of unknown content"
    assert iterator(LookSource(5)).get_state()["records"] == "5 records of unknown content"


def test_the_next_epoch_is_the_first_that_begins_after_a_place():
    state = {"position": 61, "pending": [40], "skipped": [3]}
    assert next_epoch(state, 25) == {"position": 75, "pending": [], "skipped": []}
    batches = iterator(LookSource(25), buckets=BUCKETS[1:], batch_size=5)
    batches.set_state(next_epoch(state, 25))
    assert sorted(itertools.chain(*records(batches, 5))) == list(range(25))
