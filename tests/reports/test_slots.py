"""The report on slots: every row is in the table and on the page, which fetches nothing; the plot by its pixels."""

import html
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from rich.console import Console

from ilvr_jax.evaluation.interventions import INTERVENTIONS
from ilvr_jax.evaluation.paired import compare
from ilvr_jax.reports.bars import INK, NEITHER, VARIABLES, bar_colour
from ilvr_jax.reports.pictures import EYE, RIGHT, WRONG
from ilvr_jax.reports.slots import READINGS, draw_slots, inline_svg, slot_rows, slot_table, write_slots_page


def row_of(name, accuracy, low=None, high=None, reference=0.8, replaced="inputs", p=0.5, **groups):
    if name == "own":
        return {"name": "own", "replaced": "", "accuracy": accuracy, "difference": None, "interval": None, "p": None}
    difference = {"difference": accuracy - reference, "interval": (low, high), "p": p}
    return {"name": name, "replaced": replaced, "accuracy": accuracy, **difference, "groups": groups}


ROWS = [
    row_of("own", 0.8),
    row_of("self", 0.8, 0.0, 0.0, p=1.0),
    row_of("swap", 0.5, -0.36, -0.24, p=1e-9, **{"holes in the way": 0.25, "detour needed": None}),
    row_of("swap", 0.79, -0.04, 0.02, replaced="states", **{"holes in the way": 0.5}),
    row_of("oracle", 0.9, 0.05, 0.15, p=0.0123),
    row_of("skip", 0.6, -0.25, -0.15, replaced="", p=None),
]
EVERYTHING = [row_of(name, 0.8 - 0.05 * (n > 2), -0.09, -0.01) for n, name in enumerate(INTERVENTIONS)]


def test_every_intervention_has_a_meaning_and_a_reading():
    assert READINGS.keys() == INTERVENTIONS.keys()
    assert all(sentence.endswith(".") for sentence in (*READINGS.values(), *INTERVENTIONS.values()))


def test_the_table_has_every_row():
    header, lines = slot_rows(ROWS)
    assert header == ["slots", "accuracy", "difference", "95 % interval", "p", "holes in the way", "detour needed"]
    assert lines[0] == ["own", "0.800", "–", "–", "–", "–", "–"]
    assert lines[1] == ["self (inputs)", "0.800", "+0.000", "+0.000 to +0.000", "1.000", "–", "–"]
    assert lines[2] == ["swap (inputs)", "0.500", "-0.300", "-0.360 to -0.240", "<0.001", "0.250", "–"]
    assert lines[3][0] == "swap (states)" and lines[4][4] == "0.012" and lines[5][:5:4] == ["skip", "–"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(slot_table(ROWS))
    text = console.export_text()
    assert "…" not in text and all(cell in text for line in lines for cell in line)


def colour_count(path, colour):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - np.array(to_rgb(colour)) * 255).max(-1) < 3).sum())


def test_bars_are_as_long_as_their_accuracy(tmp_path):
    path = tmp_path / "folder" / "slots.png"
    draw_slots(ROWS, path)
    counts = {colour: colour_count(path, colour) for colour in (EYE, RIGHT, WRONG, NEITHER, INK)}
    assert min(counts.values()) > 500
    draw_slots([*ROWS[:2], row_of("swap", 0.25, -0.6, -0.5), *ROWS[3:]], path)
    assert colour_count(path, RIGHT) == counts[RIGHT]
    removed = (0.5 - 0.25) / (0.5 + 0.6)  # of both bars of that colour
    assert colour_count(path, WRONG) / counts[WRONG] == pytest.approx(1 - removed, abs=0.03)


def test_a_bar_has_the_colour_of_its_interval():
    assert list(map(bar_colour, ROWS)) == [EYE, NEITHER, WRONG, NEITHER, RIGHT, WRONG]


def test_own_slots_on_fewer_samples_have_a_mark(tmp_path):
    def own_pixels(reference):
        draw_slots([row_of("own", 0.8), row_of("donor", 0.3, -0.1, 0.1, reference)], tmp_path / "slots.png")
        return colour_count(tmp_path / "slots.png", EYE)

    assert own_pixels(0.801) == own_pixels(0.8) < own_pixels(0.4) - 30


def test_the_svg_is_whole_and_the_same_each_time(tmp_path):
    draw_slots(ROWS, tmp_path / "a.svg")
    draw_slots(ROWS, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("rows", [ROWS, EVERYTHING], ids=["some", "all"])
def test_the_page_has_every_row_and_fetches_nothing(tmp_path, rows):
    path = tmp_path / "pages" / "slots.html"
    write_slots_page(path, rows, "Slots of <base>", "200 maps & 1 seed.")
    page = path.read_text()
    assert "http" not in page and "<script" not in page and "<link" not in page and "@import" not in page
    assert all(link.startswith("#") for link in re.findall(r"""(?:href|src)="([^"]*)\"""", page))
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", page))
    header, lines = slot_rows(rows)
    for line in lines:
        assert "".join(f"<td>{html.escape(cell)}</td>" for cell in line) in page
    assert "".join(f"<th>{name}</th>" for name in header) in page
    for name in {row["name"] for row in rows}:
        assert f"<dt>{name}</dt>" in page
        assert html.escape(f"{INTERVENTIONS[name]} {READINGS[name]}").replace("&#x27;", "&#39;") in page
    assert page.count("<dt>") == len({row["name"] for row in rows}) and page.count('class="reference"') == 1
    assert "<h1>Slots of &lt;base&gt;</h1>" in page and "200 maps &amp; 1 seed." in page


def test_the_page_is_for_phones_and_for_dark_screens(tmp_path):
    write_slots_page(tmp_path / "slots.html", ROWS, "Slots")
    page = (tmp_path / "slots.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count('<div class="table">\n<table') == page.count("<table") == 1
    light, dark = re.findall(r":root \{([^}]*)\}", page)
    for colour, name in VARIABLES.items():
        assert f"--{name}: {colour};" in light and f"--{name}: " in dark and f"--{name}: {colour};" not in dark
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    ElementTree.fromstring(svg.replace("xlink:", ""))
    assert not re.search("#[0-9a-f]{6}", svg) and "var(--lower)" in svg  # every colour follows the page
    opening = svg[: svg.index(">")]
    assert "viewBox" in opening and " width=" not in opening and " height=" not in opening


def test_rows_of_comparisons_can_be_reported(tmp_path):
    result = compare([True, True, False, True], [False, True, False, False])
    row = {"name": "zero", "replaced": "states", "accuracy": result.other, "difference": result.difference}
    rows = [row_of("own", result.own), {**row, "interval": result.interval, "p": result.p}]
    assert slot_rows(rows)[1][1] == ["zero (states)", "0.250", "-0.500", "-1.000 to +0.000", "0.500"]
    write_slots_page(tmp_path / "slots.html", rows, "Slots")


def test_rows_must_have_one_reference(tmp_path):
    for rows, count in (([], 0), (ROWS[1:], 0), (ROWS[:1] * 2, 2)):
        with pytest.raises(ValueError, match=f'`rows` must have one row named "own", got {count}'):
            write_slots_page(tmp_path / "slots.html", rows, "Slots")
        with pytest.raises(ValueError, match='`rows` must have one row named "own"'):
            inline_svg(rows)
