"""Evaluation of maps: the figures of players of known skill in place of a model."""

import contextlib
import dataclasses
import json
import types

import numpy as np
import pytest
from PIL import Image

from ilvr_jax.checkpoints.trained import TrainedModel
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import DataConfig, EvalConfig, FrozenLakeConfig, RunConfig, SamplingParams
from ilvr_jax.data.examples import ExampleSettings
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.maps import shortest_path
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.records import Record
from ilvr_jax.data.tokenizer import record_texts, special_tokens, train_tokenizer
from ilvr_jax.evaluation.evaluator import Evaluator, read_summary, run_evaluation, summary_file
from ilvr_jax.evaluation.records import EvaluationRecords, check_records
from ilvr_jax.evaluation.results import BadResults, read_lines
from ilvr_jax.inference.requests import Look, RequestOutput
from ilvr_jax.inference.transcript import show_look, show_text, split_at_looks
from ilvr_jax.models.qwen2_5_vl.images import WindowGeometry
from ilvr_jax.reports.pictures import Solution, read_solutions
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
    """A fake engine that finds the map of each prompt by its pixels and answers with a given function."""

    def __init__(self, tokenizer, maps, answer):
        self.tokenizer, self.special, self.answer = tokenizer, special_tokens(tokenizer), answer
        self.maps = {draw_map(m, 28).tobytes(): m for map_desc in maps for m in (map_desc, without_holes(map_desc))}
        self.asked = []

    def serve(self, requests):
        for number, request in enumerate(requests):
            self.asked.append(request)
            written = self.tokenizer.encode(self.answer(self.map_of(request)), add_special_tokens=False)
            tokens = (*written, self.special.im_end)
            texts, slots = split_at_looks(tokens, self.tokenizer, self.special)
            text, looks = show_text(texts, map(show_look, slots)), tuple(Look(0, count) for count in slots)
            yield RequestOutput(number, 0, request.name, tokens, text, looks, "end", plain_text="".join(texts))

    def map_of(self, request):
        (image,) = request.prompt.images
        cells = image.pixels.reshape(image.height // 2, image.width // 2, 2, 2, 3, 14, 14)
        pixels = cells.transpose(0, 2, 5, 1, 3, 6, 4).reshape(14 * image.height, 14 * image.width, 3)
        return self.maps[pixels.tobytes()]


def evaluator_of(player, records, **changes):
    model = types.SimpleNamespace(geometry=GEOMETRY, config="a model")
    prompts = ExampleSettings(latent_size=2)
    trained = TrainedModel(model, {}, player.tokenizer, player.special, prompts, looks=True)
    decoding = {"method": "latent", "latent_size": 2, "sampling": SamplingParams(64)}
    return Evaluator(trained, "vsp_planning", EvaluationRecords(records, "maps"), decoding, **changes)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """A function that evaluates a player and returns the summary and the lines of the answers to the maps."""

    def evaluate_player(player, records, **changes):
        monkeypatch.setattr("ilvr_jax.evaluation.evaluator.Engine", lambda *arguments: player)
        path = tmp_path / "results.jsonl"
        path.unlink(missing_ok=True)
        summary = run_evaluation(evaluator_of(player, records, **changes), path)
        lines = sorted(read_lines(path, len(records)), key=lambda line: line["number"])
        return summary, [line for line in lines if not line["form"]]

    return evaluate_player


LOOK = "<|latent_start|><|latent_pad|><|latent_pad|><|latent_end|>"


def seeing(map_desc):
    return rf" 0 0 right{LOOK} 0 1 down{LOOK} \boxed{{{shortest_path(map_desc)}}}"


def blind(map_desc):
    return seeing(without_holes(map_desc))


def test_a_player_who_sees_holes(tokenizer, evaluate):
    maps = [FREE, BLOCKED, BENDING] * 3
    records = [record_of(m, f"map {number}") for number, m in enumerate(maps)]
    summary, lines = evaluate(Player(tokenizer, maps, seeing), records)
    assert (summary["accuracy"], summary["success_by_level"]) == (1, {"3": 1, "4": 1})
    assert (summary["success_where_holes_matter"], summary["success_on_detours"]) == (1, 1)
    assert summary["hole_blind_success"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert summary["hole_blind_by_level"] == {"3": 0.5, "4": pytest.approx(1 / 3)}
    assert summary["hole_blind_where_holes_matter"] == pytest.approx(1 / 6)
    assert summary["hole_blind_on_detours"] == 0
    # Vertical moves first: the path on BENDING is the same without its hole, the one on BLOCKED is not.
    assert summary["unchanged_when_holes_painted_over"] == pytest.approx(2 / 3)
    assert (summary["questions"], summary["unparsed"]) == (9, 0)
    assert (summary["looks"], summary["slots"]) == (18, 36)
    assert [line["record"] for line in lines] == [f"map {number}" for number in range(9)]
    for line, solution, map_desc in zip(lines, read_solutions(records, lines), maps, strict=True):
        assert solution == Solution(map_desc, shortest_path(map_desc), ("R", "RD"))
        assert line["right"] and solution.outcome == Outcome.GOAL
        assert line["text"] == rf" 0 0 right‹looking: 2 slots› 0 1 down‹looking: 2 slots› \boxed{{{solution.moves}}}"


def test_a_player_who_ignores_holes(tokenizer, evaluate):
    maps = [FREE, BLOCKED, BLOCKED]
    records = list(map(record_of, maps))
    summary, lines = evaluate(Player(tokenizer, maps, blind), records)
    assert summary["unchanged_when_holes_painted_over"] == 1
    assert (summary["success_on_detours"], summary["accuracy"]) == (0, pytest.approx(1 / 3))
    outcomes = [solution.outcome for solution in read_solutions(records, lines)]
    assert outcomes == [Outcome.GOAL, Outcome.HOLE, Outcome.HOLE]


def test_unparsed_answers_are_counted_apart(tokenizer, evaluate):
    maps = [FREE, BLOCKED, BENDING]
    records = list(map(record_of, maps))

    def answer(map_desc):
        return {3: f"right{LOOK}", 4: r"\boxed{UD}"}[len(map_desc)]

    summary, _ = evaluate(Player(tokenizer, maps, answer), records)
    assert (summary["unparsed"], summary["accuracy"], summary["looks"]) == (2, 0, 2)
    assert summary["unchanged_when_holes_painted_over"] == 1  # of the one answer that there is
    nothing, _ = evaluate(Player(tokenizer, maps, lambda map_desc: ""), records)
    assert (nothing["unparsed"], nothing["unchanged_when_holes_painted_over"]) == (3, None)


def test_the_seed_of_a_map_is_its_own_with_and_without_holes(tokenizer, evaluate):
    source = FrozenLakeSource(FrozenLakeConfig(), seed=1, count=11)
    records = [dataclasses.replace(source[number], steps=(), name=str(number)) for number in range(11)]
    player = Player(tokenizer, [record.map_desc for record in records], seeing)
    summary, _ = evaluate(player, records)
    assert summary["accuracy"] == 1 and summary["questions"] == 11 and len(player.asked) == 22
    seeds = {}
    for request in player.asked:
        assert seeds.setdefault(int(request.prompt.record), request.seed) == request.seed
    assert sorted(seeds) == list(range(11)) and len(set(seeds.values())) == 11
    again = Player(tokenizer, [record.map_desc for record in records], seeing)
    evaluate(again, records, seed=1)
    assert not {request.seed for request in again.asked} & set(seeds.values())


def test_a_question_replaces_that_of_every_record(tokenizer, evaluate):
    records = [record_of(FREE), dataclasses.replace(record_of(BLOCKED), question="Which way?" * 40)]
    player = Player(tokenizer, [FREE, BLOCKED], seeing)
    assert evaluate(player, records)[0]["accuracy"] == 1
    assert len({len(request.prompt.tokens) for request in player.asked}) == 2
    again = Player(tokenizer, [FREE, BLOCKED], seeing)
    evaluate(again, records, question="Which way?")
    assert len({len(request.prompt.tokens) for request in again.asked}) == 1


def test_a_limit_asks_the_first_maps_and_a_higher_one_adds_the_rest(tokenizer, monkeypatch, tmp_path):
    maps, path = [FREE, BLOCKED, BENDING], tmp_path / "results.jsonl"
    records, player = list(map(record_of, maps)), Player(tokenizer, maps, seeing)
    monkeypatch.setattr("ilvr_jax.evaluation.evaluator.Engine", lambda *arguments: player)
    limited, whole = (evaluator_of(player, records, limit=limit) for limit in (2, 0))
    assert run_evaluation(limited, path)["questions"] == 2
    assert read_summary(limited, path) and not read_summary(whole, path)
    summary = run_evaluation(whole, path)
    assert summary["questions"] == 3 and len(player.asked) == 6
    assert read_summary(whole, path) == summary and not read_summary(limited, path)
    assert run_evaluation(limited, path)["questions"] == 2 and len(player.asked) == 6  # figures of the first two


def test_an_evaluation_that_is_stopped_keeps_its_answers(tokenizer, monkeypatch, tmp_path):
    maps, path = [FREE, BLOCKED, BENDING], tmp_path / "results.jsonl"
    records, player = list(map(record_of, maps)), Player(tokenizer, maps, seeing)
    monkeypatch.setattr("ilvr_jax.evaluation.evaluator.Engine", lambda *arguments: player)
    evaluator = evaluator_of(player, records)
    run_evaluation(evaluator, path, is_stopped=lambda: len(player.asked) >= 2)
    before = path.read_text()
    assert len(before.splitlines()) == 1 + 2 and not summary_file(path).exists()
    assert read_summary(evaluator, path) is None
    assert run_evaluation(evaluator, path)["accuracy"] == 1
    assert path.read_text().startswith(before) and len(player.asked) == 6
    other = evaluator_of(player, records, seed=1)
    with pytest.raises(BadResults, match="must hold answers of this evaluation"):
        run_evaluation(other, path)
    assert run_evaluation(other, path, replace=True)["seed"] == 1 and len(player.asked) == 12


def test_holes_are_painted_over_at_the_size_of_the_image(tmp_path):
    file = tmp_path / "map.png"
    Image.fromarray(draw_map(BLOCKED, 64)).save(file)
    for image in (file, draw_map(BLOCKED, 64)):
        painted = paint_holes_over(dataclasses.replace(record_of(BLOCKED), images=(image,)))
        np.testing.assert_array_equal(painted.images[0], draw_map(FREE, 64))
        assert painted.map_desc == FREE


def test_what_is_written_can_be_read_and_damage_is_found(tokenizer, evaluate, tmp_path):
    maps = [FREE, BLOCKED, BENDING]
    records, player = [record_of(m, "a map") for m in maps], Player(tokenizer, maps, blind)
    summary, lines = evaluate(player, records)
    path, evaluator = tmp_path / "results.jsonl", evaluator_of(player, records)
    assert json.loads(summary_file(path).read_text()) == summary == read_summary(evaluator, path)
    for line, map_desc in zip(lines, maps, strict=True):
        assert line["right"] == (play(map_desc, line["answer"]) == Outcome.GOAL)
        assert (line["looks"], line["slots"], line["record"]) == (2, 4, "a map")
    whole = path.read_text()
    for damaged in (whole[:-9], "".join(whole.splitlines(keepends=True)[:-2]), whole.replace("true", "false"), ""):
        path.write_text(damaged)
        assert read_summary(evaluator, path) is None
    path.write_text(whole)
    assert read_summary(evaluator, path) and not read_summary(evaluator_of(player, records, seed=2), path)


def test_a_segment_that_was_cut_off_is_counted_with_the_slots_it_has(tokenizer):
    special = special_tokens(tokenizer)
    tokens = tokenizer.encode(f" up{LOOK} down<|latent_start|><|latent_pad|>", add_special_tokens=False)
    assert split_at_looks(np.array(tokens), tokenizer, special) == ([" up", " down", ""], (2, 1))


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_records_that_the_task_cannot_score_are_named(on_bad_record):
    config = RunConfig({}, data=DataConfig(on_bad_record=on_bad_record))
    unplayable = Record("?", (draw_map(FREE, 28),), (), name="test.jsonl line 7")
    for record, problem in (
        (unplayable, 'test.jsonl line 7: must have a "map_desc"'),
        (Record("?", (), (), map_desc=FREE, name="line 2"), "line 2: must have one image, the drawing of its map, got"),
    ):
        with pytest.raises(BadConfig) as error:
            check_records(config, EvaluationRecords([record, record], "maps"))
        sentence = "`eval.task` must be a task for the records of maps, got vsp_planning ("
        assert str(error.value).startswith(sentence + problem) and "eval.fraction to 0" in str(error.value)
    mixed = EvaluationRecords([record_of(FREE), unplayable], "maps")
    with contextlib.nullcontext() if on_bad_record == "skip" else pytest.raises(BadConfig):
        check_records(config, mixed)
    check_records(dataclasses.replace(config, eval=EvalConfig(limit=1)), mixed)
