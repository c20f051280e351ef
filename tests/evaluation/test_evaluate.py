"""python -m ilvr_jax.evaluate: figures from a results file that grows, resumes and survives damage."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ilvr_jax.config.experiments import VSP_MAPS
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.evaluate import main
from ilvr_jax.evaluation.results import BadResults, Key, Results, summarise
from tests.paths import REPOSITORY
from tests.published import save_published
from tests.samples import untrained_run
from tests.zebra_cot import mark, row, write

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
    assert summary["method"] == method and summary["skipped"] == 0
    looked = sum(line["looks"] for line in lines.values())
    assert (looked == 0) == (method == "text")
    assert "accuracy, 95 % interval" in capsys.readouterr().out
    assert out.with_suffix(".log").read_text().count("0 of 6 answers exist")


FOREIGN = ({"number": 3}, {"number": 10**30}, {"number": -1}, {"number": True}, {"sample": -1}, {"tokens": -4})


def test_a_stopped_evaluation_resumes_with_the_same_answers(run, data, tmp_path, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    sampling = ("--samples-per-question=3", "--temperature=1.0")
    assert evaluate(run, data, whole, *sampling, "--batch-size=2") == 0
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * 4
    foreign = [json.dumps(json.loads(lines[1]) | change) + "\n" for change in FOREIGN]
    damaged = lines[3][: len(lines[3]) // 2]  # as kill -9 leaves the last line
    text = "".join([*lines[:3], "garbage\n", json.dumps({"number": 1}) + "\n", *lines[5:9], *foreign, damaged])
    out.write_bytes(text.encode() + b"\xff\xfe")
    capsys.readouterr()
    assert evaluate(run, data, out, *sampling, "--batch-size=16") == 0
    err = capsys.readouterr().err
    numbers = (4, 5, *range(10, 11 + len(FOREIGN)))
    assert all(f"line {number} cannot be read" in err for number in numbers) and err.count("\n") == len(numbers)
    assert answers(out) == answers(whole)
    assert "6 of 12 answers exist" in out.with_suffix(".log").read_text()
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert list(summary["pass_at"]) == ["1", "2", "3"] and summary["majority"] == 0
    before = out.read_bytes()
    assert evaluate(run, data, out, *sampling) == 0 and out.read_bytes() == before  # nothing is left to ask
    assert evaluate(run, data, out, *sampling, "--seed=1") == 2
    err = capsys.readouterr().err
    assert (
        "must hold answers of this evaluation (seed 1), but holds those of another (seed 0); choose another --out"
        in err
    )
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
        'mixed.jsonl line 3: must have a "map_desc"',
        "mixed.jsonl line 5: ",
        "mixed.jsonl line 6: an image must take at most 400 vision tokens (--largest-image), got 2209",
        "mixed.jsonl line 7: the prompt must have at most 500 tokens (--longest-prompt), got",
    ):
        assert err.count(f"skipped: {sentence}") == 1, err
    assert {line["record"] for line in answers(out).values() if not line["form"]} == {
        f"mixed.jsonl line {number}" for number in (1, 4, 8)
    }
    assert json.loads((tmp_path / "out.summary.json").read_text())["skipped"] == 5
    before = out.read_bytes()
    assert evaluate(run, file, out, *limits) == 1 and out.read_bytes() == before  # nothing is left that can be asked
    assert capsys.readouterr().err == err
    assert evaluate(run, data, tmp_path / "none.jsonl", "--longest-prompt=3") == 2
    assert capsys.readouterr().err.endswith("maps.jsonl must have records that can be asked, got none\n")


def test_rows_that_cannot_be_read_are_named_and_the_rest_is_answered(run, data, tmp_path, capsys):
    image, question = (data.parent / "0.png").read_bytes(), f"Which way? {mark('problem_image_1')}"
    rows = [
        row(question, "so", "up", problem_image_1=image),
        row(question, "so", "up", problem_image_1=b"no image"),
        row(question, "so", "up", problem_image_1=image[: len(image) // 2]),
        row(question, "so", "up", problem_image_1=None),
        row(question, "so", None, problem_image_1=image),
        row(None, "so", "up", problem_image_1=image),
        row("why " * 900, "so", "up"),
        row("a <|im_end|> of a question", "so", "up"),
        row(question, f"see {mark('reasoning_image_1')}", "up", problem_image_1=image),  # for training alone
    ]
    file, out = write(tmp_path / "rows.parquet", rows), tmp_path / "out.jsonl"
    limits = ("--longest-prompt=500", "--question=")
    assert evaluate(run, file, out, *limits, task="zebra_cot") == 1
    err = capsys.readouterr().err
    for number in range(1, 8):
        assert err.count(f"skipped: rows.parquet row {number}: ") == 1, err
    assert err.count("\n") == 7
    assert {line["record"] for line in answers(out).values()} == {"rows.parquet row 0", "rows.parquet row 8"}
    assert json.loads((tmp_path / "out.summary.json").read_text())["skipped"] == 7


def test_a_published_checkpoint_is_evaluated_in_plain_text(data, tmp_path, capsys):
    save_published(tmp_path, dtype="float32", texts=["Which way?"])
    out = tmp_path / "out.jsonl"
    assert evaluate(tmp_path, data, out, "--limit=1", "--instruction=Be brief.") == 0
    assert "has no latent tokens; it is decoded as plain text" in capsys.readouterr().err
    assert json.loads(out.read_text().splitlines()[0])["settings"]["method"] == "text"
    assert len(answers(out)) == 2


def test_a_run_has_defaults_of_its_own(tmp_path, capsys):
    workdir = untrained_run(tmp_path / "run")
    fields = json.loads((workdir / "config.json").read_text())
    fields["seed"], fields["eval"]["limit"] = 7, 2
    (workdir / "config.json").write_text(json.dumps(fields))
    assert main([str(workdir), "--max-new-tokens=6"]) == 0
    out = workdir / "evaluations" / "stage1-step5-vsp_planning-latent.jsonl"
    settings = json.loads(out.read_text().splitlines()[0])["settings"]
    assert (settings["seed"], settings["task"], settings["data"]) == (7, "vsp_planning", VSP_MAPS)
    assert len(answers(out)) == 2 * 2
    fields["eval"]["data"] = ""
    (workdir / "config.json").write_text(json.dumps(fields))
    capsys.readouterr()
    assert main([str(workdir)]) == 2
    assert f"--data must be a file of records, since {workdir} has none" in capsys.readouterr().err
    assert main([str(workdir), "--root=images"]) == 2
    assert "--root must come with --data, got 'images' alone" in capsys.readouterr().err
    save_published(tmp_path / "published", dtype="float32", texts=["Which way?"])
    assert main([str(tmp_path / "published"), f"--data={VSP_MAPS}"]) == 2
    assert "--task must be one of vsp_planning, vsp_reasoning, comt, zebra_cot for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--samples-per-question=0"], "--samples-per-question must be a whole number from 1 to 65536, got 0"),
        (
            ["--samples-per-question=1000000000000"],
            "--samples-per-question must be a whole number from 1 to 65536, got",
        ),
        (["--samples-per-question=2"], "--temperature must be above 0 for --samples-per-question above 1"),
        (["--batch-size=0"], "--batch-size must be a whole number from 1 to 65536, got 0"),
        (["--limit=-1"], "--limit must be a whole number from 0 to 2147483647, got -1"),
        (["--limit=99999999999"], "--limit must be a whole number from 0 to 2147483647, got 99999999999"),
        (["--max-new-tokens=0"], "--max-new-tokens must be from 1 to 131072, got 0"),
        (["--temperature=-1"], "--temperature must be from 0 to 1000000.0, got -1.0"),
        (["--seed=-1"], "--seed must be a whole number from 0 to 4294967295, got -1"),
        (["--largest-image=-1"], "--largest-image must be a whole number from 1 to 2147483647, got -1"),
        (["--instruction=caf\udce9"], "each argument must be text in UTF-8, got"),
        (["--out=/proc/none.jsonl"], "/proc/.none.jsonl.lock cannot be read or written"),
        (["--out=/dev/null"], "--out must be a file whose name ends with .jsonl, got '/dev/null'"),
        (["--out=out.log"], "--out must be a file whose name ends with .jsonl, got 'out.log'"),
        (["--data=absent.jsonl"], "absent.jsonl must be a file of records, but cannot be read: No such file"),
        (
            ["--task=comt", "--method=pixels"],
            "--task must be one that draws pictures (vsp_planning) for --method=pixels, got comt",
        ),
        (["--stage=stage2"], "no checkpoint of stage 'stage2'"),
        (["--out=/dev/null/x.jsonl"], "/dev/null cannot be read or written"),
    ],
)
def test_a_bad_flag_is_an_error_of_one_sentence(run, data, tmp_path, capsys, flags, sentence):
    assert evaluate(run, data, tmp_path / "out.jsonl", *flags) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--root=", "argument --root: must be a path, got ''"),
        ("--data=", "argument --data: must be a path, got ''"),
        ("--out=", "argument --out: must be a path, got ''"),
        ("--out=a\0.jsonl", "argument --out: must be a path, got 'a\\x00.jsonl'"),
        ("--limit=ten", "argument --limit: invalid int value: 'ten'"),
        ("--task=none", "argument --task: invalid choice: 'none'"),
    ],
)
def test_flags_that_cannot_be_read_are_named_in_one_line(run, data, tmp_path, capsys, flag, problem):
    with pytest.raises(SystemExit) as ended:
        evaluate(run, data, tmp_path / "out.jsonl", flag)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and f"python -m ilvr_jax.evaluate: error: {problem}" in err and err.count("\n") == 1


def test_outputs_are_regular_files_and_their_folder_is_made(run, data, tmp_path, capsys):
    for number, path in enumerate(("out.jsonl", "out.summary.json", "out.log")):
        folder = tmp_path / str(number)
        folder.mkdir()
        os.mkfifo(folder / path)
        assert evaluate(run, data, folder / "out.jsonl", "--limit=1") == 2
        assert f"{folder / path} must be a regular file or a new one" in capsys.readouterr().err
    (tmp_path / "folder.jsonl").mkdir()
    assert evaluate(run, data, tmp_path / "folder.jsonl") == 2
    assert "folder.jsonl must be a regular file or a new one, but it is a folder" in capsys.readouterr().err
    assert evaluate(run, data, tmp_path / "new" / "folder" / "out.jsonl", "--limit=1") == 0
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"out.jsonl", "out.summary.json", "out.log"}


def test_other_records_or_weights_are_another_evaluation(run, data, tmp_path, capsys):
    out, copied = tmp_path / "out.jsonl", tmp_path / "run"
    assert evaluate(run, data, out) == 0
    before = out.read_bytes()
    settings = json.loads(before.splitlines()[0])["settings"]
    assert settings["step"] == 5 and settings["records"].startswith("3 records") and len(settings["model"]) == 16
    lines = data.read_text().splitlines(keepends=True)
    whole = data.read_text()
    capsys.readouterr()
    for other in (lines[::-1], lines[:2], [lines[0].replace("Which way?", "Where to?"), *lines[1:]]):
        try:
            data.write_text("".join(other))
            assert evaluate(run, data, out) == 2
        finally:
            data.write_text(whole)
        err = capsys.readouterr().err
        assert f"{out} must hold answers of this evaluation (records '" in err and "choose another --out" in err, err
    shutil.copytree(run, copied)
    (checkpoint,) = copied.glob("checkpoints/stage1/*[0-9]")
    checkpoint.rename(checkpoint.with_name("6"))
    out.write_bytes(before.replace(json.dumps(str(run)).encode(), json.dumps(str(copied)).encode()))
    assert evaluate(copied, data, out) == 2
    assert "(step 6), but holds those of another (step 5)" in capsys.readouterr().err
    shutil.rmtree(copied / "checkpoints")
    shutil.copytree(untrained_run(tmp_path / "other", seed=1) / "checkpoints", copied / "checkpoints")
    assert evaluate(copied, data, out) == 2
    assert f"(step 5, model '{settings['model']}')" not in (err := capsys.readouterr().err) and "(model '" in err
    old = before.splitlines(keepends=True)
    old[0] = json.dumps({"settings": {k: v for k, v in settings.items() if k not in ("records", "step", "model")}})
    out.write_bytes(old[0].encode() + b"\n" + b"".join(old[1:]))
    assert evaluate(run, data, out) == 2
    assert "but holds those of another (step None, model None, records None)" in capsys.readouterr().err


def test_a_full_disk_keeps_the_answers_that_were_written(run, data, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    rows = "--batch-size=3"  # shapes of one engine
    assert evaluate(run, data, whole, rows) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]))
    add, limits = Results.add, resource.getrlimit(resource.RLIMIT_FSIZE)

    def add_with_little_room(results, line):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(b"".join(lines[:4])) + 50, limits[1]))
        try:
            add(results, line)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(Results, "add", add_with_little_room)
        assert evaluate(run, data, out, rows) == 1
    assert f"no disk space to write {out} (File too large)" in capsys.readouterr().err
    content = out.read_bytes().splitlines(keepends=True)
    assert content[:3] == lines[:3] and len(content) == 4 and content[3].endswith(b"}\n")
    assert evaluate(run, data, out, rows) == 0 and answers(out) == answers(whole)


def test_a_second_writer_is_refused_and_ctrl_c_leaves_a_whole_file(run, data, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ["--samples-per-question=2000", "--temperature=1", "--batch-size=2", "--max-new-tokens=6"]
    command = [sys.executable, "-m", "ilvr_jax.evaluate", str(run), "--task=vsp_planning", f"--data={data}", *flags]
    with subprocess.Popen(
        [*command, f"--out={out}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        while not (out.exists() and out.read_bytes().count(b"\n") > 4):
            time.sleep(0.05)
            assert process.poll() is None
        before = out.read_bytes()
        assert evaluate(run, data, out) == 2
        err = capsys.readouterr().err
        assert f"{out} is being written by process {process.pid} on " in err and err.count("\n") == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        count = len(answers(out))
        assert process.stderr.read() == f"stopped; {out} holds {count} answers, and the same command resumes it\n"
    assert out.read_bytes().startswith(before) and out.read_bytes().endswith(b"}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.log"}


def line_of(number: int, sample: int, answer: str | None, right: bool, form: str = "") -> dict:
    counts = {"tokens": 5, "looks": 1, "slots": 4, "picture_tokens": 0, "seconds": 0.5}
    key = Key(number, form, sample)._asdict()
    return {**key, "record": "r", "answer": answer, "right": right, "text": "", "stop_reason": "end", **counts}


def test_figures_are_those_of_the_answers():
    lines = [line_of(0, 0, "a", True), line_of(0, 1, "b", False), line_of(0, 2, "a", True), line_of(0, 3, None, False)]
    lines += [line_of(1, sample, "c" if sample else "d", sample == 0) for sample in range(4)]
    lines += [line_of(0, 0, "z", False, "without holes")]
    summary = summarise(lines)
    assert (summary["questions"], summary["answers"], summary["right"], summary["wrong"], summary["unparsed"]) == (
        2,
        8,
        3,
        4,
        1,
    )
    assert summary["accuracy"] == 3 / 8 and summary["majority"] == 1 / 2
    assert summary["pass_at"]["1"] == 3 / 8 and summary["pass_at"]["4"] == 1
    assert summary["pass_at"]["2"] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)
    assert (summary["looks"], summary["slots"], summary["tokens"]) == (8, 32, 40)
    assert "pass_at" not in summarise(lines[:-2])  # one question has fewer samples yet
    assert "accuracy" not in summarise([])


def test_a_file_without_its_first_line_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("garbage\n")
    with pytest.raises(BadResults, match="results.jsonl line 1 must hold the settings of an evaluation"):
        Results(path, {"task": "t"}, 3)
    assert path.read_text() == "garbage\n"


def test_a_file_without_answers_is_used_by_any_evaluation(tmp_path):
    path = tmp_path / "results.jsonl"
    for task in ("t", "u", "u"):
        Results(path, {"task": task}, 3).close()
        assert path.read_text() == f'{{"settings": {{"task": "{task}"}}}}\n'


def test_a_row_that_cannot_be_read_is_named_and_the_rest_is_answered(run, tmp_path, capsys):
    mark = "<image_start>[problem_image_1]<image_end>"
    Image.fromarray(draw_map(MAPS[0])).save(tmp_path / "0.png")
    rows = [
        {
            "Question": f"What is {mark}?",
            "Text Reasoning Trace": "<image_start>[reasoning_image_1]<image_end>",  # no such image: it is not needed
            "Final Answer": number,
            "problem_image_1": {"bytes": None, "path": f"{number}.png"},
        }
        for number in (0, 1, 0)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    out = tmp_path / "out.jsonl"
    assert evaluate(run, tmp_path / "data.parquet", out, "--question=", task="zebra_cot") == 1
    err = capsys.readouterr().err
    assert err.count("data.parquet row 1: the path of problem_image_1 must be an image file in") == 1
    assert {line["record"] for line in answers(out).values()} == {"data.parquet row 0", "data.parquet row 2"}
    (tmp_path / "0.png").rename(tmp_path.parent / "moved.png")
    (tmp_path / "0.png").symlink_to(tmp_path.parent / "moved.png")
    flags = ("--question=", "--no-follow-links")
    assert evaluate(run, tmp_path / "data.parquet", tmp_path / "no.jsonl", *flags, task="zebra_cot") == 2
    assert "since data.follow_links is false, but '0.png' is a link out of it" in capsys.readouterr().err


def test_data_that_is_a_fifo_is_refused(run, tmp_path, capsys):
    os.mkfifo(tmp_path / "maps.jsonl")
    assert evaluate(run, tmp_path / "maps.jsonl", tmp_path / "out.jsonl") == 2
    assert "maps.jsonl must be a file of records, but cannot be read: is not a regular file" in capsys.readouterr().err
