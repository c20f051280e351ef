"""The page of answers: its data come back as they were, hostile text stays text, and a browser shows what is asked."""

import base64
import io
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from ilvr_jax.reports.trace import LookTrace, Trace, pack_map, sample_content, write_trace_page

HOSTILE = "</script><img src=x onerror=alert(1)> & <!--<script> {{ 7*7 }} \u2028 \ud800"
EMBEDDED = re.compile(r'<script type="application/json" id="([a-z]+(?:-\d+)?)">(.*?)</script>', re.DOTALL)


def random_trace(number, right=True, answer="R", level="level 3", question="Which way?", texts=("a ", " b")):
    random = np.random.default_rng(number)
    states = ("1", "2", "hole", "")
    look = LookTrace(
        slots=4,
        columns=2,
        cosines=random.uniform(-1, 1, (4, 6)),
        attention=random.uniform(0, 1e-3, (4, 6)),
        helper_image=random.integers(0, 256, (56, 56, 3), np.uint8),
        helper_grid=(2, 2),
        helper_cosines=random.uniform(-1, 1, (4, 4)),
        states=states,
        read=("1", "far", "hole", ""),
    )
    image = random.integers(0, 256, (56, 84, 3), np.uint8)
    looks = [look] * (len(texts) - 1)
    return Trace(
        number, f"map {number}", question, texts, answer, right, 9 + number, level, (), [image], [(2, 3)], looks
    )


TRACES = [
    random_trace(0, question=HOSTILE, texts=(HOSTILE, " then ", HOSTILE)),
    random_trace(1, right=False, level="level 4"),
    random_trace(2, right=False, answer=None, texts=("nothing",)),
    random_trace(3, level="level 4"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "out-trace.html"
    write_trace_page(path, iter(TRACES), "Answers of <task>", "4 answers & none else.")
    return path


def test_data_come_back_as_they_were(page):
    content = {name: json.loads(text) for name, text in EMBEDDED.findall(page.read_text())}
    assert [entry["outcome"] for entry in content["index"]] == ["right", "wrong", "unparsed", "right"]
    assert list(content) == ["index", *(f"sample-{number}" for number in range(4))]
    for number, trace in enumerate(TRACES):
        sample = content[f"sample-{number}"]
        assert (sample["question"], sample["texts"], sample["answer"]) == (
            trace.question,
            list(trace.texts),
            trace.answer,
        )
        png = base64.b64decode(sample["images"][0]["image"].removeprefix("data:image/png;base64,"))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), trace.images[0])
        for look, exact in zip(sample["looks"], trace.looks, strict=True):
            assert (look["states"], look["read"]) == (list(exact.states), list(exact.read))
            assert (look["helper_image"]["rows"], look["columns"]) == (2, 2)
            for name in ("cosines", "attention", "helper_cosines"):
                packed, values = look[name], getattr(exact, name)
                steps = np.frombuffer(base64.b64decode(packed["data"]), np.uint8).reshape(values.shape) / 255
                found = packed["low"] + (packed["high"] - packed["low"]) * steps
                assert np.abs(found - values).max() < 0.51 * np.ptp(values) / 255


def test_maps_of_one_value_and_without_tokens_can_be_packed():
    assert pack_map(None) is None
    assert pack_map(np.zeros((2, 0))) == {"low": 0.0, "high": 0.0, "data": ""}
    assert base64.b64decode(pack_map(np.full((1, 3), 0.5))["data"]) == bytes(3)


def test_attention_in_all_is_exact_for_each_of_several_images():
    """One step of this map is 0.3 / 255, to which each of the 999 small shares would be rounded, as 0."""
    attention = np.full((2, 1006), 0.308 / 999)
    attention[:, :6], attention[:, 6] = 1e-3, 0.3
    trace, look = random_trace(0), LookTrace(2, 2, np.zeros((2, 1006)), attention)
    images, grids = [trace.images[0], np.zeros((56, 56, 3), np.uint8)], [(2, 3), (25, 40)]
    both = Trace(**{**vars(trace), "images": images, "grids": grids, "looks": [look, LookTrace(1, 1)]})
    first, cut_off = sample_content(both)["looks"]
    assert first["attention_shares"] == [pytest.approx([0.006, 0.608], rel=1e-3)] * 2
    assert cut_off["attention_shares"] is None and cut_off["cosines"] is None


def test_a_large_image_is_made_smaller(tmp_path):
    trace = random_trace(0)
    large = np.zeros((560, 1120, 3), np.uint8)
    write_trace_page(tmp_path / "a.html", [Trace(**{**vars(trace), "images": [large]})], "a", "")
    sample = json.loads(EMBEDDED.findall((tmp_path / "a.html").read_text())[1][1])
    png = base64.b64decode(sample["images"][0]["image"].split(",")[1])
    assert Image.open(io.BytesIO(png)).size == (448, 224)


