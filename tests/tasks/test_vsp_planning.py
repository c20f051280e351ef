"""Reading, playing and scoring moves: against gymnasium's FrozenLake, brute force, and the figures of the real maps."""

import dataclasses
import itertools
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import DataConfig, FrozenLakeConfig
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.maps import MOVE_WORDS, distance_to_goal, empty_map_distance, shortest_path
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.records import BadRecord, Look, Record
from ilvr_jax.tasks import follows_donor, vsp_planning
from ilvr_jax.tasks.final_answer import answer_text
from ilvr_jax.tasks.vsp_planning import (
    Outcome,
    draw_look,
    edits,
    hole_blind_rates,
    hole_blind_success,
    holes_matter,
    is_detour,
    mean_success,
    parse_moves,
    play,
    stated_moves,
    walk,
    with_steps,
    without_holes,
)
from tests.maps import maps, read_sketch

DATA = DataConfig()
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
    drawn = draw_look(record, [text], DATA)
    np.testing.assert_array_equal(drawn, draw_map(map_desc, 28, elf=elf, last_move=last_move))
    assert draw_look(dataclasses.replace(record, images=(draw_map(map_desc),)), [text], DATA).shape == (128, 192, 3)


@pytest.mark.parametrize("read_out", ["distances", "map", "none"])
def test_looks_of_generated_records_are_drawn_as_they_are(read_out):
    source = FrozenLakeSource(FrozenLakeConfig(read_out=read_out), seed=3, count=10)
    looks = 0
    for record in (source[number] for number in range(10)):
        for number, step in enumerate(record.steps):
            if isinstance(step, Look):
                text = answer_text(dataclasses.replace(record, steps=record.steps[:number]))
                np.testing.assert_array_equal(draw_look(record, [text], DATA), step.helper_image)
                looks += 1
    assert looks


@pytest.mark.parametrize("looks", ["moves", "distances"])
def test_a_record_is_given_the_steps_of_a_training_record(looks):
    data = DataConfig(frozen_lake=FrozenLakeConfig(looks=looks, levels=(3, 5), sweeps=2, read_out="none"))
    source = FrozenLakeSource(data.frozen_lake, seed=4, count=6)
    for record in (source[number] for number in range(6)):
        larger = dataclasses.replace(record, images=(draw_map(record.map_desc),), steps=(), question="?")
        made = with_steps(larger, data)
        assert (made.question, made.map_desc, len(made.steps)) == ("?", record.map_desc, len(record.steps))
        np.testing.assert_array_equal(made.images[0], larger.images[0])
        texts = []
        for step, other in zip(made.steps, record.steps, strict=True):
            if isinstance(step, Look):
                scale = 64 / 28
                assert step.helper_image.shape[0] == other.helper_image.shape[0] * scale
                np.testing.assert_array_equal(draw_look(larger, texts, data), step.helper_image)
                np.testing.assert_array_equal(draw_look(record, texts, data), other.helper_image)
            else:
                assert step == other
                texts.append(step.content)
        if looks == "distances":  # after the last sketch, it is drawn again
            np.testing.assert_array_equal(draw_look(record, [""] * 5, data), record.steps[-2].helper_image)
    with pytest.raises(BadRecord, match="^map 1: the map must have a path from start to goal, got none$"):
        with_steps(dataclasses.replace(record_of(((1, -1, 2),) * 1), name="map 1"), data)


def record_of(map_desc, answer=None, cell_pixels=8):
    steps = (Look(draw_map(map_desc, 8)),)
    return Record("?", (draw_map(map_desc, cell_pixels),), steps, answer=answer, map_desc=map_desc, name="record 3")


