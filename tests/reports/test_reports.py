"""Tables hold the figures of summaries; pictures are checked by their pixels."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.frozen_lake.maps import shortest_path
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.records import Record
from ilvr_jax.evaluation.results import summarise
from ilvr_jax.inference.transcript import show_look
from ilvr_jax.reports.pictures import (
    CELL_PIXELS,
    EYE,
    RIGHT,
    WRONG,
    Solution,
    choose_answers,
    draw_answer,
    draw_solutions,
    moves_before_looks,
)
from ilvr_jax.reports.tables import accuracy_rows, accuracy_table, success_rows, success_table
from ilvr_jax.tasks.vsp_planning import PAINTED, figures, holes_matter, is_detour, play


def answer_of(map_desc, moves, looks=()):
    return Solution(map_desc, moves, looks)


@pytest.fixture(scope="module")
def maps():
    source = FrozenLakeSource(FrozenLakeConfig(levels=(3, 4)), seed=2, count=40)
    return [source[number].map_desc for number in range(40)]


FREE, BLOCKED = ((1, 0, 2), (0, 0, 0), (0, 0, 0)), ((1, -1, 2), (0, 0, 0), (0, 0, 0))


def line_of(number, map_desc, moves, looks=0, form=""):
    right, counts = play(map_desc, moves) == "goal", {"picture_tokens": 0, "tokens": 9, "looks": looks}
    key = {"number": number, "form": form, "sample": 0}
    return {**key, "answer": moves, "right": right, "stop_reason": "end", "slots": 4 * looks, **counts}


def summary_of_lines(maps, lines, seconds):
    records = {number: Record("?", (), (), map_desc=map_desc) for number, map_desc in enumerate(maps)}
    return {**summarise(lines), **figures(records, lines), "seconds": seconds}


def summary_of(moves):
    lines = [line_of(0, FREE, "RR", looks=1), line_of(1, BLOCKED, moves)]
    lines += [line_of(number, FREE, "RR", form=PAINTED) for number in range(2)]
    return summary_of_lines((FREE, BLOCKED), lines, 12.4)


def test_the_table_puts_stages_under_the_hole_blind_policy():
    stages = {"warm_up": summary_of("RR"), "stage1": summary_of(None), "stage2": summary_of("DRRU")}
    header, rows = success_rows(stages)
    assert {len(row) for row in rows} == {len(header)}
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    assert columns == {
        "": ("hole-blind", "warm_up", "stage1", "stage2"),
        "all": ("0.50", "0.50", "0.50", "1.00"),
        "level 3": ("0.50", "0.50", "0.50", "1.00"),
        "holes in the way": ("0.00", "0.00", "0.00", "1.00"),
        "detour needed": ("0.00", "0.00", "0.00", "1.00"),
        "same without holes": ("1.00", "1.00", "1.00", "0.50"),
        "no answer": ("–", "0", "1", "0"),
        "looks": ("–", "1", "1", "1"),
        "time": ("–", "12 s", "12 s", "12 s"),
    }


def test_groups_without_maps_are_dashes():
    summary = summary_of_lines((FREE,), [line_of(0, FREE, None)], 0.0)
    assert success_rows({"stage1": summary})[1][-1] == ["stage1", "0.00", "0.00", "–", "–", "–", "1", "0", "0 s"]


def test_the_table_fits_a_narrow_terminal():
    summary = summary_of("RR")
    for key in ("success_by_level", "hole_blind_by_level"):
        summary[key] = {str(level): 0.5 for level in (3, 4, 5, 6)}
    summary |= {"looks": 12345, "seconds": 123.0}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(success_table({"warm_up": summary}))
    text = console.export_text()
    assert "…" not in text and "12345" in text and "123 s" in text


def test_other_tasks_have_a_table_of_accuracy():
    summary = summary_of("RR") | {"cut_off": 1}
    header, rows = accuracy_rows({"stage1": summary, "stage2": summarise([]) | {"seconds": 3}})
    assert dict(zip(header, rows[0], strict=True)) == {
        "": "stage1",
        "questions": "2",
        "accuracy": "0.50",
        "95 % interval": "0.09–0.91",
        "no answer": "0",
        "cut off": "1",
        "looks": "1",
        "slots": "4",
        "time": "12 s",
    }
    assert rows[1] == ["stage2", "0", "–", "", "0", "0", "0", "0", "3 s"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(accuracy_table({"warm_up": summary}))
    assert "0.09–0.91" in console.export_text()


def test_moves_before_a_look_are_those_in_words():
    text = f"up{show_look(4)} then left{show_look(0, 9)} up-down{show_look(12)}right"
    assert moves_before_looks(text) == ("U", "UL", "ULUD")
    assert moves_before_looks("up, down") == ()


def hardest_first(hardness, taken):
    others = [value for value, chosen in zip(hardness, taken, strict=True) if not chosen]
    return min(value for value, chosen in zip(hardness, taken, strict=True) if chosen) >= max(others, default=0)


def test_a_picture_has_wrong_answers_every_level_and_the_hard_maps(maps):
    answers = [answer_of(m, shortest_path(m) if number % 5 else "UDUD") for number, m in enumerate(maps)]
    chosen = choose_answers(answers, count=12, wrong=4)
    assert len(chosen) == 12 and len(set(map(id, chosen))) == 12
    assert sum(not answer.success for answer in chosen) == 4
    assert {answer.level for answer in chosen} == {3, 4}
    assert [answer.level for answer in chosen] == sorted(answer.level for answer in chosen)
    for level in (3, 4):
        for success in (True, False):
            group = [answer for answer in answers if (answer.level, answer.success) == (level, success)]
            hardness = [is_detour(answer.map_desc) + holes_matter(answer.map_desc) for answer in group]
            taken = [answer in chosen for answer in group]
            assert hardest_first(hardness, taken)
    right = [answer for answer in answers if answer.success]
    assert all(answer.success for answer in choose_answers(right, 12, 4))
    wrong = [answer for answer in answers if not answer.success]
    assert len(choose_answers(wrong, 12, 4)) == len(wrong)
    assert choose_answers([], 12, 4) == []


def colour_count(path, colour):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 300
    return int((np.abs(pixels - np.array(to_rgb(colour)) * 255).max(-1) < 3).sum())


def test_the_picture_draws_moves_and_looks(tmp_path):
    def colours(*answers):
        draw_solutions(answers, tmp_path / "picture.png")
        return np.array([colour_count(tmp_path / "picture.png", colour) for colour in (RIGHT, WRONG, EYE)])

    still = colours(answer_of(FREE, None))  # title in red, legend in all colours
    solved = colours(answer_of(FREE, "DRRU"))
    looking = colours(answer_of(FREE, "DRRU", looks=("D", "D", "DR")))
    lost = colours(answer_of(BLOCKED, "DRR"))
    assert (solved - still)[0] > 1500 and (lost - still)[1] > 1000
    assert (lost - still)[0] <= 0
    assert (looking - solved)[2] > 150 and (solved - still)[2] == 0


def test_a_look_is_in_the_cell_that_the_moves_before_it_lead_to():
    panel = Figure().subplots()
    draw_answer(panel, answer_of(FREE, "RR", looks=("R", "D", "DDDDR")))  # the last two are off the boxed path
    cells = {text.get_text(): tuple(int(x // CELL_PIXELS) for x in text.get_position()) for text in panel.texts}
    assert {number: cells[number] for number in "123"} == {"1": (1, 0), "2": (0, 1), "3": (1, 2)}


def test_strange_answers_can_be_drawn(tmp_path):
    answers = [
        answer_of(FREE, "U" * 50, looks=("", "UUU", "D" * 99)),
        answer_of(BLOCKED, "RRRR", looks=("R",) * 6),
        answer_of(FREE, None, looks=("RR",)),
    ]
    draw_solutions(answers, tmp_path / "folder" / "picture.png")
    assert colour_count(tmp_path / "folder" / "picture.png", WRONG) > 1000
