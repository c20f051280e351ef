"""Evaluation of maps: the figures of players of known skill in place of a model."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.examples import ExampleSettings
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource, shortest_path
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.data.tokenizer import record_texts, special_tokens, train_tokenizer
from ilvr_jax.evaluation.maps import evaluate_maps, read_answers
from ilvr_jax.inference.decode import Decoded
from ilvr_jax.inference.transcript import split_at_looks
from ilvr_jax.method.tokens import Role
from ilvr_jax.models.qwen2_5_vl.images import WindowGeometry
from ilvr_jax.tasks.vsp_planning import Outcome, paint_holes_over, play, without_holes

GEOMETRY = WindowGeometry(2)
FREE = ((1, 0, 2), (0, 0, 0), (0, 0, 0))
BLOCKED = ((1, -1, 2), (0, 0, 0), (0, 0, 0))
BENDING = ((1, -1, 0, 0), (0, 0, 2, 0), (0, 0, 0, 0), (0, 0, 0, 0))


def record_of(map_desc, name="", cell_pixels=28):
    return Record("Which way?", (draw_map(map_desc, cell_pixels),), (), map_desc=map_desc, name=name)


@pytest.fixture(scope="module")
def tokenizer():
    records = [FrozenLakeSource(FrozenLakeConfig(), seed=0, count=30)[number] for number in range(30)]
    return train_tokenizer([*record_texts(records), "Which way?"])


class Player:
    """A fake model that finds the map of each prompt by its pixels and answers with a given function."""

    def __init__(self, tokenizer, maps, answer):
        self.tokenizer, self.special, self.answer = tokenizer, special_tokens(tokenizer), answer
        self.maps = {draw_map(m, 28).tobytes(): m for map_desc in maps for m in (map_desc, without_holes(map_desc))}
        self.batches = []

    def __call__(self, batch, seeds):
        assert np.all(batch.roles[:, -1] == Role.ANSWER)  # prompts end in the last column
        self.batches.append((batch, seeds))
        rows = []
        for row in range(len(batch.tokens)):
            tokens = self.tokenizer.encode(self.answer(self.map_of(batch, row)), add_special_tokens=False)
            rows.append([*tokens, self.special.im_end])
        longest = max(map(len, rows)) + 3
        padded = np.array([[*row, *[self.special.pad] * (longest - len(row))] for row in rows], np.int32)
        return Decoded(padded, np.array(list(map(len, rows))))

    def map_of(self, batch, row):
        units = int(batch.images.unit_valid[row, 0].sum())
        side = int(units**0.5)
        patches = batch.images.pixels[row, 0].reshape(-1, 4, 588)[batch.images.raster_order[row, 0, :units]]
        cells = patches.reshape(side, side, 2, 2, 3, 14, 14).transpose(0, 2, 5, 1, 3, 6, 4)
        return self.maps[cells.reshape(side * 28, side * 28, 3).tobytes()]


def evaluation_of(player, records, batch_size=4, **changes):
    settings = ExampleSettings(latent_size=2, **changes)
    return evaluate_maps(records, player, player.tokenizer, player.special, settings, GEOMETRY, batch_size)


LOOK = "<|latent_start|><|latent_pad|><|latent_pad|><|latent_end|>"


def seeing(map_desc):
    return rf" 0 0 right{LOOK} 0 1 down{LOOK} \boxed{{{shortest_path(map_desc)}}}"


def blind(map_desc):
    return seeing(without_holes(map_desc))


def test_a_player_who_sees_holes(tokenizer):
    maps = [FREE, BLOCKED, BENDING] * 3
    player = Player(tokenizer, maps, seeing)
    evaluation = evaluation_of(player, [record_of(m, f"map {number}") for number, m in enumerate(maps)])
    summary = evaluation.summary()
    assert (summary["success_rate"], summary["success_by_level"]) == (1, {"3": 1, "4": 1})
    assert (summary["success_where_holes_matter"], summary["success_on_detours"]) == (1, 1)
    assert summary["hole_blind_rate"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert summary["hole_blind_by_level"] == {"3": 0.5, "4": pytest.approx(1 / 3)}
    assert summary["hole_blind_where_holes_matter"] == pytest.approx(1 / 6)
    assert summary["hole_blind_on_detours"] == 0
    # Vertical moves first: the path on BENDING is the same without its hole, the one on BLOCKED is not.
    assert summary["unchanged_when_holes_painted_over"] == pytest.approx(2 / 3)
    assert (summary["samples"], summary["unparsed"]) == (9, 0)
    assert (summary["latent_segments"], summary["latent_slots"]) == (18, 36)
    assert [answer.name for answer in evaluation.answers] == [f"map {number}" for number in range(9)]
    for answer, map_desc in zip(evaluation.answers, maps, strict=True):
        assert (answer.map_desc, answer.moves, answer.outcome) == (map_desc, shortest_path(map_desc), Outcome.GOAL)
        assert answer.moves_before_looks == ("R", "RD")
        assert answer.text == rf" 0 0 right‹2 slots› 0 1 down‹2 slots› \boxed{{{answer.moves}}}"


def test_a_player_who_ignores_holes(tokenizer):
    maps = [FREE, BLOCKED, BLOCKED]
    evaluation = evaluation_of(Player(tokenizer, maps, blind), list(map(record_of, maps)))
    summary = evaluation.summary()
    assert summary["unchanged_when_holes_painted_over"] == 1
    assert (summary["success_on_detours"], summary["success_rate"]) == (0, pytest.approx(1 / 3))
    assert [answer.outcome for answer in evaluation.answers] == [Outcome.GOAL, Outcome.HOLE, Outcome.HOLE]


def test_unparsed_answers_are_counted_apart(tokenizer):
    maps = [FREE, BLOCKED, BENDING]

    def answer(map_desc):
        return {3: f"right{LOOK}", 4: r"\boxed{UD}"}[len(map_desc)]

    summary = evaluation_of(Player(tokenizer, maps, answer), list(map(record_of, maps))).summary()
    assert (summary["unparsed"], summary["success_rate"], summary["latent_segments"]) == (2, 0, 2)
    assert summary["unchanged_when_holes_painted_over"] == 1  # of the one answer that there is
    nothing = evaluation_of(Player(tokenizer, maps, lambda map_desc: ""), list(map(record_of, maps))).summary()
    assert (nothing["unparsed"], nothing["unchanged_when_holes_painted_over"]) == (3, None)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 50])
def test_batches_have_one_shape_and_full_rows_count_once(tokenizer, batch_size):
    source = FrozenLakeSource(FrozenLakeConfig(), seed=1, count=11)
    records = [dataclasses.replace(source[number], steps=()) for number in range(11)]
    player = Player(tokenizer, [record.map_desc for record in records], seeing)
    evaluation = evaluation_of(player, records, batch_size)
    assert evaluation.summary()["success_rate"] == 1 and evaluation.summary()["samples"] == 11
    assert len({batch.layout for batch, _ in player.batches}) == 1
    assert {len(batch.tokens) for batch, _ in player.batches} == {min(batch_size, 22)}
    seeds = {}
    for batch, batch_seeds in player.batches:
        for number, seed in zip(batch.record, batch_seeds, strict=True):
            assert seeds.setdefault(int(number), int(seed)) == int(seed)
    assert sorted(seeds) == list(range(11)) and len(set(seeds.values())) == 11


def test_a_long_question_gets_a_layout_of_its_own(tokenizer):
    records = [record_of(FREE), dataclasses.replace(record_of(BLOCKED), question="Which way?" * 40)]
    player = Player(tokenizer, [FREE, BLOCKED], seeing)
    assert evaluation_of(player, records).summary()["success_rate"] == 1
    short, long = sorted(batch.layout.prefix for batch, _ in player.batches)
    assert short < 64 < long
    again = Player(tokenizer, [FREE, BLOCKED], seeing)
    evaluation_of(again, records, question="Which way?")
    assert len({batch.layout.prefix for batch, _ in again.batches}) == 1


def test_holes_are_painted_over_at_the_size_of_the_image(tmp_path):
    file = tmp_path / "map.png"
    Image.fromarray(draw_map(BLOCKED, 64)).save(file)
    for image in (file, draw_map(BLOCKED, 64)):
        painted = paint_holes_over(dataclasses.replace(record_of(BLOCKED), images=(image,)))
        np.testing.assert_array_equal(painted.images[0], draw_map(FREE, 64))
        assert painted.map_desc == FREE


def test_what_is_written_can_be_read(tokenizer, tmp_path):
    maps = [FREE, BLOCKED, BENDING]
    evaluation = evaluation_of(Player(tokenizer, maps, blind), [record_of(m, "a map") for m in maps])
    path = tmp_path / "new" / "results.json"
    evaluation.write(path)
    assert json.loads(path.read_text()) == evaluation.summary()
    assert read_answers(path) == evaluation.answers
    lines = [json.loads(line) for line in (tmp_path / "new" / "results.samples.jsonl").read_text().splitlines()]
    assert [line["level"] for line in lines] == [3, 3, 4]
    assert [line["holes_matter"] for line in lines] == [False, True, True]
    assert [line["detour"] for line in lines] == [False, True, False]
    for line in lines:
        assert line["success"] == (play(line["map_desc"], line["moves"]) == Outcome.GOAL)
        assert (line["slots"], line["name"]) == ([2, 2], "a map")


def test_a_segment_that_was_cut_off_is_counted_with_the_slots_it_has(tokenizer):
    special = special_tokens(tokenizer)
    tokens = tokenizer.encode(f" up{LOOK} down<|latent_start|><|latent_pad|>", add_special_tokens=False)
    assert split_at_looks(np.array(tokens), tokenizer, special) == ([" up", " down", ""], (2, 1))


def test_records_that_cannot_be_played_are_refused(tokenizer):
    player = Player(tokenizer, [FREE], seeing)
    with pytest.raises(BadRecord, match='test.jsonl line 7: must have a "map_desc"'):
        evaluation_of(player, [Record("?", (draw_map(FREE, 28),), (), name="test.jsonl line 7")])
    with pytest.raises(BadRecord, match="line 2: must have one image, the drawing of its map, got 0"):
        evaluation_of(player, [Record("?", (), (), map_desc=FREE, name="line 2")])
