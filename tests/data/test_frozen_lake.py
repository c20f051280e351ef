"""Generated maps and records: against gymnasium's FrozenLake, scipy's shortest paths and the real maps."""

import itertools
import json
import pickle
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import lil_array
from scipy.sparse.csgraph import shortest_path as scipy_distances

from ilvr_jax.config.experiments import DETOUR_MAPS, load_config
from ilvr_jax.config.fields import BadConfig, read
from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.formats import open_vsp
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.data.frozen_lake.maps import additional_moves, empty_map_distance, shortest_path, symmetries
from ilvr_jax.data.frozen_lake.sketches import move_signs, path_to_goal, sweep_distances
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource, cell_words, make_record
from ilvr_jax.data.images import open_image
from ilvr_jax.data.records import BadRecord, Look, Text
from tests.maps import maps, read_sketch
from tests.paths import REPOSITORY

REAL_MAPS = Path(__file__).parent / "vsp_planning" / "test.jsonl"
WORDS = {"U": "up", "D": "down", "L": "left", "R": "right"}
few = settings(deadline=None, max_examples=25)


MAPS = maps(st.integers(1, 5), st.integers(2, 6))


def distances_to_goal(map_desc, blocked=(-1,)) -> np.ndarray:
    """Return scipy's distance of each cell to the goal, infinite where there is no way or a hole."""
    cells = np.array(map_desc)
    cells[np.isin(cells, blocked)] = -1
    numbers = np.arange(cells.size).reshape(cells.shape)
    graph = lil_array((cells.size, cells.size))
    for nodes, neighbours in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        for node, other in zip(nodes.ravel(), neighbours.ravel(), strict=True):
            if cells.flat[node] != -1 and cells.flat[other] != -1:
                graph[node, other] = 1
    goal = int(np.flatnonzero(cells == 2)[0])
    return scipy_distances(graph.tocsr(), directed=False, indices=goal).reshape(cells.shape)


def play(map_desc, moves: str) -> tuple[list[tuple[int, int]], float]:
    """Return the cells that gymnasium's elf visits, and the sum of the rewards; fails if it moves after the end."""
    letters = {1: "S", 2: "G", -1: "H", 0: "F"}
    game = gymnasium.make(
        "FrozenLake-v1", desc=["".join(letters[cell] for cell in row) for row in map_desc], is_slippery=False
    )
    position, _ = game.reset()
    cells, rewards, ended = [divmod(position, len(map_desc[0]))], 0.0, False
    for move in moves:
        assert not ended
        position, reward, ended, _, _ = game.step("LDRU".index(move))
        cells.append(divmod(int(position), len(map_desc[0])))
        rewards += reward
    return cells, rewards


def contents(record) -> tuple:
    """Return all that a record says and shows, to be compared."""
    steps = [step.content if isinstance(step, Text) else step.helper_image.tobytes() for step in record.steps]
    pictures = [(picture.shape, picture.tobytes()) for picture in record.images]
    return record.question, pictures, steps, record.answer, record.map_desc, record.name


@given(MAPS)
@settings(deadline=None, max_examples=100)
def test_paths_are_as_short_as_scipys_and_reach_the_goal(map_desc):
    distance = distances_to_goal(map_desc)[np.array(map_desc) == 1].item()
    moves = shortest_path(map_desc)
    if moves is None:
        assert distance == np.inf
    else:
        assert len(moves) == distance
        assert play(map_desc, moves)[1] == 1


def test_ties_are_broken_up_or_down_first():
    assert shortest_path(((1, 0, 0), (0, 0, 0), (0, 0, 2))) == "DDRR"
    assert shortest_path(((2, 0, 0), (0, 0, 0), (0, 0, 1))) == "UULL"
    assert shortest_path(((1, 0, 0), (0, 0, 0), (-1, 0, 2))) == "DRDR"
    assert shortest_path(((1, -1, 2),)) is None


