"""python -m ilvr_jax.evaluate: figures from a results file that grows, resumes and survives damage."""

import json

import pytest
from PIL import Image

from ilvr_jax.data.drawing import draw_map
from ilvr_jax.evaluate import main
from ilvr_jax.tasks.results import BadResults, Key, Results, figures
from tests.published import save_published
from tests.samples import untrained_run

MAPS = (
    ((1, 0, 2), (0, 0, 0), (0, 0, 0)),
    ((1, -1, 2), (0, 0, 0), (0, 0, 0)),
    ((1, -1, 0, 0), (0, 0, 2, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture(scope="module")
def data(run):
    lines = []
    for number, map_desc in enumerate(MAPS):
        Image.fromarray(draw_map(map_desc)).save(run.parent / f"{number}.png")
        lines.append({"text_input": "Which way?", "image_input": f"{number}.png", "map_desc": map_desc})
    file = run.parent / "maps.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def evaluate(run, data, out, *flags, task="vsp_planning") -> int:
    return main([str(run), f"--task={task}", f"--data={data}", f"--out={out}", "--max-new-tokens=6", *flags])


def answers(out) -> dict:
    header, *lines = out.read_text().splitlines()
    assert "settings" in json.loads(header)
    untimed = [{**json.loads(line), "seconds": 0} for line in lines]
    return {(line["number"], line["form"], line["sample"]): line for line in untimed}


@pytest.mark.parametrize("method", ["latent", "text", "single", "pixels"])
def test_every_record_is_asked_once_with_and_without_holes(run, data, tmp_path, capsys, method):
    out = tmp_path / "out.jsonl"
    assert evaluate(run, data, out, f"--method={method}") == 0
    lines = answers(out)
    assert sorted(lines) == [(number, form, 0) for number in range(3) for form in ("", "without holes")]
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert (summary["questions"], summary["unparsed"], summary["accuracy"]) == (3, 3, 0)
    assert summary["accuracy_interval"][0] == 0 and 0 < summary["accuracy_interval"][1] < 1
    assert summary["hole_blind_success"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert summary["method"] == method and summary["left_out"] == 0
    looked = sum(line["looks"] for line in lines.values())
    assert (looked == 0) == (method == "text")
    assert "accuracy interval" in capsys.readouterr().out
    assert out.with_suffix(".log").read_text().count("0 of 6 answers are there")


def test_a_stopped_evaluation_goes_on_with_the_same_answers(run, data, tmp_path, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    sampling = ("--samples-per-question=3", "--temperature=1.0")
    assert evaluate(run, data, whole, *sampling, "--batch-size=2") == 0
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * 4
    damaged = lines[3][: len(lines[3]) // 2]  # as kill -9 leaves the last line
    text = "".join([*lines[:3], "garbage\n", json.dumps({"number": 1}) + "\n", *lines[5:9], damaged])
    out.write_bytes(text.encode() + b"\xff\xfe")
    capsys.readouterr()
    assert evaluate(run, data, out, *sampling, "--batch-size=16") == 0
    err = capsys.readouterr().err
    assert [f"line {number}: cannot be read" in err for number in (4, 5, 10)] == [True] * 3 and err.count("\n") == 3
    assert answers(out) == answers(whole)
    assert "6 of 12 answers are there" in out.with_suffix(".log").read_text()
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert list(summary["pass_at"]) == ["1", "2", "3"] and summary["majority"] == 0
    before = out.read_bytes()
    assert evaluate(run, data, out, *sampling) == 0 and out.read_bytes() == before  # nothing is left to ask
    assert evaluate(run, data, out, *sampling, "--seed=1") == 2
    assert "holds another evaluation: seed differ; the same settings, or another --out" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_bad_records_are_named_and_the_rest_is_answered(run, data, tmp_path, capsys):
    good = data.read_text().splitlines()
    Image.new("RGB", (3000, 3000)).save(data.parent / "large.png")
    (data.parent / "broken.png").write_bytes(b"\x89PNG\r\n")
    bad = [
        '{"text_input":',
        json.dumps({"text_input": "?", "image_input": "0.png"}),
        json.dumps({"text_input": "?", "image_input": "broken.png", "map_desc": MAPS[0]}),
        json.dumps({"text_input": "?", "image_input": "large.png", "map_desc": MAPS[0]}),
        json.dumps({"text_input": "why " * 900, "image_input": "0.png", "map_desc": MAPS[0]}),
    ]
    file = data.parent / "mixed.jsonl"
    file.write_text("\n".join([good[0], *bad[:2], good[1], *bad[2:], good[2]]) + "\n")
    out = tmp_path / "out.jsonl"
    limits = ("--longest-prompt=500", "--largest-image=400", "--question=")
    assert evaluate(run, file, out, *limits) == 1
    err = capsys.readouterr().err
    for sentence in (
        "mixed.jsonl line 2: must be one JSON object in UTF-8, but is not JSON",
        'mixed.jsonl line 3: has no "map_desc"',
        "mixed.jsonl line 5: ",
        "mixed.jsonl line 6: an image takes 2209 vision tokens; at most 400 are accepted (--largest-image)",
        "mixed.jsonl line 7: the prompt has",
    ):
        assert err.count(f"left out: {sentence}") == 1, err
    assert {line["record"] for line in answers(out).values() if not line["form"]} == {
        f"mixed.jsonl line {number}" for number in (1, 4, 8)
    }
    assert json.loads((tmp_path / "out.summary.json").read_text())["left_out"] == 5
    assert evaluate(run, data, tmp_path / "none.jsonl", "--longest-prompt=3") == 2
    assert capsys.readouterr().err.endswith("maps.jsonl: no record is left to ask\n")


def test_a_published_checkpoint_is_evaluated_in_plain_text(data, tmp_path, capsys):
    save_published(tmp_path, dtype="float32", texts=["Which way?"])
    out = tmp_path / "out.jsonl"
    assert evaluate(tmp_path, data, out, "--limit=1", "--instruction=Be brief.") == 0
    assert "has no latent tokens; it is decoded as plain text" in capsys.readouterr().err
    assert json.loads(out.read_text().splitlines()[0])["settings"]["method"] == "text"
    assert len(answers(out)) == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--samples-per-question=0"], "--samples-per-question is 0; 1 or more is accepted"),
        (["--samples-per-question=2"], "a temperature above 0 is accepted"),
        (["--batch-size=0"], "--batch-size is 0; 1 or more is accepted"),
        (["--limit=0"], "--limit is 0; 1 or more is accepted"),
        (["--max-new-tokens=0"], "max_new_tokens must be a whole number from 1 to 131072, got 0"),
        (["--temperature=-1"], "temperature must be 0 or a number from 1e-6 to 1e6, got -1.0"),
        (["--data=absent.jsonl"], "absent.jsonl must be a file of records, but cannot be read: No such file"),
        (["--task=comt", "--method=pixels"], "comt has no pictures to show; vsp_planning is accepted"),
        (["--stage=stage2"], "no checkpoint of stage 'stage2'"),
        (["--out=/dev/null/x.jsonl"], "/dev/null cannot be read or written"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(run, data, tmp_path, capsys, flags, sentence):
    assert evaluate(run, data, tmp_path / "out.jsonl", *flags) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def line_of(number: int, sample: int, answer: str | None, right: bool, form: str = "") -> dict:
    counts = {"tokens": 5, "looks": 1, "slots": 4, "picture_tokens": 0, "seconds": 0.5}
    key = Key(number, form, sample)._asdict()
    return {**key, "record": "r", "answer": answer, "right": right, "text": "", "stop_reason": "end", **counts}


def test_figures_are_those_of_the_answers():
    lines = [line_of(0, 0, "a", True), line_of(0, 1, "b", False), line_of(0, 2, "a", True), line_of(0, 3, None, False)]
    lines += [line_of(1, sample, "c" if sample else "d", sample == 0) for sample in range(4)]
    lines += [line_of(0, 0, "z", False, "without holes")]
    told = figures(lines)
    assert (told["questions"], told["answers"], told["right"], told["wrong"], told["unparsed"]) == (2, 8, 3, 4, 1)
    assert told["accuracy"] == 3 / 8 and told["majority"] == 1 / 2
    assert told["pass_at"]["1"] == 3 / 8 and told["pass_at"]["4"] == 1
    assert told["pass_at"]["2"] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)
    assert (told["looks"], told["slots"], told["tokens"]) == (8, 32, 40)
    assert "pass_at" not in figures(lines[:-2])  # one question has fewer samples yet
    assert "accuracy" not in figures([])


def test_a_file_without_its_first_line_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("garbage\n")
    with pytest.raises(BadResults, match="results.jsonl line 1: does not say what was evaluated"):
        Results(path, {"task": "t"})
    assert path.read_text() == "garbage\n"
