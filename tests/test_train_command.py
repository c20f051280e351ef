"""The training command on a tiny model: all stages, stopped and gone on with, and what it says to bad input."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ilvr_jax.data.__main__ import export
from ilvr_jax.data.frozen_lake import FrozenLakeSettings, FrozenLakeSource
from ilvr_jax.latents.layout import Layout, padded_tokens
from ilvr_jax.train import main
from ilvr_jax.training.checkpoints import NoCheckpoint, restore_for_inference
from ilvr_jax.training.configuration import load_config
from ilvr_jax.training.interruption import Interrupted
from ilvr_jax.training.loop import Clock, Diverged, finite, make_step, train
from ilvr_jax.training.metrics import read_metrics
from ilvr_jax.training.progress import Progress

BASE = Path(__file__).parents[1] / "configs" / "base.py"
STAGES = ("warm_up", "stage1", "stage2")
STEPS = 6


def tiny(eval_data: Path) -> ConfigDict:
    config = load_config(BASE).unlock()
    config.model.update(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    config.model.mrope_section = (1, 1, 2)
    config.model.vision.update(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, fullatt_block_indexes=(0,))
    config.stages = STAGES
    config.data.update(source="frozen_lake", image_scale=1.0, records=200, workers=0)
    config.data.frozen_lake = ConfigDict(dict(levels=(3,), max_moves=4, cell_pixels=28, exclude=(str(eval_data),)))
    bucket = dict(prefix=120, segments=2, text=30, tail=30, images=1, image_windows=4, helper_windows=4)
    config.data.buckets = ConfigDict(dict(small=bucket))
    for name in STAGES:
        config[name].update(steps=STEPS, batch_size=4, accumulation=1)
    config.eval.update(data=str(eval_data), max_new_tokens=8, batch_size=8)
    config.update(log_every=1, checkpoint_every=4, checkpoint_keep=2)
    return config.lock()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The tiny config; compiled programs are kept, since every call of `train` would compile them again."""
    folder = tmp_path_factory.mktemp("train")
    maps = FrozenLakeSource(FrozenLakeSettings(levels=(3,), max_moves=4), seed=5, count=4)
    export([maps[index] for index in range(len(maps))], folder)
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    yield tiny(folder / "train.jsonl")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train(config, workdir)


def losses(workdir):
    timing = ("seconds", "samples_per_second", "data_wait_share")
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
        evaluation = json.loads((workdir / "evaluations" / f"{name}.json").read_text())
        assert evaluation == summary["stages"][name]["evaluation"]
        assert 0 <= evaluation["success_rate"] <= 1
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert (workdir / "solutions.png").read_bytes().startswith(b"\x89PNG")
    assert f"stage2 {STEPS}/{STEPS}" in (workdir / "train.log").read_text()


def test_parts_that_a_stage_does_not_train_stay_as_they_are(finished):
    workdir, _ = finished
    params = {name: restore_for_inference(workdir, stage=name)[1] for name in STAGES}
    assert same(params["warm_up"]["vision"], params["stage2"]["vision"])
    assert not same(params["warm_up"]["decoder"], params["stage1"]["decoder"])
    assert not same(params["stage1"]["decoder"], params["stage2"]["decoder"])
    assert same(restore_for_inference(workdir)[1], params["stage2"])


def test_a_finished_run_is_not_run_again(finished, config):
    workdir, summary = finished
    before = (workdir / "metrics.jsonl").read_bytes(), (workdir / "evaluations" / "stage1.json").stat().st_mtime_ns
    again = train(config, workdir)
    assert before == (
        (workdir / "metrics.jsonl").read_bytes(),
        (workdir / "evaluations" / "stage1.json").stat().st_mtime_ns,
    )
    assert again == summary


