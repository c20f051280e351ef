"""The training command on a tiny model: all stages, stopping and resuming, and errors for bad input."""

import json
import os
import shutil
import signal
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from ilvr_jax.checkpoints.manager import NoCheckpoint
from ilvr_jax.checkpoints.runs import restore_run
from ilvr_jax.checkpoints.trained import load_model
from ilvr_jax.config.experiments import evaluation_file, parse
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.config.workdir import check_resumable, write_config
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.files import locked_folder
from ilvr_jax.method.layout import Layout, padded_tokens
from ilvr_jax.progress import Progress
from ilvr_jax.train import main
from ilvr_jax.training.batches import place_to_resume
from ilvr_jax.training.clock import Clock
from ilvr_jax.training.divergence import Diverged
from ilvr_jax.training.evaluations import is_evaluated
from ilvr_jax.training.interruption import Interrupted
from ilvr_jax.training.loop import train
from ilvr_jax.training.metrics import read_metrics
from ilvr_jax.training.setup import make_step, open_evaluation_records, with_steps
from tests.samples import POISON, export_maps, poison_objective, tiny_config

PLAIN_MAPS = Path(__file__).parents[2] / "configs" / "plain_maps.py"
STAGES = ("warm_up", "stage1", "stage2")
STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The tiny config, with a compilation cache, since every call of `train` would compile all programs again."""
    folder = tmp_path_factory.mktemp("train")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    yield tiny_config(export_maps(folder))
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train(parse(config), workdir)


def losses(workdir):
    timing = ("seconds", "samples_per_second", "data_wait_share", "goodput")
    return [{key: value for key, value in line.items() if key not in timing} for line in read_metrics(workdir)]


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other))


def test_every_stage_runs_and_leaves_its_results(finished, config):
    workdir, summary = finished
    lines = read_metrics(workdir)
    assert [(line["stage"], line["step"]) for line in lines] == [(s, n + 1) for s in STAGES for n in range(STEPS)]
    assert all(line["samples_per_second"] > 0 and 0 <= line["data_wait_share"] <= 1 for line in lines)
    assert {line["stage"] for line in lines if "similarity" in line} == {"stage1"}
    for name in STAGES:
        assert summary["stages"][name]["compilations"] == 1
        evaluation = json.loads((workdir / "evaluations" / f"{name}-vsp_planning-latent.summary.json").read_text())
        assert evaluation == summary["stages"][name]["evaluation"]
        assert 0 <= evaluation["accuracy"] <= 1 and evaluation["questions"] == 4
        assert (evaluation["stage"], evaluation["step"]) == (name, STEPS)
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert (workdir / "solutions.png").read_bytes().startswith(b"\x89PNG")
    assert f"stage2 {STEPS}/{STEPS}" in (workdir / "train.log").read_text()


def test_parts_that_a_stage_does_not_train_stay_as_they_are(finished):
    workdir, _ = finished
    params = {name: restore_run(workdir, stage=name).params for name in STAGES}
    assert same(params["warm_up"]["vision"], params["stage2"]["vision"])
    assert not same(params["warm_up"]["decoder"], params["stage1"]["decoder"])
    assert not same(params["stage1"]["decoder"], params["stage2"]["decoder"])
    assert same(restore_run(workdir).params, params["stage2"])


def test_a_finished_run_is_not_run_again(finished, config):
    workdir, summary = finished
    files = (workdir / "metrics.jsonl", *(workdir / "evaluations").iterdir())
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    again = train(parse(config), workdir)
    assert before == [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    assert again == summary


def test_stopped_and_killed_runs_end_as_an_uninterrupted_one(finished, config, tmp_path, monkeypatch):
    """Ctrl-C in the middle of stage 1 loses nothing; a crash in stage 2 loses the steps since the last checkpoint."""
    workdir = tmp_path / "stopped"
    advance = Progress.advance

    def stop_at(stage, step, act):
        def advance_or_stop(progress):
            advance(progress)
            if (progress._stage, progress._step) == (stage, step):
                act()

        monkeypatch.setattr(Progress, "advance", advance_or_stop)

    handler = signal.getsignal(signal.SIGINT)  # a background run may have started with another one
    stop_at("stage1", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped in stage1 after step 3 of 6, saved in .*; the same") as stopped:
        train(parse(config), workdir)
    assert stopped.value.exit_status == 130
    assert signal.getsignal(signal.SIGINT) is handler

    class Crash(Exception):
        pass

    def crash():
        raise Crash

    stop_at("stage2", 6, crash)
    with pytest.raises(Crash):
        train(parse(config), workdir)
    assert read_metrics(workdir)[-1]["step"] == 5
    monkeypatch.setattr(Progress, "advance", advance)
    train(parse(config), workdir)
    log = (workdir / "train.log").read_text()
    assert "stage1: resuming from step 3" in log and "stage2: resuming from step 4" in log
    assert losses(workdir) == losses(finished[0])
    for name in STAGES:
        assert same(restore_run(workdir, stage=name).params, restore_run(finished[0], stage=name).params)


def test_a_run_stopped_at_the_last_step_of_a_stage_keeps_its_figures(config, tmp_path, monkeypatch):
    """A stage's summary exists after a signal, is written again if a kill lost it, and never of other parameters."""
    config = config.copy_and_resolve_references()
    config.stages = ("warm_up",)
    workdir = tmp_path / "run"
    advance = Progress.advance

    def stop_at(step):
        def advance_or_stop(progress):
            advance(progress)
            if progress._step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Progress, "advance", advance_or_stop)

    stop_at(4)
    evaluations = workdir / "evaluations"
    evaluations.mkdir(parents=True)
    for name in ("warm_up", "warm_up_2", "warm_up-step4"):
        (evaluations / f"{name}-vsp_planning-latent.summary.json").write_text("{}")
    with pytest.raises(Interrupted, match="after step 4 of 6"):
        train(parse(config), workdir)
    assert not (workdir / "stages" / "warm_up.json").exists()
    others = ["warm_up-step4-vsp_planning-latent.summary.json", "warm_up_2-vsp_planning-latent.summary.json"]
    assert sorted(path.name for path in evaluations.iterdir()) == others
    stop_at(STEPS)
    with pytest.raises(Interrupted, match="after step 6 of 6") as stopped:
        train(parse(config), workdir)
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    before = json.loads((workdir / "stages" / "warm_up.json").read_text())
    assert before["seconds"] > 0 and before["skipped_records"] == []
    (workdir / "stages" / "warm_up.json").unlink()
    stop_at(None)
    stage = train(parse(config), workdir)["stages"]["warm_up"]
    assert stage["seconds"] == before["seconds"] and stage["skipped_records"] == []