@given(MAPS, st.integers(0, 3))
@settings(deadline=None, max_examples=150)
def test_edits_move_one_hole_and_change_or_keep_the_path(map_desc, seed):
    path = shortest_path(map_desc)
    record = record_of(map_desc, path)
    made = edits(record, seed)
    assert made.keys() <= {"relevant", "irrelevant"} and (path is not None or not made)
    old = np.array(map_desc)
    for kind, edited in made.items():
        new = np.array(edited.map_desc)
        changes = sorted(zip(old[old != new].tolist(), new[old != new].tolist(), strict=True))
        assert changes == ([(-1, 0), (0, -1)] if (old == -1).any() else [(0, -1)])
        new_path = shortest_path(edited.map_desc)
        assert edited.answer == new_path and play(edited.map_desc, new_path) == Outcome.GOAL
        assert (edited.name, edited.steps, edited.question) == (f"record 3 {kind} edit", (), "?")
        assert (play(edited.map_desc, path) == Outcome.HOLE) == (kind == "relevant")
    if "relevant" in made:
        new_path = made["relevant"].answer
        assert new_path != path and len(new_path) <= len(path) + 2
    if "irrelevant" in made:
        assert made["irrelevant"].answer == path and play(made["irrelevant"].map_desc, path) == Outcome.GOAL
        before, after = distance_to_goal(map_desc), distance_to_goal(made["irrelevant"].map_desc)
        assert all(before[cell] == after[cell] for cell in walk(map_desc, path))


def all_edits(map_desc):
    """Yield every map with one hole moved, or one more if there is none."""
    cells = np.array(map_desc)
    for hole in np.argwhere(cells == -1).tolist() or [None]:
        for row, column in np.argwhere(cells == 0).tolist():
            new = cells.copy()
            if hole:
                new[tuple(hole)] = 0
            new[row, column] = -1
            yield tuple(map(tuple, new.tolist()))


@given(maps(st.integers(1, 4), st.integers(2, 4)))
@settings(deadline=None, max_examples=100)
def test_edits_are_absent_only_if_there_are_none_and_are_the_preferred_ones(map_desc):
    path = shortest_path(map_desc)
    made = edits(record_of(map_desc), 0)
    assert all(edited.answer is None for edited in made.values())
    if path is None:
        assert not made
        return

    def preference(edited):
        new_path = shortest_path(edited)
        return play(map_desc, new_path) == Outcome.GOAL, abs(len(new_path) - len(path))

    possible = [edited for edited in all_edits(map_desc) if shortest_path(edited)]
    relevant = [edited for edited in possible if play(edited, path) != Outcome.GOAL]
    relevant = [edited for edited in relevant if len(shortest_path(edited)) <= len(path) + 2]
    irrelevant = [edited for edited in possible if shortest_path(edited) == path]
    assert ("relevant" in made) == bool(relevant) and ("irrelevant" in made) == bool(irrelevant)
    if relevant:
        assert preference(made["relevant"].map_desc) == min(map(preference, relevant))
    if irrelevant and len(path) <= 4:
        paths = ["".join(moves) for moves in itertools.product("UDLR", repeat=len(path))]
        paths = [moves for moves in paths if play(map_desc, moves) == Outcome.GOAL]
        keeps_all = [all(play(edited, moves) == Outcome.GOAL for moves in paths) for edited in irrelevant]
        kept = all(play(made["irrelevant"].map_desc, moves) == Outcome.GOAL for moves in paths)
        assert kept == any(keeps_all)


@given(MAPS, st.sampled_from([5, 28, 64]))
@settings(deadline=None, max_examples=40)
def test_images_of_edits_differ_in_the_changed_cells_alone(map_desc, size):
    record = record_of(map_desc, cell_pixels=size)
    for edited in edits(record, 0).values():
        differ = (record.images[0] != edited.images[0]).any(-1)
        by_cell = differ.reshape(len(map_desc), size, len(map_desc[0]), size).any((1, 3))
        np.testing.assert_array_equal(by_cell, np.array(map_desc) != np.array(edited.map_desc))


def test_edits_are_functions_of_map_and_seed():
    source = FrozenLakeSource(FrozenLakeConfig(levels=(5, 6)), seed=4, count=10)
    records = [source[number] for number in range(10)]

    def maps_of_edits(record, seed):
        return {kind: edited.map_desc for kind, edited in edits(record, seed).items()}

    assert all(
        maps_of_edits(record, 1) == maps_of_edits(record_of(record.map_desc, cell_pixels=28), 1) for record in records
    )
    assert len({maps_of_edits(records[0], seed)["irrelevant"] for seed in range(5)}) > 1