def test_stopped_and_killed_runs_end_as_one_that_was_not(finished, config, tmp_path, monkeypatch):
    """Ctrl-C in the middle of stage 1 loses nothing; a crash in stage 2 loses the steps since the last checkpoint."""
    workdir = tmp_path / "stopped"
    advance = Progress.advance

    def stop_at(stage, step, act):
        def advance_or_stop(progress):
            advance(progress)
            if (progress._stage, progress._step) == (stage, step):
                act()

        monkeypatch.setattr(Progress, "advance", advance_or_stop)

    handler = signal.getsignal(signal.SIGINT)  # a run in the background may have been started with another
    stop_at("stage1", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped in stage1 after step 3 of 6, saved in .*; the same") as stopped:
        train(config, workdir)
    assert stopped.value.exit_status == 130
    assert signal.getsignal(signal.SIGINT) is handler

    class Crash(Exception):
        pass

    def crash():
        raise Crash

    stop_at("stage2", 6, crash)
    with pytest.raises(Crash):
        train(config, workdir)
    assert read_metrics(workdir)[-1]["step"] == 5
    monkeypatch.setattr(Progress, "advance", advance)
    train(config, workdir)
    log = (workdir / "train.log").read_text()
    assert "stage1: goes on after step 3" in log and "stage2: goes on after step 4" in log
    assert losses(workdir) == losses(finished[0])
    for name in STAGES:
        assert same(restore_for_inference(workdir, stage=name)[1], restore_for_inference(finished[0], stage=name)[1])


def test_a_run_stopped_at_the_last_step_of_a_stage_keeps_its_figures(config, tmp_path, monkeypatch):
    """The stage's file is there after a signal, made again if a kill lost it, and never that of other parameters."""
    config = config.copy_and_resolve_references().unlock()
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
    for name in ("warm_up.json", "warm_up.settings.json", "warm_up_2.json"):
        (evaluations / name).write_text("{}")
    with pytest.raises(Interrupted, match="after step 4 of 6"):
        train(config, workdir)
    assert not (workdir / "stages" / "warm_up.json").exists()
    assert [path.name for path in evaluations.iterdir()] == ["warm_up_2.json"]
    stop_at(STEPS)
    with pytest.raises(Interrupted, match="after step 6 of 6") as stopped:
        train(config, workdir)
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    before = json.loads((workdir / "stages" / "warm_up.json").read_text())
    assert before["seconds"] > 0 and before["skipped_records"] == []
    (workdir / "stages" / "warm_up.json").unlink()
    stop_at(None)
    stage = train(config, workdir)["stages"]["warm_up"]
    assert stage["seconds"] == before["seconds"] and stage["skipped_records"] == []


def test_a_diverged_state_is_not_saved(config, tmp_path, monkeypatch):
    """Not even where nothing is logged, and a checkpoint or a signal would save it."""
    config = config.copy_and_resolve_references().unlock()
    config.stages = ("warm_up",)
    config.update(log_every=100, checkpoint_every=2)

    class Diverging:
        def __init__(self, step):
            self.step, self._cache_size, self.calls = step, step._cache_size, 0

        def __call__(self, state, batch):
            self.calls += 1
            state, values = self.step(state, batch)
            return state, {**values, "loss": values["loss"] + (np.inf if self.calls >= 3 else 0.0)}

    def diverging_step(*arguments):
        optimizer, step = make_step(*arguments)
        return optimizer, Diverging(step)

    monkeypatch.setattr("ilvr_jax.training.loop.make_step", diverging_step)
    with pytest.raises(Diverged, match="loss is inf at step 4 of warm_up"):
        train(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "warm_up").iterdir()] == ["2"]


def test_a_stage_without_checkpoint_is_named(finished, tmp_path):
    workdir, _ = finished
    with pytest.raises(NoCheckpoint, match="no checkpoint of stage 'stage3', it has warm_up, stage1, stage2"):
        restore_for_inference(workdir, stage="stage3")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(NoCheckpoint, match="no complete checkpoint yet"):
        restore_for_inference(tmp_path)


