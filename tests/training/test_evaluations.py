"""Evaluations of a run: inside stages, on records held out of its data, stopped and resumed, as the command's."""

import io
import json
import os
import re
import signal

import jax
import pytest
from PIL import Image

from ilvr_jax import evaluate
from ilvr_jax.config.experiments import load_config, parse
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.flags import override
from ilvr_jax.config.workdir import check_resumable, write_config
from ilvr_jax.data.frozen_lake.drawing import draw_map
from ilvr_jax.evaluation.results import Results
from ilvr_jax.training.batches import open_iterator
from ilvr_jax.training.interruption import Interrupted
from ilvr_jax.training.loop import train
from ilvr_jax.training.metrics import read_metrics
from tests.paths import REPOSITORY
from tests.samples import export_maps, tiny_config
from tests.zebra_cot import mark, row, write

SUFFIXES = (".jsonl", ".log", ".summary.json")


@pytest.fixture(scope="module", autouse=True)
def compiled_fast(tmp_path_factory):
    """Compile quickly and once, since every call of `train` would compile all programs again."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def one_stage(data, **changes):
    """Return the tiny config with one stage, evaluated on the maps of a file."""
    config = tiny_config(data)
    config.stages = ("stage1",)
    config.eval.update(changes)
    return config


def drop_evaluations_of(config):
    """Return a config that differs only in that nothing is evaluated."""
    config = config.copy_and_resolve_references()
    config.eval.update(data="", every=0)
    return config


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def answers(path):
    """Return the answers in a results file by their number and form, without their times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {(line["number"], line["form"]): {**line, "seconds": 0} for line in lines}


def names_of(*places, task="vsp_planning"):
    return {f"{place}-{task}-latent{suffix}" for place in places for suffix in SUFFIXES}


