"""Reading, playing and scoring moves: against gymnasium's FrozenLake, brute force, and the figures of the real maps."""

import dataclasses
import itertools
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.source import MOVE_WORDS, FrozenLakeSource, empty_map_distance, shortest_path
from ilvr_jax.data.records import Look, Record
from ilvr_jax.tasks.final_answer import answer_text
from ilvr_jax.tasks.vsp_planning import (
    Outcome,
    draw_look,
    hole_blind_rates,
    hole_blind_success,
    holes_matter,
    is_detour,
    mean_success,
    parse_moves,
    play,
    stated_moves,
    walk,
    without_holes,
)
from tests.maps import maps

REAL_MAPS = Path(__file__).parents[1] / "data" / "vsp_planning" / "test.jsonl"


MAPS = maps(st.integers(2, 5), st.integers(2, 5))


moves_texts = st.text("UDLR", max_size=14)


@given(MAPS, moves_texts)
@settings(deadline=None, max_examples=150)
def test_playing_agrees_with_gymnasium(map_desc, moves):
    letters = {1: "S", 2: "G", -1: "H", 0: "F"}
    game = gymnasium.make(
        "FrozenLake-v1", desc=["".join(letters[cell] for cell in row) for row in map_desc], is_slippery=False
    )
    position, _ = game.reset()
    width, reward, terminated = len(map_desc[0]), 0.0, False
    visited = [divmod(position, width)]
    for move in moves:
        position, reward, terminated, _, _ = game.step("LDRU".index(move))
        visited.append(divmod(position, width))
        if terminated:
            break
    played = moves[: len(visited) - 1]  # gymnasium stops at the goal, too
    assert walk(map_desc, played) == visited
    expected = Outcome.GOAL if reward else Outcome.HOLE if terminated else Outcome.SHORT
    assert play(map_desc, played) == expected
    if expected == Outcome.HOLE:
        assert walk(map_desc, moves) == visited


def test_the_goal_must_be_the_last_cell():
    map_desc = ((1, 2, 0),)
    assert play(map_desc, "R") == Outcome.GOAL
    assert play(map_desc, "RR") == Outcome.SHORT
    assert play(map_desc, "RRL") == Outcome.GOAL
    assert play(map_desc, "RU") == Outcome.GOAL  # off the edge is no move
    assert play(map_desc, "") == Outcome.SHORT
    assert play(map_desc, None) == Outcome.UNPARSED


@given(moves_texts.filter(bool), st.data())
def test_moves_are_read_in_every_accepted_form(moves, data):
    separator = data.draw(st.sampled_from([",", ", ", " ", "\n"]))
    written = separator.join(
        data.draw(st.sampled_from([move, move.lower(), MOVE_WORDS[move].upper(), MOVE_WORDS[move].title()]))
        for move in moves
    )
    assert parse_moves(rf"First \boxed{{U}}, no: \boxed{{ {written} }}.") == moves
    assert parse_moves(rf"\boxed{{{moves}}}") == moves


@pytest.mark.parametrize(
    "text",
    ["", "RRD", r"\boxed{}", r"\boxed{ , }", r"\boxed{RRD", r"\boxed{A}", r"\boxed{R2}", r"\boxed{UPDOWN!}"]
    + [r"\boxed{RIGHTS}", r"\boxed{R} or \boxed{", r"\boxed{R} or \boxed{maybe}", r"boxed{R}"],
)
def test_what_is_not_a_list_of_moves_is_unparsed(text):
    assert parse_moves(text) is None


def test_moves_in_words_are_read():
    assert stated_moves(" ice elf\n goal ice\n 0 1 left 0 0 Down 1 0") == "LD"
    assert stated_moves(r"upright leftover \boxed{UDLR}") == ""


@pytest.mark.parametrize(
    ("text", "elf", "last_move"),
    [
        (" distances 2 1 0", (0, 0), "D"),
        (r"\boxed{RR}", (0, 0), "D"),
        ("Right", (0, 1), "R"),
        ("right right, then up", (0, 2), "U"),  # off the edge: it looks there and stays
        ("right down", (1, 1), "D"),
        ("right down left left", (1, 1), "D"),  # fallen: what is told after that is not played
        ("right left", (0, 0), "L"),
    ],
)
def test_a_look_shows_the_map_after_the_moves_in_words(text, elf, last_move):
    map_desc = ((1, 0, 0), (0, -1, 2))
    record = Record("?", (draw_map(map_desc, 28),), (), map_desc=map_desc)
    drawn = draw_look(record, text)
    np.testing.assert_array_equal(drawn, draw_map(map_desc, 28, elf=elf, last_move=last_move))
    assert draw_look(dataclasses.replace(record, images=(draw_map(map_desc),)), text).shape == (128, 192, 3)


@pytest.mark.parametrize("read_out", ["distances", "map", "none"])
def test_looks_of_generated_records_are_drawn_as_they_are(read_out):
    source = FrozenLakeSource(FrozenLakeConfig(read_out=read_out), seed=3, count=10)
    looks = 0
    for record in (source[number] for number in range(10)):
        for number, step in enumerate(record.steps):
            if isinstance(step, Look):
                text = answer_text(dataclasses.replace(record, steps=record.steps[:number]))
                np.testing.assert_array_equal(draw_look(record, text), step.helper_image)
                looks += 1
    assert looks


@given(MAPS)
@settings(deadline=None, max_examples=100)
def test_hole_blind_success_is_the_share_of_shortest_paths_that_succeed(map_desc):
    empty = without_holes(map_desc)
    distance = empty_map_distance(map_desc)
    paths = ["".join(path) for path in itertools.product("UDLR", repeat=distance)] if distance <= 5 else None
    if paths is None:
        return
    paths = [path for path in paths if play(empty, path) == Outcome.GOAL]
    succeeding = sum(play(map_desc, path) == Outcome.GOAL for path in paths)
    assert hole_blind_success(map_desc) == pytest.approx(succeeding / len(paths))
    assert holes_matter(map_desc) == (succeeding < len(paths))
    assert is_detour(map_desc) == (len(shortest_path(map_desc) or "x" * 99) > distance)


def test_success_is_averaged_over_each_group_of_maps():
    row = (0, 0, 0)
    free, blocked = ((1, 2, 0), row, row), ((1, -1, 2), row, row)  # the second needs a detour
    half = ((1, -1, 0, 0), (0, 2, 0, 0), (0,) * 4, (0,) * 4)
    rates = mean_success([free, free, blocked, half], [1, 0, 0, 1])
    assert (rates.overall, rates.by_level) == (0.5, {3: pytest.approx(1 / 3), 4: 1.0})
    assert (rates.where_holes_matter, rates.on_detours) == (0.5, 0.0)
    assert mean_success([free], [1]).on_detours is None
    assert hole_blind_rates([free, blocked, half]).overall == 0.5


def test_hole_blind_figures_of_the_real_maps():
    real = [json.loads(line)["map_desc"] for line in REAL_MAPS.read_text().splitlines()]
    rates = hole_blind_rates(real)
    assert round(rates.overall, 2) == 0.72
    assert {level: round(rate, 2) for level, rate in rates.by_level.items()} == {3: 0.83, 4: 0.77, 5: 0.74, 6: 0.55}
    assert (round(rates.where_holes_matter, 2), rates.on_detours) == (0.35, 0)
    assert (sum(map(holes_matter, real)), sum(map(is_detour, real))) == (85, 20)
    assert all(play(map_desc, shortest_path(map_desc)) == Outcome.GOAL for map_desc in real)