@pytest.fixture
def config_file(config, tmp_path):
    path = tmp_path / "tiny.py"
    text = f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({config.to_dict()})\n"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--config.stage1.step=3"], "config.stage1.step is not a key of the config; the nearest is stage1.steps"),
        (["--config.stage1.steps=x"], "stage1.steps was given 'x', an integer is accepted"),
        (["--config.stage1.optimizer=sgd"], "stage1: optimizer is 'sgd'; accepted are"),
        (["--config.stage1.accumulation=7"], "stage1: accumulation (7) does not divide batch_size"),
        (["--config.latents.grouping=x"], "latents.grouping is 'x'"),
        (["--config.data.source=ilvr", "--config.data.path=absent.jsonl"], "absent.jsonl: there is no such file"),
        (["--config.data.source=files"], "data.source is 'files', one of frozen_lake, ilvr, mirage"),
        (["--config.eval.data=absent.jsonl"], "absent.jsonl: there is no such file"),
        (["--config.eval.max_new_tokens=0"], "eval: max_new_tokens is 0; accepted is 1 or more"),
        (["--config.latents.coverage=0"], "latents.coverage is 0.0; accepted is a number more than 0"),
        (["--config.model.dtype=floot32"], "model.dtype is 'floot32'; accepted is one of float32"),
        (["--config.model.remat_policy=some"], "model.remat_policy is 'some'; accepted is one of none, full"),
        (["--config.stage2.clip=0"], "stage2: clip is 0.0; accepted is a number more than 0"),
        (
            ["--config.data.frozen_lake.max_moves=0", "--config.data.on_bad_record=skip"],
            "data.frozen_lake.max_moves is 0; at least 1 is accepted",
        ),
        (
            ["--config.data.frozen_lake.max_moves=1", "--config.data.on_bad_record=skip"],
            "none of 20000 maps",
        ),
        (["--config.tokenizer=absent"], "absent holds no tokenizer.json"),
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


def test_buckets_are_ordered_by_what_they_cost():
    """The first that holds a sample is taken: short text before long, and no room for helpers where there are none."""
    small, large = Layout(prefix=60, image_windows=4), Layout(prefix=140, image_windows=9)
    looks = Layout(prefix=60, segments=2, text=8, tail=10, latent_size=4, image_windows=4, helper_windows=4)
    many = Layout(prefix=100, segments=5, text=8, tail=10, latent_size=4, image_windows=9, helper_windows=9)
    assert padded_tokens(small, 2) == 60 + 4 * 4
    assert padded_tokens(looks, 2) == 60 + 2 * (4 + 8) + 10 + (4 + 2 * 4) * 4
    assert sorted([many, large, looks, small], key=lambda one: padded_tokens(one, 2)) == [small, looks, large, many]


def test_a_loss_that_is_no_number_stops_the_run():
    assert finite("stage1", 3, {"loss": np.float32(1.5)}) == {"loss": 1.5}
    with pytest.raises(Diverged, match="loss is nan at step 3 of stage1"):
        finite("stage1", 3, {"loss": np.float32("nan")})


def test_the_clock_keeps_compilation_out_of_rate_and_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ilvr_jax.training.loop.time.monotonic", lambda: now[0])
    clock, programs = Clock(batch_size=8, first=10, seconds=100.0), [0]

    class Function:
        def _cache_size(self):
            return programs[0]

    for took, compiled, waited in ((30.0, True, 0.0), (2.0, False, 1.0), (2.0, False, 1.0)):
        with clock.waiting_for_data({}):
            now[0] += waited
        with clock.setting_compilation_apart(Function()):
            now[0] += took
            programs[0] += compiled
    figures = clock.lap(13)
    assert figures == {"samples_per_second": 3 * 8 / 6, "data_wait_share": 2 / 6, "seconds": 136.0}
    assert clock.compilation_seconds == 30.0
    assert clock.seconds_left(16) == 6.0
    now[0] += 4
    assert clock.lap(15)["samples_per_second"] == 4.0
    assert clock.seconds == 140.0 and clock.seconds_left(16) == 2.0