@given(st.integers(0, 2**40), st.sampled_from([3, 4, 5, 6, 8]), st.integers(3, 12))
@few
def test_generated_maps_are_solved_by_their_answer(seed, level, max_moves):
    record = FrozenLakeSource(FrozenLakeConfig(levels=(level,), max_moves=max_moves, detour_share=0.0), seed, 3)[2]
    cells = np.array(record.map_desc)
    assert cells.shape == (level, level)
    assert ((cells == 1).sum(), (cells == 2).sum()) == (1, 1) and set(cells.flat) <= {-1, 0, 1, 2}
    assert len(record.answer) == distances_to_goal(record.map_desc)[cells == 1].item() <= max_moves
    assert play(record.map_desc, record.answer)[1] == 1
    assert record.name == "frozen_lake record 2"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_detours_holds(share):
    def detours(settings):
        records = FrozenLakeSource(settings, seed=8, count=200)
        return np.mean([len(record.answer) > empty_map_distance(record.map_desc) for record in records])

    by_chance = detours(FrozenLakeConfig(levels=(4,), detour_share=0.0))
    assert by_chance < 0.2
    # Those that need not have a detour have one as often as by chance; 0.11 is three deviations at 200 records.
    expected = share + (1 - share) * by_chance
    assert abs(detours(FrozenLakeConfig(levels=(4,), detour_share=share)) - expected) <= (0.11 if share < 1 else 0)


def test_detours_have_the_least_number_of_additional_moves():
    def shortest(least):
        chosen = FrozenLakeConfig(levels=(5,), hole_probability=0.3, detour_share=1.0, detour_moves=least)
        maps = [record.map_desc for record in FrozenLakeSource(chosen, seed=2, count=40)]
        starts = [np.array(map_desc) == 1 for map_desc in maps]
        return min(
            distances_to_goal(map_desc)[start].item() - empty_map_distance(map_desc)
            for map_desc, start in zip(maps, starts, strict=True)
        )

    assert [shortest(least) for least in (1, 3, 4)] == [2, 4, 4]
    assert additional_moves(((1, -1, 0), (-1, 0, 0), (0, 0, 2))) < 0  # no path: no detour either


def test_the_maps_with_long_detours_are_drawn_as_they_are_described():
    records, settings = list(open_vsp(REPOSITORY / DETOUR_MAPS, None)), FrozenLakeConfig(looks="distances")
    assert len(records) == 200
    for record in records:
        map_desc = record.map_desc
        distance = distances_to_goal(map_desc)[np.array(map_desc) == 1].item()
        assert distance >= empty_map_distance(map_desc) + 4 and play(map_desc, record.answer)[1] == 1
        assert record.answer == path_to_goal(map_desc, settings)
        np.testing.assert_array_equal(open_image(record.images[0], "map"), draw_map(map_desc, 64))
    assert DETOUR_MAPS in load_config(REPOSITORY / "configs/base.py").data.frozen_lake.exclude


def test_levels_are_equally_likely_unless_named_twice():
    sides = [len(record.map_desc) for record in FrozenLakeSource(FrozenLakeConfig(levels=(3, 5, 5)), 1, 300)]
    assert abs(sides.count(3) - 100) < 25 and sides.count(3) + sides.count(5) == 300


def test_holes_are_as_dense_as_in_the_real_maps():
    real = [json.loads(line)["map_desc"] for line in REAL_MAPS.read_text().splitlines()]
    made = [record.map_desc for record in FrozenLakeSource(FrozenLakeConfig(), seed=2, count=800)]
    for level in (3, 4, 5, 6):
        expected, density = (
            np.mean([np.mean(np.array(map_desc) == -1) for map_desc in group if len(map_desc) == level])
            for group in (real, made)
        )
        assert abs(density - expected) < 0.035


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.sampled_from([(3,), (3, 4, 5, 6)]))
@few
def test_a_record_depends_on_settings_seed_and_number_alone(seed, number, levels):
    settings = FrozenLakeConfig(levels=levels)
    source = FrozenLakeSource(settings, seed, number + 5)
    record = contents(source[number])
    _ = source[number + 1]
    assert contents(source[number]) == record
    assert contents(pickle.loads(pickle.dumps(source))[number]) == record
    assert contents(FrozenLakeSource(settings, seed, number + 1)[number]) == record