def curve(workdir):
    return [(line["step"], line["loss"]) for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    return export_maps(tmp_path_factory.mktemp("maps"))


@pytest.fixture(scope="module")
def finished(maps, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(parse(one_stage(maps, every=2)), workdir)
    return workdir


def test_a_stage_is_evaluated_every_n_steps_and_after_the_last(finished, maps, tmp_path):
    folder = finished / "evaluations"
    assert contents(folder).keys() == names_of("stage1-step2", "stage1-step4", "stage1")
    for step, place in ((2, "stage1-step2"), (4, "stage1-step4"), (6, "stage1")):
        summary = json.loads((folder / f"{place}-vsp_planning-latent.summary.json").read_text())
        assert (summary["stage"], summary["step"], summary["questions"]) == ("stage1", step, 4)
        line = rf"stage1, step {step}: accuracy \d\.\d{{3}} on 4 questions, with \d+ looks and \d+ slots, in \d+ s"
        assert len(re.findall(line, (finished / "train.log").read_text())) == 1
    train(parse(drop_evaluations_of(one_stage(maps))), tmp_path / "run")
    assert curve(tmp_path / "run") == curve(finished)
    assert not (tmp_path / "run" / "evaluations").exists()


def test_the_command_finds_the_answers_of_training(finished, capsys):
    before = contents(finished / "evaluations")
    assert evaluate.main([str(finished)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(before["stage1-vsp_planning-latent.summary.json"])
    for name in ("questions", "tokens", "cut_off"):
        assert re.search(rf"{evaluate.LABELS.get(name, name)} +{figures[name]}\b", printed)
    assert re.search(rf"seconds +{figures['seconds']:.3f}", printed)
    assert contents(finished / "evaluations") == before
    assert evaluate.main([str(finished), "--seed=3"]) == 2
    assert "(seed 3), but holds those of another (seed 0)" in capsys.readouterr().err
    for changes in (["--method=text"], ["--task=vsp_planning", f"--data={finished / 'none.jsonl'}"]):
        evaluate.main([str(finished), *changes])
    assert {name: contents(finished / "evaluations")[name] for name in before} == before


def test_samples_that_a_resumed_run_adds_are_asked_and_the_command_finds_them(maps, tmp_path):
    workdir = tmp_path / "run"
    path = workdir / "evaluations" / "stage1-vsp_planning-latent.jsonl"
    for samples, answered in ((1, 1), (3, 3), (1, 3)):
        train(parse(one_stage(maps, temperature=0.9, top_k=20, n=samples)), workdir)
        summary = json.loads(path.with_suffix(".summary.json").read_text())
        lines = [line for line in map(json.loads, path.read_text().splitlines()[1:]) if not line["form"]]
        assert len(lines) == 4 * answered and (summary["answers"], summary["samples"]) == (4 * samples, samples)
        assert ("pass_at" in summary) == (samples > 1)
        before = contents(workdir / "evaluations")
        assert evaluate.main([str(workdir)]) == 0
        assert contents(workdir / "evaluations") == before


def test_answers_of_training_are_those_of_the_command(finished, tmp_path):
    """Decoded by the command from the checkpoint, in a file of its own, they are the same."""
    assert evaluate.main([str(finished), f"--out={tmp_path / 'own.jsonl'}", "--batch-size=8"]) == 0
    theirs = finished / "evaluations" / "stage1-vsp_planning-latent.jsonl"
    assert (tmp_path / "own.jsonl").read_text().splitlines()[0] == theirs.read_text().splitlines()[0]
    assert answers(tmp_path / "own.jsonl") == answers(theirs)


class Killed(BaseException):
    """An end that nothing handles, as after kill -9."""


@pytest.mark.parametrize("place", ["stage1-step4", "stage1"])
def test_a_killed_evaluation_keeps_its_answers(finished, maps, tmp_path, monkeypatch, place):
    """Inside a stage it is completed before the next step, from the checkpoint that was saved for it."""
    config, workdir = one_stage(maps, every=2), tmp_path / "run"
    config.checkpoint_every = 100
    path = workdir / "evaluations" / f"{place}-vsp_planning-latent.jsonl"
    add = Results.add

    def add_or_die(results, line):
        if results.path == path and len(results.lines) == 3:
            raise Killed
        add(results, line)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Results, "add", add_or_die)
        train(parse(config), workdir)
    before = path.read_bytes()
    path.write_bytes(before + before.splitlines()[-1][:30])  # the line that was being written
    train(parse(config), workdir)
    assert path.read_bytes().startswith(before)
    assert "3 of 8 answers exist" in path.with_suffix(".log").read_text()
    assert answers(path) == answers(finished / "evaluations" / path.name)
    assert curve(workdir) == curve(finished)
    if place == "stage1-step4":
        assert "stage1: resuming from step 4" in (workdir / "train.log").read_text()


def test_a_signal_during_an_evaluation_stops_the_run_there(finished, maps, tmp_path, monkeypatch):
    config, workdir = one_stage(maps, every=2), tmp_path / "run"
    config.checkpoint_every = 100
    add = Results.add

    def add_and_stop(results, line):
        add(results, line)
        if "step4" in results.path.name:
            os.kill(os.getpid(), signal.SIGINT)

    path = workdir / "evaluations" / "stage1-step4-vsp_planning-latent.jsonl"
    for answered in (1, 2):  # the run that resumes is stopped in the same evaluation
        with monkeypatch.context() as patched, pytest.raises(Interrupted, match="stopped in stage1 after step 4 of 6"):
            patched.setattr(Results, "add", add_and_stop)
            train(parse(config), workdir)
        assert len(answers(path)) == answered and not path.with_suffix(".summary.json").exists()
    train(parse(config), workdir)
    assert answers(path) == answers(finished / "evaluations" / path.name)
    assert curve(workdir) == curve(finished)


def test_answers_of_other_parameters_are_replaced(finished, maps, tmp_path):
    workdir, config = tmp_path / "run", one_stage(maps)
    (workdir / "evaluations").mkdir(parents=True)
    path = workdir / "evaluations" / "stage1-vsp_planning-latent.jsonl"
    theirs = (finished / "evaluations" / path.name).read_text()
    for old in (theirs.replace('"model": "', '"model": "0'), "garbage\n"):
        path.write_text(old)
        train(parse(config), workdir)
        assert answers(path) == answers(finished / "evaluations" / path.name)


def zebra_cot_file(folder, count=12):
    image = io.BytesIO()
    Image.fromarray(draw_map(((1, 0, 2), (0, 0, 0), (0, 0, 0)), 28)).save(image, "PNG")
    shown = {"problem_image_1": image.getvalue(), "reasoning_image_1": image.getvalue()}
    rows = [
        row(f"{mark('problem_image_1')} How many?", f"see {mark('reasoning_image_1')} so", str(number), **shown)
        for number in range(count)
    ]
    return write(folder / "rows.parquet", rows, group=5)


def on_zebra_cot(path, task="zebra_cot"):
    config = one_stage(None, task=task, fraction=0.25, question="")
    config.data.update(source="zebra_cot", path=str(path))
    return config


@pytest.mark.parametrize("task", ["zebra_cot", "comt"])
def test_a_run_on_any_data_is_evaluated_on_records_held_out_of_it(tmp_path, monkeypatch, task):
    config, trained_on = on_zebra_cot(zebra_cot_file(tmp_path), task), set()

    def spy(run, *others):
        trained_on.update(run.source[number].name for number in range(len(run.source)))
        return open_iterator(run, *others)

    monkeypatch.setattr("ilvr_jax.training.loop.open_iterator", spy)
    summary = train(parse(config), tmp_path / "run")
    held_out = {f"rows.parquet row {number}" for number in (3, 7, 11)}
    evaluation = summary["stages"]["stage1"]["evaluation"]
    assert evaluation["questions"] == 3 and evaluation["task"] == task and "accuracy_interval" in evaluation
    assert trained_on == {f"rows.parquet row {number}" for number in range(12)} - held_out
    path = tmp_path / "run" / "evaluations" / f"stage1-{task}-latent.jsonl"
    assert {line["record"] for line in answers(path).values()} == held_out
    assert not (tmp_path / "run" / "solutions.png").exists()
    before = path.read_bytes()
    assert evaluate.main([str(tmp_path / "run")]) == 0 and path.read_bytes() == before


def test_a_task_of_other_records_is_refused_before_training(tmp_path):
    config, workdir = on_zebra_cot(zebra_cot_file(tmp_path), "vsp_planning"), tmp_path / "run"
    with pytest.raises(BadConfig) as error:
        train(parse(config), workdir)
    data = f"the held-out part (0.25) of {tmp_path / 'rows.parquet'}"
    sentence = f"`eval.task` must be a task for the records of {data}, got vsp_planning (rows.parquet row 3: must"
    assert str(error.value).startswith(sentence)
    assert not (workdir / "config.json").exists()


def test_a_run_resumes_only_with_the_same_part_held_out(tmp_path):
    config = on_zebra_cot(zebra_cot_file(tmp_path))
    write_config(parse(config), tmp_path)
    (tmp_path / "checkpoints" / "stage1" / "4").mkdir(parents=True)
    config.eval.update(task="comt", limit=2, every=3, batch_size=2, data="", max_new_tokens=9)
    check_resumable(parse(config), tmp_path)
    config.eval.fraction = 0.5
    with pytest.raises(BadConfig, match=r"another config: eval.fraction \(0.25 there, 0.5 here\)"):
        check_resumable(parse(config), tmp_path)


def test_the_published_config_holds_records_out_or_reads_a_file():
    values = load_config(REPOSITORY / "configs" / "qwen2_5_vl.py").to_dict()
    section = parse(values).eval
    assert (section.task, section.data, section.fraction, section.limit) == ("comt", "", 0.02, 200)
    override(values, "eval.data", "test.jsonl")
    with pytest.raises(BadConfig, match=r"`eval.fraction` must be 0 with eval.data 'test.jsonl', .*, got 0.02"):
        parse(values)
    override(values, "eval.fraction", "0.0")
    assert parse(values).eval.data == "test.jsonl"