def test_the_page_fetches_nothing_and_hostile_text_stays_text(page):
    text = page.read_text()
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert not re.search(r"<(link|iframe|object|embed|img|base|form)\b", text)
    assert not re.search(r"(?:src|href|action)\s*=", EMBEDDED.sub("", text)) and "default-src 'none'" in text
    assert "<img" not in text and text.count("</script>") == text.count("<script") == 2 + len(TRACES)
    assert "<h1>Answers of &lt;task&gt;</h1>" in text and "4 answers &amp; none else." in text
    script = text[text.rindex('<script>\n"use strict"') :]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", script)


def test_the_page_is_for_phones_dark_screens_and_keyboards(page):
    text = page.read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    light, dark = re.findall(r":root \{([^}]*)\}", text)
    names = set(re.findall(r"var\((--[a-z]+)\)", text))
    assert all(f"{name}:" in light for name in names) and ":focus-visible" in text and "@media (max-width" in text
    assert set(re.findall(r"--[a-z]+", dark)) >= names - {"--heat"}
    for key in ("j", "k", "Enter", "Tab", "m", "Escape"):
        assert f"<kbd>{key}</kbd>" in text


def test_the_script_is_javascript(page, tmp_path):
    if shutil.which("node") is None:
        pytest.skip("Node.js, which checks the syntax, is not installed")
    text = page.read_text()
    (tmp_path / "page.js").write_text(text[text.rindex("<script>") + 8 : text.rindex("</script>")])
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True, timeout=60)


@pytest.fixture
def browser_page():
    """A page of a browser in a small window, which must log no error."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives a browser, is optional")
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch()
        except playwright.Error as error:
            pytest.skip(f"no browser can be launched: {str(error).splitlines()[0]}")
        tab, errors = browser.new_page(viewport={"width": 390, "height": 800}), []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("dialog", lambda dialog: errors.append(dialog.message))
        yield tab
        browser.close()
        assert not errors


def test_a_browser_shows_looks_filters_and_keys(page, browser_page):
    tab = browser_page
    tab.goto(page.as_uri())
    assert tab.locator("#list button").count() == 4 and HOSTILE[:37] in tab.locator(".question").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    tab.hover(".look >> nth=0")
    assert "mean of 4 slots" in tab.inner_text("#state") and tab.locator(".slots button").count() == 4
    assert tab.locator(".states td.miss").inner_text() == "far ✗"
    painted = "[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 3, 2).data].some(Boolean)"
    assert tab.evaluate(painted)
    tab.mouse.move(0, 0)
    assert not tab.evaluate(painted)
    tab.locator("#list button").nth(0).focus()
    tab.keyboard.press("Enter")
    assert "Look 1, mean" in tab.inner_text("#state")
    tab.keyboard.press("ArrowRight")
    assert "Look 2, mean" in tab.inner_text("#state")
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("Tab")
    assert "Look 1, slot 1" in tab.inner_text("#state")
    tab.keyboard.press("ArrowDown")
    assert "slot 3" in tab.inner_text("#state")
    tab.keyboard.press("m")
    assert "of all attention" in tab.inner_text("#state")
    tab.keyboard.press("Escape")
    assert tab.inner_text("#state") == "" and not tab.evaluate(painted)
    tab.keyboard.press("j")
    assert "Answer 1" in tab.inner_text("#sample h2")
    tab.keyboard.press("k")
    assert "Answer 0" in tab.inner_text("#sample h2")
    tab.select_option("#outcome", "wrong")
    assert tab.inner_text("#count") == "1 of 4 answers" and "Answer 1" in tab.inner_text("#sample h2")
    tab.select_option("#outcome", "")
    tab.select_option("#outcome", "unparsed")
    tab.select_option("#level", "level 4")
    assert tab.inner_text("#sample") == "No answer passes the filters."
    tab.keyboard.press("Escape")
    tab.select_option("#outcome", "")
    tab.select_option("#order", "longest")
    assert [button.inner_text()[:3].split()[-1] for button in tab.locator("#list button").all()] == ["3", "1"]


def test_a_thousand_answers_are_quick_to_open(tmp_path, browser_page):
    many = (random_trace(number) for number in range(1000))
    write_trace_page(tmp_path / "many.html", many, "many", "")
    started = time.monotonic()
    browser_page.goto((tmp_path / "many.html").as_uri())
    assert browser_page.locator("#list button").count() == 1000 and time.monotonic() - started < 2