def test_seeds_and_numbers_give_other_records():
    maps = {
        (seed, number): FrozenLakeSource(FrozenLakeConfig(levels=(6,)), seed, 40)[number].map_desc
        for seed in range(3)
        for number in range(40)
    }
    assert len(set(maps.values())) == len(maps)


def test_a_source_ends():
    source = FrozenLakeSource(FrozenLakeConfig(), seed=0, count=2)
    assert len(source) == len(list(source)) == 2
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"^the record must be from 0 to 1, got {index}$"):
            source[index]


def turned_and_mirrored(map_desc) -> set:
    cells = np.array(map_desc)
    turned = [np.rot90(way, turns) for way in (cells, cells.T) for turns in range(4)]
    return {tuple(map(tuple, way.tolist())) for way in turned}


@given(MAPS)
@few
def test_symmetries_are_the_8_turned_and_mirrored_maps(map_desc):
    assert len(list(symmetries(map_desc))) == 8
    assert set(symmetries(map_desc)) == turned_and_mirrored(map_desc)


def test_excluded_maps_are_not_generated_turned_or_mirrored_either(tmp_path):
    def small_maps(seed, count, **settings):
        source = FrozenLakeSource(FrozenLakeConfig(levels=(3,), **settings), seed, count)
        return [record.map_desc for record in source]

    excluded = small_maps(0, 500)
    path = tmp_path / "excluded.jsonl"
    path.write_text("\n".join(json.dumps({"map_desc": map_desc, "other": 1}) for map_desc in excluded) + "\n\n")
    forbidden = set().union(*map(turned_and_mirrored, excluded))
    assert sum(map_desc in forbidden for map_desc in small_maps(1, 300)) > 150
    assert not forbidden.intersection(small_maps(1, 300, exclude=(str(path),)))
    assert not forbidden.intersection(small_maps(1, 50, exclude=(str(REAL_MAPS), str(path))))


def test_the_real_maps_can_be_excluded():
    source = FrozenLakeSource(FrozenLakeConfig(exclude=(str(REAL_MAPS),)), seed=0, count=1)
    real = [json.loads(line)["map_desc"] for line in REAL_MAPS.read_text().splitlines()]
    assert source.excluded == set().union(*map(turned_and_mirrored, real))


@given(MAPS)
@few
def test_words_of_cells_are_their_kinds_or_their_distances_to_the_goal(map_desc):
    kinds = {1: "elf", 2: "goal", -1: "hole", 0: "ice"}
    assert cell_words(map_desc, "map") == [[kinds[cell] for cell in row] for row in map_desc]
    far = distances_to_goal(map_desc)
    for row, words in enumerate(cell_words(map_desc, "distances")):
        for column, word in enumerate(words):
            distance, kind = far[row, column], map_desc[row][column]
            if kind:
                assert word == kinds[kind]
            else:
                assert word == ("cut" if distance == np.inf else "far" if distance > 9 else str(int(distance)))


@few
@given(MAPS)
def test_sweeps_come_down_to_scipys_distances_without_paths_through_the_start(map_desc):
    expected = distances_to_goal(map_desc, blocked=(-1, 1))
    found = [np.full(expected.shape, np.inf) for _ in range(20)]
    for array, distances in zip(found, sweep_distances(map_desc, 20), strict=True):
        for cell, distance in distances.items():
            array[cell] = distance
    assert all((after <= before).all() for before, after in itertools.pairwise(found))
    np.testing.assert_array_equal(found[-1], expected)
    by_hand = np.where(np.array(map_desc) == 2, 0.0, np.inf)
    for row, column in np.ndindex(by_hand.shape):
        if map_desc[row][column] == 0:
            near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            near = [by_hand[cell] for cell in near if min(cell) >= 0 and (np.array(cell) < by_hand.shape).all()]
            by_hand[row, column] = min(near, default=np.inf) + 1
    np.testing.assert_array_equal(found[0], by_hand)  # each cell after those above it and to its left