class Poisoned:
    """A train step that gets a poisoned record in one row at some of its calls."""

    def __init__(self, step, calls, row=1):
        self.step, self._cache_size, self.calls, self.number, self.row = step, step._cache_size, calls, 0, row
        self.records = []

    def __call__(self, state, batch):
        self.number += 1
        if self.number in self.calls:
            batch = batch.replace(record=batch.record.at[self.row].add(POISON))
            self.records.append(int(batch.record[self.row]))
        return self.step(state, batch)


def poison(monkeypatch, calls):
    steps = []

    def poisoned_step(*arguments):
        optimizer, step = make_step(*arguments)
        steps.append(Poisoned(step, calls))
        return optimizer, steps[-1]

    poison_objective(monkeypatch, "text")
    monkeypatch.setattr("ilvr_jax.training.setup.make_step", poisoned_step)
    return steps


def warm_up_alone(config, **changes):
    config = config.copy_and_resolve_references()
    config.stages = ("warm_up",)
    config.eval.data = ""
    config.update(changes)
    return config


@pytest.mark.parametrize(
    "source, data, count",
    [("frozen_lake", "auto", 200), ("mirage", "auto", None), ("mirage", "", None), ("mirage", "maps", 4)],
)
def test_runs_on_files_are_evaluated_on_maps_that_eval_data_names_alone(config, tmp_path, source, data, count):
    config = config.copy_and_resolve_references()
    config.data.update(source=source, path="train.jsonl")
    config.eval.data = str(export_maps(tmp_path)) if data == "maps" else data
    evaluated_on = open_evaluation_records(parse(config), None)
    assert (evaluated_on and len(evaluated_on.source)) == count
    assert (evaluation_file(parse(config)) is None) == (count is None)