def test_most_real_maps_have_edits():
    real = [tuple(map(tuple, json.loads(line)["map_desc"])) for line in REAL_MAPS.read_text().splitlines()]
    relevant, irrelevant, judged = 0, 0, 0
    for record in map(record_of, real):
        made = edits(record, 0)
        relevant, irrelevant = relevant + ("relevant" in made), irrelevant + ("irrelevant" in made)
        if "relevant" in made:
            path = shortest_path(made["relevant"].map_desc)
            judged += follows_donor(vsp_planning, record, made["relevant"], path)
    # 44 paths have one move, without a cell for a hole. With 62 other edits, the edit's path is right on both maps.
    assert sum(len(shortest_path(map_desc)) == 1 for map_desc in real) == 44
    assert (relevant, irrelevant, judged) == (154, 195, 92)


def test_an_answer_follows_the_donor_if_it_is_right_there_and_wrong_here():
    record, donor = record_of(((1, -1, 2), (0, 0, 0))), record_of(((1, 0, 2), (0, -1, 0)))
    expected = {"RR": True, "DRRU": False, "RRL": False, "": False, None: False}
    assert {answer: follows_donor(vsp_planning, record, donor, answer) for answer in expected} == expected
    free, edited = record_of(((1, 0, 2), (0, 0, 0))), record_of(((1, -1, 2), (0, 0, 0)))
    assert not follows_donor(vsp_planning, free, edited, "DRRU")  # right on both
    assert follows_donor(vsp_planning, edited, free, "RR")


@given(MAPS)
@settings(deadline=None, max_examples=100)
def test_the_path_of_a_record_is_followed_by_its_relevant_edit(map_desc):
    record = record_of(map_desc)
    edited = edits(record, 0).get("relevant")
    assert edited is None or follows_donor(vsp_planning, edited, record, shortest_path(map_desc))


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


@settings(deadline=None, max_examples=20)
@given(maps(st.just(3), st.just(3)) | maps(st.just(4), st.just(4)), st.integers(1, 3), st.booleans())
def test_states_of_slots_are_what_the_sketches_show(map_desc, sweeps, last):
    lake = FrozenLakeConfig(levels=(3, 5), looks="distances", sweeps=sweeps, sketches="last" if last else "all")
    data, side = DataConfig(frozen_lake=lake), len(map_desc)
    record = Record("?", (draw_map(map_desc, 28),), (), map_desc=map_desc)
    assume(shortest_path(map_desc) is not None)
    states = vsp_planning.slot_states(record, data)
    sketches = [step.helper_image for step in vsp_planning.with_steps(record, data).steps if isinstance(step, Look)]
    assert states.shape == (1 if last else sweeps + 1, 25) and len(sketches) == len(states)
    moves = ["up", "down", "left", "right"]
    of_moves = {**dict(enumerate(2 * moves)), 12: "goal", 13: "hole", 15: "far"}
    of_distances = {**{number: str(number) for number in range(13)}, 13: "hole", 14: "elf", 15: "far"}
    for number, (named, sketch) in enumerate(zip(states, sketches, strict=True)):
        number = sweeps if last else number
        words = of_moves if number == sweeps else of_distances
        for place, sign in enumerate(itertools.chain.from_iterable(read_sketch(sketch))):
            row, column = divmod(24 - place if number % 2 else place, 5)
            assert named[place] == (words[sign] if max(row, column) < side else "")


def test_states_of_slots_are_those_of_looks_at_distances():
    record = Record("?", (), (), map_desc=((1, 0, 2), (0, 0, 0), (0, 0, 0)))
    with pytest.raises(BadConfig, match="`data.frozen_lake.looks` must be distances for slots .*, got moves"):
        vsp_planning.slot_states(record, DataConfig())