@few
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_looks_at_distances_and_at_moves_precede_the_moves_and_every_second_is_turned(seed, sweeps):
    chosen = FrozenLakeConfig(levels=(3, 4), looks="distances", sweeps=sweeps, read_out="none")
    record = FrozenLakeSource(chosen, seed=seed, count=1)[0]
    looks = [step.helper_image for step in record.steps if isinstance(step, Look)]
    texts = [step.content for step in record.steps if isinstance(step, Text)]
    assert texts[:-1] == [""] * len(looks) and len(looks) == sweeps + 1
    assert [word for word in texts[-1].split() if word in WORDS.values()] == [WORDS[move] for move in record.answer]
    assert all(look.shape == (4 * 28, 4 * 28, 3) for look in looks)  # the largest level
    side, map_desc = len(record.map_desc), record.map_desc
    shown = [read_sketch(look) for look in looks]
    shown = [[row[::-1] for row in look[::-1]] if number % 2 else look for number, look in enumerate(shown)]
    *by_sweep, best = shown
    for look, distances in zip(by_sweep, sweep_distances(map_desc, sweeps), strict=True):
        for row, column in np.ndindex(4, 4):
            kind = map_desc[row][column] if max(row, column) < side else -1
            distance = distances.get((row, column), 15)
            assert look[row][column] == {-1: 13, 1: 14}.get(kind, distance if distance <= 12 else 15)
    last = np.full((6, 6), np.inf)  # a border around the cells
    for (row, column), distance in distances.items():
        last[row + 1, column + 1] = distance
    for row, column in np.ndindex(4, 4):
        kind = map_desc[row][column] if max(row, column) < side else -1
        near = [last[row, column + 1], last[row + 2, column + 1], last[row + 1, column], last[row + 1, column + 2]]
        move = int(np.argmin(near)) if np.isfinite(near).any() else 15
        assert best[row][column] == {-1: 13, 2: 12, 1: move + 4 if move < 4 else 15}.get(kind, move)


def follow(signs):
    """Return the letters of the moves that a sketch shows from the start to the goal."""
    ((row, column),), moves = np.argwhere((signs >= 4) & (signs < 8)), ""
    while signs[row, column] != 12:
        moves += "UDLR"[signs[row, column] % 4]
        down, right = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}[moves[-1]]
        row, column = row + down, column + right
    return moves


@pytest.mark.parametrize("sweeps", [1, 2, 12])
def test_answers_follow_the_moves_of_the_last_look(sweeps):
    """They differ from `shortest_path` where the sweeps have not found all distances."""
    source = FrozenLakeSource(FrozenLakeConfig(looks="distances", sweeps=sweeps), seed=3, count=120)
    others = 0
    for map_desc, answer in ((source[number].map_desc, source[number].answer) for number in range(120)):
        assert follow(move_signs(map_desc, sweep_distances(map_desc, sweeps)[-1], 6)) == answer
        others += answer != shortest_path(map_desc)
    assert (others > 0) == (sweeps < 12)


def test_readings_ask_for_the_map_in_words():
    source = FrozenLakeSource(FrozenLakeConfig(readings=0.3), seed=0, count=400)
    readings = [record for record in (source[number] for number in range(400)) if record.question == "Read the map."]
    assert 90 < len(readings) < 150
    for record in readings:
        (step,) = record.steps
        words = [line.split() for line in step.content.splitlines()]
        assert words == cell_words(record.map_desc, "map")
        np.testing.assert_array_equal(record.images[0], draw_map(record.map_desc, 28))


def test_sketches_may_be_the_last_alone_or_those_of_an_unrelated_map():
    def looks(sketches):
        source = FrozenLakeSource(
            FrozenLakeConfig(looks="distances", read_out="none", levels=(4,), sketches=sketches), seed=1, count=20
        )
        records = [source[number] for number in range(20)]
        return records, [[step.helper_image for step in record.steps if isinstance(step, Look)] for record in records]

    (records, every), (_, last), (others, unrelated) = (looks(name) for name in ("all", "last", "unrelated"))
    assert [record.map_desc for record in records] == [record.map_desc for record in others]
    for shown, alone, other in zip(every, last, unrelated, strict=True):
        assert len(shown) == len(other) == 3 and len(alone) == 1
        np.testing.assert_array_equal(alone[0], shown[-1])
        assert not np.array_equal(other[-1], shown[-1])