def test_records_that_the_task_cannot_score_are_named_before_training(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.eval.data = "tests/data/mirage/sample.jsonl"
    with pytest.raises(BadConfig) as error:
        train(parse(config), tmp_path / "run")
    sentence = "`eval.task` must be a task for the records of tests/data/mirage/sample.jsonl, got vsp_planning (sample"
    assert str(error.value).startswith(sentence) and 'line 1: must have a "map_desc"' in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
    config.eval.task = "vsp_reasoning"
    assert len(open_evaluation_records(parse(config), None).source) == 3


def test_skipped_updates_are_logged_and_counted(config, tmp_path, monkeypatch):
    """Two apart of six, with lines for every second step: each is logged, none ends the run."""
    step = poison(monkeypatch, (3, 5))
    summary = train(parse(warm_up_alone(config, log_every=2, max_skipped=2)), tmp_path / "run")
    stage = summary["stages"]["warm_up"]
    assert stage["skipped_updates"] == 2 and 0 < stage["goodput"] < 1 and stage["compilations"] == 1
    assert [(line["step"], line["skipped"]) for line in read_metrics(tmp_path / "run")] == [(2, 0), (4, 1), (6, 2)]
    lines = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "skipped" in line]
    assert len(lines) == 2
    for line, number, record in zip(lines, (3, 5), step[0].records, strict=True):
        assert (
            f"warm_up, step {number}: the update is skipped, since the loss is nan (the first such record is {record})"
            in line
        )


def test_too_many_skipped_in_a_row_end_the_run_with_the_records(config, tmp_path, monkeypatch, capsys):
    """The last checkpoint is finite, and the count resumes from there."""
    steps = poison(monkeypatch, range(4, 100))
    workdir, config = tmp_path / "run", warm_up_alone(config, log_every=100, checkpoint_every=2, max_skipped=3)
    records = r"\(records at fault: \d+(, \d+){%d}\)"
    with pytest.raises(Diverged, match="warm_up, step 6: the updates of 3 steps in a row .* " + records % 2) as error:
        train(parse(config), workdir)
    assert f"records at fault: {', '.join(map(str, steps[0].records))})" in str(error.value)
    assert "\n" not in str(error.value) and str(workdir / "checkpoints" / "warm_up") in str(error.value)
    assert sorted(path.name for path in (workdir / "checkpoints" / "warm_up").iterdir()) == ["2", "4"]
    params = restore_run(workdir).params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    poison(monkeypatch, range(1, 100))  # resumes from step 4, where one in a row was skipped
    with pytest.raises(Diverged, match="warm_up, step 6: the updates of 3 steps in a row"):
        train(parse(config), workdir)
    poison(monkeypatch, ())
    config.max_skipped = 4  # it does not affect the parameters, so it may change
    assert train(parse(config), workdir)["stages"]["warm_up"]["skipped_updates"] == 1


def test_changed_records_are_refused_or_accepted(config, tmp_path):
    """Once accepted, later checkpoints are of the new records."""
    config, workdir, path = warm_up_alone(config), tmp_path / "run", export_maps(tmp_path / "data", 40)
    config.data.update(source="ilvr", path=str(path), image_scale=28 / 64)
    train(parse(config), workdir)
    shutil.rmtree(workdir / "checkpoints" / "warm_up" / "6")
    (workdir / "stages" / "warm_up.json").unlink()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    metrics = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(BadConfig) as error:
        train(parse(config), workdir)
    for words in (
        f"{path} holds 10 records with",
        "warm_up was trained until step 4 on 40 records",
        "another --workdir",
    ):
        assert words in str(error.value)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    config.data.accept_change = True
    train(parse(config), workdir)
    assert "accepted by data.accept_change, a new epoch begins" in (workdir / "train.log").read_text()
    config.data.accept_change = False
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    train(parse(config), workdir)  # later stages may have other records
    assert "warm_up: finished earlier" in (workdir / "train.log").read_text()


