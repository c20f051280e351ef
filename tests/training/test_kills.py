"""A training process that is killed, stopped or out of disk space at any moment, in processes of its own."""

import multiprocessing
import random
import re
import resource
import sys
import time
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from ilvr_jax.train import main
from ilvr_jax.training.metrics import read_metrics
from tests.samples import export_maps, tiny_config

STAGES, STEPS, KILLS = ("stage1", "stage2"), 20, 10


def tiny() -> ConfigDict:
    config = tiny_config()
    config.stages = STAGES
    for name in STAGES:
        config[name].steps = STEPS
    config.checkpoint_every = 2
    return config


def run(folder: Path, name: str, file_size: int | None, flags: tuple[str, ...]) -> None:
    """Run the training command in this process and ends it with the command's status."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    with (folder / f"{name}.err").open("a") as errors:
        sys.stderr = errors
        status = main([f"--config={folder / 'tiny.py'}", f"--workdir={folder / name}", *flags])
    raise SystemExit(status)


class Trainer:
    """Start training processes, which are forked from one that has imported what they need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.training.test_kills"])
        text = f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({tiny().to_dict()})\n"
        (folder / "tiny.py").write_text(text)

    def start(self, name: str, file_size: int | None = None, flags: tuple[str, ...] = ()) -> multiprocessing.Process:
        process = self.context.Process(target=run, args=(self.folder, name, file_size, flags), daemon=True)
        process.start()
        return process

    def errors(self, name: str) -> str:
        return (self.folder / f"{name}.err").read_text()


def losses(workdir):
    return [(line["stage"], line["step"], line["loss"], line["gradient_norm"]) for line in read_metrics(workdir)]


def wait_until(condition, process):
    while process.is_alive() and not condition():
        time.sleep(0.001)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def whole(trainer):
    process = trainer.start("whole")
    process.join()
    assert process.exitcode == 0, trainer.errors("whole")
    lines = losses(trainer.folder / "whole")
    assert [line[:2] for line in lines] == [(stage, step + 1) for stage in STAGES for step in range(STEPS)]
    return lines


def test_ten_kills_change_no_loss(trainer, whole):
    """SIGKILL at ten random moments: after some steps, between steps, and three times in the middle of a save."""
    choose, workdir, half_written = random.Random(3), trainer.folder / "killed", 0
    resumed = []  # how many steps were done by each kill
    for number, target in enumerate(sorted(choose.sample(range(1, 2 * STEPS - 10), KILLS))):
        enough = max(target, len(losses(workdir)) + 1)
        process = trainer.start("killed")
        wait_until(lambda enough=enough: len(losses(workdir)) >= enough, process)
        if number % 3 == 1:
            wait_until(lambda: any(workdir.glob("checkpoints/*/*tmp*")), process)
        else:
            time.sleep(choose.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -9, trainer.errors("killed")
        half_written += any(workdir.glob("checkpoints/*/*tmp*"))
        resumed.append(len(losses(workdir)))
    assert half_written >= 3 and min(resumed) < STEPS < max(resumed) < len(whole), resumed
    process = trainer.start("killed")
    process.join()
    assert process.exitcode == 0, trainer.errors("killed")
    assert losses(workdir) == whole


def test_kills_during_evaluations_keep_their_answers(trainer, whole):
    """SIGKILL inside a stage's evaluation and in the one at its end; both are completed by the next process."""
    maps = export_maps(trainer.folder / "maps", 30)
    flags = (f"--config.eval.data={maps}", "--config.eval.every=12", "--config.eval.batch_size=1")
    flags += ("--config.eval.max_new_tokens=64",)  # so that an evaluation takes a while
    process = trainer.start("evaluated", flags=flags)
    process.join()
    assert process.exitcode == 0, trainer.errors("evaluated")
    workdir, theirs = (trainer.folder / name / "evaluations" for name in ("torn", "evaluated"))
    places = [f"{place}-vsp_planning-latent.jsonl" for place in ("stage1-step12", "stage1", "stage2-step12", "stage2")]
    kept = {}
    for place in (places[0], places[3]):
        path = workdir / place
        process = trainer.start("torn", flags=flags)
        wait_until(lambda path=path: path.exists() and path.read_bytes().count(b"\n") > 5, process)
        process.kill()
        process.join()
        assert process.exitcode == -9, trainer.errors("torn")
        kept[path] = path.read_bytes().rpartition(b"\n")[0]
        assert 5 <= kept[path].count(b"\n") < 60
    process = trainer.start("torn", flags=flags)
    process.join()
    assert process.exitcode == 0, trainer.errors("torn")
    assert all(path.read_bytes().startswith(lines) for path, lines in kept.items())
    for place in places:
        ours, others = (answers(folder / place) for folder in (workdir, theirs))
        assert ours == others and len(ours) == 1 + 60
    assert losses(trainer.folder / "torn") == whole


def answers(path):
    """Return the lines of a results file in a fixed order, without the answers' times."""
    return sorted(re.sub(r'"seconds": [\d.e-]+', "", line) for line in path.read_text().splitlines())


def test_sigterm_saves_within_a_step_and_a_full_disk_leaves_it(trainer, whole):
    """The process ends after the step it was in, with that step saved; without room the next save is the end."""
    workdir = trainer.folder / "stopped"
    process = trainer.start("stopped")
    wait_until(lambda: len(losses(workdir)) >= 5, process)
    done = len(losses(workdir))
    process.terminate()
    process.join()
    assert process.exitcode == 128 + 15, trainer.errors("stopped")
    last = len(losses(workdir))
    assert last <= done + 2  # the step that ran, and one that may have ended between our look and the signal
    assert f"stopped in stage1 after step {last} of {STEPS}, saved in " in trainer.errors("stopped")
    folder = workdir / "checkpoints" / "stage1"
    saved = sorted(path.name for path in folder.iterdir())
    assert str(last) in saved
    process = trainer.start("stopped", file_size=30_000)  # smaller than the parameters: as on a full disk
    process.join()
    assert process.exitcode == 1
    assert f"no disk space for another checkpoint in {folder}: those before it are complete; " in trainer.errors(
        "stopped"
    )
    assert str(last) in [path.name for path in folder.iterdir()]
    process = trainer.start("stopped")
    process.join()
    assert process.exitcode == 0, trainer.errors("stopped")
    assert (workdir / "train.log").read_text().count(f"stage1: resuming from step {last}") == 2
    assert losses(workdir) == whole
