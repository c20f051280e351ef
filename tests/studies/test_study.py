"""The study command on tiny runs: killed, stopped and resumed, with failing variants and a workdir in use."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from ilvr_jax.config.flags import override
from ilvr_jax.config.workdir import has_begun
from ilvr_jax.files import locked_folder
from ilvr_jax.studies import STUDIES, Study, Variant
from ilvr_jax.studies.children import Children
from ilvr_jax.study import main, read_flags
from ilvr_jax.training.metrics import read_metrics
from tests.paths import REPOSITORY
from tests.samples import export_maps, tiny_config

STEPS = 60
CONFIG = """
from ml_collections import ConfigDict

def get_config(variant=""):
    if variant:
        raise ValueError(f"no variant {variant}")
    return ConfigDict(VALUES)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the config file of a study of three variants, one of which the file does not have."""
    folder = tmp_path_factory.mktemp("study")
    config = tiny_config(export_maps(folder / "maps", count=2))
    config.stages = ("warm_up",)
    config.warm_up.steps, config.checkpoint_every = STEPS, 10
    (folder / "tiny.py").write_text(f"VALUES = {config.to_dict()}\n{CONFIG}")
    variants = {
        "base": Variant("The base."),
        "other": Variant("Fewer checkpoints.", changes={"checkpoint_keep": "1"}),
        "absent": Variant("Not in the config file.", variant="missing"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, "tiny", Study(str(folder / "tiny.py"), variants, 3, {"*.steps": "2"}))
        for name, value in {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }.items():
            patch.setenv(name, value)
        yield folder


def study(folder, *flags):
    return main(["tiny", f"--workdir={folder / 'all'}", "--seeds=1", *flags])


def when_trained(workdir, act):
    """Call `act` once the run in a workdir has made some steps and saved a checkpoint, from another thread."""

    def wait():
        while not (has_begun(workdir) and len(read_metrics(workdir)) > 8):
            time.sleep(0.005)
        act()

    threading.Thread(target=wait, daemon=True).start()


def kill_writer(workdir):
    os.kill(json.loads((workdir / ".lock").read_text())["process"], signal.SIGKILL)


def results_in(folder):
    return json.loads((folder / "all" / "results.json").read_text())


@pytest.fixture(scope="module")
def calls(folder):
    """What two calls of the study returned and wrote: Ctrl-C stops the base's run, then the other's run is killed."""
    calls, runs = {}, folder / "all"
    when_trained(runs / "base-seed0", lambda: os.kill(os.getpid(), signal.SIGINT))
    calls["stopped"] = study(folder), results_in(folder)
    when_trained(runs / "other-seed0", lambda: kill_writer(runs / "other-seed0"))
    calls["killed"] = study(folder), results_in(folder)
    return calls


def test_a_stopped_study_is_resumed(calls, folder):
    status, results = calls["stopped"]
    assert status == 130 and results["failed"].keys() == {"absent-seed0"}
    assert [(row["name"], row["seeds"]) for row in results["rows"]] == [("absent", [])]
    assert (folder / "all" / "base-seed0" / "train.log").read_text().count("warm_up: resuming from step") == 1
    base = calls["killed"][1]["rows"][0]
    assert (base["name"], base["seeds"], base["steps"], base["failed_seeds"]) == ("base", [0], STEPS, [])
    assert base["text_tokens"] > 0 and base["minutes"] > 0
    log = (folder / "all" / "study.log").read_text()
    assert "2 runs are left, about 6 min (3 minutes per run on 2 cores)" in log
    assert re.search("base-seed0: finished; 1 run is left, about [0-9]+ min$", log, re.MULTILINE)
    for name in ("accuracy.png", "accuracy.svg", "index.html"):
        assert (folder / "all" / name).stat().st_size > 1000


def test_failed_runs_are_in_the_table_and_stop_no_other(calls):
    status, results = calls["killed"]
    assert status == 1 and results["failed"].keys() == {"other-seed0", "absent-seed0"}
    assert results["failed"]["other-seed0"] == "ended with status -9"
    assert results["failed"]["absent-seed0"].endswith("ValueError: no variant missing")
    assert [(row["name"], row["seeds"], row["failed_seeds"]) for row in results["rows"]] == [
        ("base", [0], []),
        ("other", [], [0]),
        ("absent", [], [0]),
    ]


def test_finished_runs_start_no_process_and_failed_ones_start_again(calls, folder, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(Children, "run", lambda _, command: started.append(command) or "it failed")
    assert study(folder, "--variants=base") == 0 and not started
    assert "no runs are left" in capsys.readouterr().out
    assert results_in(folder)["rows"] == calls["killed"][1]["rows"]  # the others' too
    assert study(folder) == 1
    assert "failed: absent-seed0, other-seed0; the same command tries them again" in capsys.readouterr().err
    assert [command[2:5] for command in started] == [
        ["ilvr_jax.train", f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'all' / 'other-seed0'}"]
    ]
    assert results_in(folder)["failed"]["other-seed0"] == "it failed"


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (lambda values: override(values, "warm_up.steps", "7"), f"warm_up.steps ({STEPS} there, 7 here)"),
        (lambda values: override(values, "latents.tau", "0.9"), "latents.tau (0.99"),
    ],
)
def test_the_workdir_of_another_base_config_is_refused(calls, folder, tmp_path, capsys, change, differing):
    values = tiny_config(folder / "maps" / "train.jsonl").to_dict() | {"stages": ("warm_up",)}
    values["warm_up"]["steps"], values["checkpoint_every"] = STEPS, 10
    change(values)
    before, text = (folder / "all" / "study.json").read_text(), (folder / "tiny.py").read_text()
    (folder / "tiny.py").write_text(f"VALUES = {values}\n{CONFIG}")
    try:
        assert study(folder) == 2
    finally:
        (folder / "tiny.py").write_text(text)
    error = capsys.readouterr().err
    assert str(folder / "all") in error and differing in error and error.count("\n") == 1 and len(error) < 401
    assert (folder / "all" / "study.json").read_text() == before


def test_the_workdir_of_a_quick_study_or_of_other_changes_is_refused(calls, folder, capsys, monkeypatch):
    assert study(folder, "--quick") == 2
    assert f"{folder / 'all'} was made by another study: quick (False there, True here)" in capsys.readouterr().err
    variants = {**STUDIES["tiny"].variants, "other": Variant("Another.", changes={"checkpoint_keep": "2"})}
    monkeypatch.setitem(STUDIES, "again", Study(STUDIES["tiny"].config, variants, 3, {}))
    assert main(["again", f"--workdir={folder / 'all'}"]) == 2
    assert "study ('tiny' there, 'again' here)" in capsys.readouterr().err
    monkeypatch.setitem(STUDIES, "tiny", STUDIES["again"])
    assert study(folder) == 2
    assert "variants.other.checkpoint_keep ('1' there, '2' here)" in capsys.readouterr().err


def test_a_damaged_study_file_is_named(calls, folder, capsys):
    path = folder / "all" / "study.json"
    before = path.read_text()
    for text, problem in (("{", "must be JSON in UTF-8"), ('{"study": "tiny"}', "must hold the settings of a study")):
        path.write_text(text)
        assert study(folder) == 2
        error = capsys.readouterr().err
        assert f"{path} {problem}" in error and error.count("\n") == 1 and path.read_text() == text
    path.write_text(before)


def test_a_study_in_use_is_refused(calls, folder, capsys):
    with locked_folder(folder / "all"):
        assert study(folder) == 2
    assert "is being written by process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["unknown"], "argument study: invalid choice: 'unknown' (choose from"),
        (["slots", "--variants=text,nothing"], "--variants must name variants of the study (own, text, text_tokens,"),
        (["slots", "--seeds=0"], "--seeds must be a whole number from 1 to 1000, got 0"),
        (["slots", "--seeds=two"], "argument --seeds: invalid int value: 'two'"),
        (["slots", "--config=configs/base.py:text"], "--config must be a file without a variant, got"),
        (["slots", "--config=missing.py"], "--config must be a Python file such as"),
        (["slots", "--workdir="], "argument --workdir: must be a path, got ''"),
    ],
)
def test_bad_flags_are_named(arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    error = capsys.readouterr().err
    assert status == 2 and sentence in error and error.count("\n") == 1 and len(error) < 401
    assert not any(tmp_path.iterdir())


def test_a_config_that_is_not_evaluated_is_refused(tmp_path, capsys):
    (tmp_path / "tiny.py").write_text(f"VALUES = {tiny_config().to_dict()}\n{CONFIG}")
    assert main(["slots", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'runs'}"]) == 2
    assert "--config must be a file with `eval.data` or `eval.fraction`" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.py"]


def test_the_base_is_always_among_the_variants():
    assert read_flags(["slots", "--variants=single,text"]).variants == ["own", "text", "single"]
    assert read_flags(["slots"]).variants == list(STUDIES["slots"].variants)
    assert read_flags(["slots"]).workdir == Path("runs/study-slots")
    assert read_flags(["slots", "--quick"]).workdir == Path("runs/study-slots-quick")