def test_the_same_records_or_unknown_ones_resume_where_they_were(config):
    """Older workdirs have no fingerprints to compare."""
    messages, source = [], FrozenLakeSource(FrozenLakeConfig(), 0, 200)
    run = types.SimpleNamespace(config=config, source=source, progress=types.SimpleNamespace(log=messages.append))
    place = {"position": 7, "pending": [5], "skipped": [], "records": source.fingerprint()}
    assert place_to_resume(run, "stage1", 3, place) == place and not messages
    older = {key: value for key, value in place.items() if key != "records"}
    assert place_to_resume(run, "stage1", 3, older) == older
    assert len(messages) == 1 and "so a change of records is not detected" in messages[0]
    with pytest.raises(BadConfig, match="data.frozen_lake holds 200 records .* until step 3 on 9 records; restore"):
        place_to_resume(run, "stage1", 3, {**place, "records": "9 records"})


def test_a_stage_that_has_begun_keeps_the_steps_that_its_epochs_were(config, tmp_path):
    config = warm_up_alone(config)
    config.warm_up.epochs = 3
    counted = with_steps(parse(config), 8, tmp_path)
    assert counted.stages["warm_up"].steps == 6
    write_config(counted, tmp_path)
    assert with_steps(parse(config), 4, tmp_path).stages["warm_up"].steps == 3
    (tmp_path / "checkpoints" / "warm_up" / "4").mkdir(parents=True)
    counted = with_steps(parse(config), 4, tmp_path)
    assert counted.stages["warm_up"].steps == 6
    check_resumable(counted, tmp_path)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run to damage: its stages have checkpoints of steps 4 and 6."""
    shutil.copytree(finished[0], tmp_path / "copied")
    return tmp_path / "copied"


def test_a_stage_is_evaluated_again_on_other_records_or_after_other_steps(copied, config, tmp_path):
    """The figures of a run are never of records or parameters that it no longer has."""
    config = config.copy_and_resolve_references()
    lines = Path(config.eval.data).read_text().splitlines(keepends=True)
    shutil.copytree(Path(config.eval.data).parent / "images", tmp_path / "images")
    config.eval.data = str(tmp_path / "other.jsonl")

    def current(name):
        records = open_evaluation_records(parse(config), None)
        run = types.SimpleNamespace(config=parse(config), workdir=copied, evaluation_records=records, **parts)
        return is_evaluated(run, name)

    restored = restore_run(copied)
    parts = {"model": restored.model, "tokenizer": restored.tokenizer, "special": restored.special}
    Path(config.eval.data).write_text("".join(lines[:3]))
    assert not current("warm_up")
    summary = train(parse(config), copied)
    assert [stage["evaluation"]["questions"] for stage in summary["stages"].values()] == [3, 3, 3]
    assert all(map(current, STAGES))
    Path(config.eval.data).write_text("".join(lines[2::-1]))
    assert not any(map(current, STAGES))
    Path(config.eval.data).write_text("".join(lines[:3]))
    config.warm_up.steps += 1
    assert [current(name) for name in STAGES] == [False, True, True]
    config.eval.limit = 2
    assert not any(map(current, STAGES))


def damage(workdir, stage, step):
    folder = workdir / "checkpoints" / stage / str(step)
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    os.truncate(max(files, key=lambda path: path.stat().st_size), 100)
    return folder


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(finished, copied, config, capsys):
    folder = damage(copied, "stage2", 6)
    params = restore_run(copied).params
    said = capsys.readouterr().err
    assert f"the checkpoint {folder} is damaged (" in said and "using the checkpoint of step 4" in said
    assert not same(params, restore_run(finished[0]).params)
    train(parse(config), copied)
    log = (copied / "train.log").read_text()
    assert (
        f"the checkpoint {folder} is damaged (" in log and "renamed to 6.damaged; using the checkpoint of step 4" in log
    )
    assert log.count("stage2: resuming from step 4") == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == ["4", "6", "6.damaged"]
    assert losses(copied) == losses(finished[0])
    assert same(restore_run(copied).params, restore_run(finished[0]).params)


def test_damage_to_all_checkpoints_of_a_stage_is_an_error_and_never_a_fresh_start(
    finished, copied, config, config_file, capsys
):
    folders = [damage(copied, "stage2", step) for step in (6, 4)]
    assert main([f"--config={config_file}", f"--workdir={copied}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"no checkpoint in {folders[0].parent} can be read: restore one of 6, 4 from a copy, or move" in error
    assert len(error) < 400
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["4", "6"]
    assert losses(copied) == losses(finished[0])  # still those of the first run
    shutil.rmtree(folders[0].parent)  # as the message advises
    train(parse(config), copied)
    assert losses(copied) == losses(finished[0])
    assert same(restore_run(copied).params, restore_run(finished[0]).params)


def test_a_checkpoint_of_another_model_is_one_sentence(copied, config_file, capsys):
    """The config is that of the workdir, so that only the checkpoint differs."""
    stored = json.loads((copied / "config.json").read_text())
    stored["model"]["intermediate_size"] = 32
    (copied / "config.json").write_text(json.dumps(stored))
    assert main([f"--config={config_file}", f"--workdir={copied}", "--config.model.intermediate_size=32"]) == 1
    error = capsys.readouterr().err
    folder = copied / "checkpoints" / "stage2" / "6"
    assert f"the checkpoint {folder} must be of this config's model, but params has decoder.layers." in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == ["4", "6"]


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "garbage": lambda path: path.write_bytes(bytes(range(256))),
    "list": lambda path: path.write_text("[1, 2]\n"),
    "object": lambda path: path.write_text('{"a": 1}\n'),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}
NEWEST, ANSWERS = "checkpoints/stage2/6", "vsp_planning-latent"
REBUILT = [  # files that are written again, or no longer needed
    ("stages/stage2.json", "deleted"),
    ("stages/warm_up.json", "list"),
    (f"evaluations/stage2-{ANSWERS}.summary.json", "deleted"),
    (f"evaluations/stage2-{ANSWERS}.jsonl", "cut"),
    (f"evaluations/stage2-{ANSWERS}.jsonl", "garbage"),
    (f"evaluations/stage1-{ANSWERS}.jsonl", "deleted"),
    (f"evaluations/warm_up-{ANSWERS}.summary.json", "object"),
    ("metrics.jsonl", "list"),
    ("summary.json", "garbage"),
    ("tokenizer/tokenizer_config.json", "deleted"),
    ("checkpoints/warm_up/6/params/manifest.ocdbt", "deleted"),
    (f"{NEWEST}/params/manifest.ocdbt", "cut"),
]
REFUSED = [
    ("config.json", "deleted"),
    ("config.json", "cut"),
    ("config.json", "list"),
    ("config.json", "object"),
    ("tokenizer/tokenizer.json", "deleted"),
    ("tokenizer/tokenizer.json", "cut"),
    ("stages/stage2.json", "folder"),
    (f"evaluations/stage2-{ANSWERS}.jsonl", "FIFO"),
    (f"evaluations/stage2-{ANSWERS}.summary.json", "FIFO"),
    ("train.log", "FIFO"),
    ("solutions.png", "folder"),
    (f"{NEWEST}/_CHECKPOINT_METADATA", "emptied"),
    (f"{NEWEST}/_CHECKPOINT_METADATA", "FIFO"),
]


@pytest.mark.parametrize(("name", "damage"), REBUILT)
def test_what_is_damaged_in_a_workdir_is_rebuilt(finished, copied, config_file, name, damage, capfd):
    """The same command ends with the results of the first run, since nothing else depends on these files."""
    DAMAGES[damage](copied / name)
    if name == "metrics.jsonl":  # of a stage that is not trained any more
        shutil.copy(finished[0] / name, copied / name)
        with (copied / name).open("a") as file:
            file.write('[1, 2]\n{"stage": 3, "step": 4}\n\xff\n{"stage": "stage2", "st')
        shutil.rmtree(copied / NEWEST)
        (copied / "stages" / "stage2.json").unlink()
    assert main([f"--config={config_file}", f"--workdir={copied}"]) == 0
    assert "Traceback" not in capfd.readouterr().err
    assert losses(copied) == losses(finished[0])
    stages, before = (json.loads((folder / "summary.json").read_text())["stages"] for folder in (copied, finished[0]))
    for stage in STAGES:
        figures = [{**one[stage]["evaluation"], "seconds": 0} for one in (stages, before)]
        assert figures[0] == figures[1] and stages[stage]["steps"] == STEPS
    assert same(restore_run(copied).params, restore_run(finished[0]).params)


@pytest.mark.parametrize(("name", "damage"), REFUSED)
def test_what_cannot_be_rebuilt_gets_a_sentence(copied, config_file, name, damage, capfd):
    DAMAGES[damage](copied / name)
    assert main([f"--config={config_file}", f"--workdir={copied}"]) in (1, 2)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and len(said) <= 400
    assert str(copied / name) in said or (damage == "deleted" and str((copied / name).parent) in said)


@pytest.mark.parametrize("change", [lambda fields: fields.pop("latents"), lambda fields: fields.update(eval=None)])
def test_a_config_that_lacks_a_section_is_named(copied, change, capsys):
    fields = json.loads((copied / "config.json").read_text())
    change(fields)
    (copied / "config.json").write_text(json.dumps(fields))
    with pytest.raises(BadConfig, match=rf"^{copied / 'config.json'}: `(latents|eval)` must be .*--config.print=true$"):
        load_model(str(copied))


def test_the_config_of_an_older_run_is_read(copied):
    fields = json.loads((copied / "config.json").read_text())
    del fields["data"]["accept_change"], fields["data"]["follow_links"]
    for key in ("task", "fraction", "limit", "every"):
        del fields["eval"][key]
    (copied / "config.json").write_text(json.dumps(fields))
    assert load_model(str(copied)).step == STEPS


def test_a_stage_without_checkpoint_is_named(finished, tmp_path):
    workdir, _ = finished
    with pytest.raises(NoCheckpoint, match="no checkpoint of stage 'stage3', it has warm_up, stage1, stage2"):
        restore_run(workdir, stage="stage3")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(NoCheckpoint, match="no complete checkpoint yet"):
        restore_run(tmp_path)


@pytest.fixture
def config_file(config, tmp_path):
    path = tmp_path / "tiny.py"
    text = f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({config.to_dict()})\n"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--config.stage1.step=3"], "config.stage1.step must be a key of the config; the nearest is stage1.steps"),
        (["--config.stage1.steps=x"], "`stage1.steps` must be an integer, got 'x'"),
        (["--config.stage1.optimizer=sgd"], "`stage1.optimizer` must be one of adamw, muon, got 'sgd'"),
        (["--config.stage1.accumulation=7"], "`stage1.accumulation` must be a divisor of batch_size (4), got 7"),
        (["--config.latents.grouping=x"], "`latents.grouping` must be one of published, complete, got 'x'"),
        (
            ["--config.data.source=ilvr", "--config.data.path=absent.jsonl"],
            "absent.jsonl must be a file of records, but cannot be read",
        ),
        (["--config.data.source=files"], "`data.source` must be one of frozen_lake, ilvr, mirage"),
        (["--config.eval.data=absent.jsonl"], "absent.jsonl must be a file of records, but cannot be read"),
        (["--config.eval.task=mazes"], "`eval.task` must be one of vsp_planning, vsp_reasoning, comt, zebra_cot, got"),
        (["--config.eval.fraction=1.0"], "`eval.fraction` must be at least 0 and below 1, got 1.0"),
        (["--config.eval.fraction=0.1"], "`eval.fraction` must be 0 with eval.data '"),
        (
            ["--config.eval.fraction=0.1", "--config.eval.data="],
            "`eval.fraction` must be 0 with data.source frozen_lake, whose maps recur, got 0.1; set eval.data",
        ),
        (["--config.eval.max_new_tokens=0"], "`eval.max_new_tokens` must be from 1 to 131072, got 0"),
        (["--config.latents.coverage=0"], "`latents.coverage` must be above 0 and at most 1, got 0.0"),
        (["--config.model.dtype=floot32"], "`model.dtype` must be one of float32"),
        (["--config.model.remat_policy=some"], "`model.remat_policy` must be one of none, full"),
        (["--config.max_skipped=0"], "`max_skipped` must be at least 1, got 0"),
        (["--config.stage2.clip=0"], "`stage2.clip` must be above 0, got 0.0"),
        (
            ["--config.data.frozen_lake.max_moves=0", "--config.data.on_bad_record=skip"],
            "`data.frozen_lake.max_moves` must be at least 1, got 0",
        ),
        (
            ["--config.data.frozen_lake.max_moves=1", "--config.data.on_bad_record=skip"],
            "none of 20000 maps",
        ),
        (["--config.tokenizer=absent"], "absent must hold a tokenizer"),
    ],
)
def test_bad_input_gets_one_sentence_and_status_2(flags, sentence, config_file, tmp_path, capsys):
    assert main([f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_workdir_of_another_config_is_refused(finished, config_file, capsys):
    workdir, _ = finished
    assert main([f"--config={config_file}", f"--workdir={workdir}", "--config.stage2.steps=7"]) == 2
    assert "was made with another config: stage2.steps (6 there, 7 here); give" in capsys.readouterr().err


def test_a_second_run_in_a_workdir_is_refused_and_names_the_first(config_file, tmp_path, capsys):
    with locked_folder(tmp_path / "run"):
        assert main([f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'run'} is being written by process {os.getpid()} on " in said and said.count("\n") == 1
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_buckets_are_ordered_by_what_they_cost():
    """The first that holds a sample is taken: short text before long, and no room for helpers where there are none."""
    small, large = Layout(prefix=60, image_tokens=16), Layout(prefix=140, image_tokens=36)
    looks = Layout(prefix=60, segments=2, text=8, tail=10, latent_size=4, image_tokens=16, helper_tokens=16)
    many = Layout(prefix=100, segments=5, text=8, tail=10, latent_size=4, image_tokens=36, helper_tokens=36)
    assert padded_tokens(small) == 60 + 4 * 4
    assert padded_tokens(looks) == 60 + 2 * (4 + 8) + 10 + (4 + 2 * 4) * 4
    assert sorted([many, large, looks, small], key=lambda one: padded_tokens(one)) == [small, looks, large, many]


def test_the_clock_keeps_compilation_out_of_rate_and_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ilvr_jax.training.loop.time.monotonic", lambda: now[0])
    clock, programs = Clock(8, first=10, seconds=100.0, seconds_in_steps=52.0, began=-4.0), [0]

    class Function:
        def _cache_size(self):
            return programs[0]

    for took, compiled, waited in ((30.0, True, 0.0), (2.0, False, 1.0), (2.0, False, 1.0)):
        with clock.waiting_for_data({}):
            now[0] += waited
        with clock.excluding_compilation(Function()):
            now[0] += took
            programs[0] += compiled
    figures = clock.lap(13)
    goodput = (52 + 6 - 2) / 140  # of 40 seconds here 4 went before the first step, 30 into compilation, 2 into data
    speed = {"samples_per_second": 3 * 8 / 6, "data_wait_share": 2 / 6}
    assert figures == {**speed, "seconds": 140.0, "goodput": goodput}
    assert clock.compilation_seconds == 30.0
    assert clock.seconds_left(16) == 6.0
    with clock.saving():
        now[0] += 3
    now[0] += 1
    assert clock.lap(15)["samples_per_second"] == 4.0
    assert clock.seconds == 144.0 and clock.seconds_left(16) == 2.0
    assert clock.goodput == (52 + 6 - 2 + 1) / 144
