"""Metrics: one line a step, also when a stage is gone on with."""

import json

from ilvr_jax.training.metrics import Metrics, read_metrics


def test_lines_after_the_restored_step_are_replaced(tmp_path):
    with Metrics(tmp_path, "warm_up", 0) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": float(step)})
    with Metrics(tmp_path, "stage1", 0) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "stage1", "st')  # the process died here
    with Metrics(tmp_path, "stage1", 2) as metrics:
        metrics.write(3, {"loss": -3.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == read_metrics(tmp_path)
    assert [(line["stage"], line["step"], line["loss"]) for line in lines] == [
        ("warm_up", 1, 1.0),
        ("warm_up", 2, 2.0),
        ("warm_up", 3, 3.0),
        ("stage1", 1, 1.0),
        ("stage1", 2, 2.0),
        ("stage1", 3, -3.0),
    ]


def test_tensorboard_gets_a_run_for_each_stage(tmp_path):
    for stage in ("warm_up", "stage1"):
        with Metrics(tmp_path, stage, 0) as metrics:
            metrics.write(1, {"loss": 1.0})
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["stage1", "warm_up"]
    assert all(list(folder.glob("events.*")) for folder in (tmp_path / "tensorboard").iterdir())


def test_nothing_written_reads_as_nothing(tmp_path):
    assert read_metrics(tmp_path) == []