def test_sketches_in_words_say_what_looks_show():
    map_desc = ((1, -1, 2), (0, 0, 0), (0, -1, 0))
    record = make_record(map_desc, "DRRU", FrozenLakeConfig(looks="moves", moves_per_look=9, read_out="sketches"))
    words = record.steps[0].content.split()
    assert words[:9] == "elf hole 0 far far 1 far hole 2".split()
    assert words[9:18] == "elf hole 0 3 2 1 far hole 2".split()
    assert words[18:27] == "down hole goal right right up up hole up".split()
    assert words[27:] == "0 0 down 1 0 right 1 1 right 1 2 up \\boxed{DRRU}".split()


def test_cells_cut_off_and_far_away():
    corridor = ((2, *[0] * 11, 1), (0, -1, *[0] * 11), (-1, 0, -1, *[0] * 10))
    words = cell_words(corridor, "distances")
    assert words[0] == ["goal", *"123456789", "far", "far", "elf"]
    assert words[2][:4] == ["hole", "cut", "hole", "5"]


@given(
    st.integers(0, 2**40),
    st.integers(1, 4),
    st.sampled_from(["distances", "map", "none"]),
    st.sampled_from(["row_column", "none"]),
    st.sampled_from([8, 28]),
)
@settings(deadline=None, max_examples=40)
def test_a_record_has_the_map_the_moves_and_looks_in_between(seed, per_look, read_out, cell_names, cell_pixels):
    record = FrozenLakeSource(
        FrozenLakeConfig(
            moves_per_look=per_look,
            read_out=read_out,
            cell_names=cell_names,
            cell_pixels=cell_pixels,
            question="Which way?",
        ),
        seed,
        1,
    )[0]
    moves, (cells, _) = record.answer, play(record.map_desc, record.answer)
    assert record.question == "Which way?"
    (picture,) = record.images
    np.testing.assert_array_equal(picture, draw_map(record.map_desc, cell_pixels))
    texts, looks = record.steps[::2], record.steps[1::2]
    assert all(isinstance(step, Text) for step in texts) and all(isinstance(step, Look) for step in looks)
    assert len(texts) == len(looks) + 1 == -(-len(moves) // per_look)

    opening = ""
    if read_out != "none":
        opening = "".join(" " + " ".join(row) + "\n" for row in cell_words(record.map_desc, read_out))
    phrases = [
        f" {row} {column} {WORDS[move]}" if cell_names == "row_column" else f" {WORDS[move]}"
        for (row, column), move in zip(cells[:-1], moves, strict=True)
    ]
    expected = ["".join(phrases[first : first + per_look]) for first in range(0, len(phrases), per_look)]
    expected[0] = opening + expected[0]
    expected[-1] += rf" \boxed{{{moves}}}"
    assert [step.content for step in texts] == expected
    for number, look in enumerate(looks, start=1):
        after = draw_map(
            record.map_desc, cell_pixels, elf=cells[number * per_look], last_move=moves[number * per_look - 1]
        )
        np.testing.assert_array_equal(look.helper_image, after)


@pytest.mark.parametrize(
    ("cell_names", "texts"),
    [
        ("row_column", [" 0 0 down 1 0 right", " 1 1 right 1 2 goal \\boxed{DRR}"]),
        ("none", [" down right", " right goal \\boxed{DRR}"]),
    ],
)
def test_the_goal_may_be_named_after_the_last_move(cell_names, texts):
    chosen = FrozenLakeConfig(read_out="none", cell_names=cell_names, name_goal=True)
    record = make_record(((1, 0, -1), (0, 0, 2), (-1, 0, 0)), "DRR", chosen)
    assert [step.content for step in record.steps[::2]] == texts


@pytest.mark.parametrize(
    "key, value, rule",
    [
        ("levels", 3, "a tuple"),
        ("levels", (), "name at least one"),
        ("levels", (3, 11), "from 3 to 10"),
        ("levels", ("3",), "a tuple of int"),
        ("hole_probability", "0.2", "a number"),
        ("hole_probability", 0.95, "from 0 to 0.9"),
        ("hole_probability", float("nan"), "a finite number"),
        ("detour_share", -0.1, "from 0 to 1"),
        ("detour_moves", 0, "at least 1"),
        ("max_moves", 2.5, "an integer"),
        ("max_moves", 0, "at least 1"),
        ("moves_per_look", 0, "at least 1"),
        ("cell_pixels", -28, "at least 1"),
        ("question", None, "text"),
        ("read_out", "words", "one of distances, map, sketches, none"),
        ("cell_names", "", "one of row_column, none"),
        ("exclude", "maps.jsonl", "a tuple"),
        ("exclude", (1,), "a tuple of str"),
    ],
)
def test_a_bad_setting_is_named(key, value, rule):
    with pytest.raises(
        BadConfig, match=f"^`data.frozen_lake.{key}` must {'' if rule.startswith('name') else 'be '}{rule}, got "
    ):
        read(FrozenLakeConfig, {key: value}, "data.frozen_lake")


def test_cells_of_four_squares_have_even_sides():
    with pytest.raises(BadConfig, match="`data.frozen_lake.cell_pixels` must be even with looks at distances.*got 27"):
        read(FrozenLakeConfig, {"looks": "distances", "cell_pixels": 27}, "data.frozen_lake")


def test_settings_are_read_from_a_config():
    section = {"levels": [4], "hole_probability": 0, "exclude": ("a.jsonl",)}
    settings = FrozenLakeConfig(levels=(4,), hole_probability=0.0, exclude=("a.jsonl",))
    assert read(FrozenLakeConfig, section, "data.frozen_lake") == settings
    with pytest.raises(BadConfig, match=r"frozen_lake\.moves_a_look` .* nearest is data.frozen_lake.moves_per_look"):
        read(FrozenLakeConfig, {"moves_a_look": 2}, "data.frozen_lake")


def test_settings_that_allow_no_map_are_an_error_at_the_record():
    source = FrozenLakeSource(FrozenLakeConfig(levels=(3,), max_moves=1, detour_share=1.0), seed=0, count=1)
    message = (
        r"^data\.frozen_lake: hole_probability 0\.18, detour_share 1\.0, detour_moves 1, .* of level 3, "
        "but none of 20000 maps met them"
    )
    with pytest.raises(ValueError, match=message):
        source[0]


def test_an_exclude_file_that_is_missing_is_named(tmp_path):
    path = tmp_path / "none.jsonl"
    with pytest.raises(BadRecord) as error:
        FrozenLakeSource(FrozenLakeConfig(exclude=(str(path),)), seed=0, count=1)
    assert str(error.value) == (
        f"data.frozen_lake.exclude: {path} must be a file of records, but cannot be read: No such file or directory"
    )


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{}", '"map_desc" must be rows of 1 start'),
        ('{"map_desc": [[1, 0], [2]]}', '"map_desc" must have rows of equal length, got 2, 1 cells'),
        ('{"map_desc": [[1, 0], [0, 0]]}', '"map_desc" must have one goal (2), got 0'),
        ('{"map_desc": [[1, 3], [0, 2]]}', '"map_desc" must have cells of 1 start, 2 goal, -1 hole and 0 ice, got 3'),
        ("[1]", "must be one JSON object, got a list"),
        ('{"map_desc"', "must be one JSON object in UTF-8, but is not JSON ("),
        ("[" * 100_000, "must be one JSON object in UTF-8, but is not JSON ("),
        ("\udcff", "must be one JSON object in UTF-8, but is not JSON ("),
    ],
)
def test_a_line_without_a_map_is_named(tmp_path, line, problem):
    path = tmp_path / "maps.jsonl"
    path.write_text(f'{{"map_desc": [[1, 2]]}}\n\n{line}\n', errors="surrogateescape")
    with pytest.raises(BadRecord) as error:
        FrozenLakeSource(FrozenLakeConfig(exclude=(str(path),)), seed=0, count=1)
    assert str(error.value).startswith(f"data.frozen_lake.exclude: {path} line 3: {problem}")
    assert "\n" not in str(error.value)
