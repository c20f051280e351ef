"""The recipes of docs/fork.md: each diff applies, and what it adds trains, answers and is scored."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.paths import REPOSITORY

RECIPES = re.findall(r"^```diff\n(.*?)^```", (REPOSITORY / "docs" / "fork.md").read_text(), re.DOTALL | re.MULTILINE)
CONFIG = """
from configs import plain_maps


def get_config():
    config = plain_maps.get_config()
    config.stages = ("stage1", "stage2")
    for name in config.stages:
        config[name].update(steps=2, batch_size=2)
    config.stage2.objective = "quiet"
    config.latents.update(latent_size=2, selection="least")
    config.model.update(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.model.update(num_key_value_heads=1, mrope_section=(1, 1, 2), slot_input="mixed", backbone="plain")
    config.model.vision.update(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, fullatt_block_indexes=(0,))
    config.data.frozen_lake.update(levels=(3,), max_moves=4)
    config.data.buckets = {"small": dict(prefix=120, segments=2, text=30, tail=30, image_tokens=16, helper_tokens=16)}
    config.eval.update(data="", max_new_tokens=8)
    config.log_every = 1
    return config
"""


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the repository with all recipes applied."""
    folder = tmp_path_factory.mktemp("fork")
    for name in ("ilvr_jax", "configs", "tests/data/vsp_planning"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "configs" / "mine.py").write_text(CONFIG)
    return folder


def run(fork, *arguments: str) -> str:
    """Return what Python prints in the fork."""
    finished = subprocess.run([sys.executable, *arguments], cwd=fork, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_recipe_applies_and_runs(fork):
    assert len(RECIPES) == 5
    for recipe in RECIPES:
        # Outside of any repository, as a user's checkout is patched.
        command = ["git", "apply", "-"]
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(fork.parent)}
        subprocess.run(command, cwd=fork, input=recipe, text=True, check=True, env=environment)
    run(fork, "-m", "ilvr_jax.train", "--config=configs/mine.py")
    metrics = (fork / "runs" / "mine" / "metrics.jsonl").read_text()
    assert '"similarity"' in metrics and '"slot_size"' in metrics
    opened = "from ilvr_jax.checkpoints.trained import load_model; print(type(load_model('runs/mine').model).__name__)"
    assert run(fork, "-c", opened) == "Plain\n"
    flags = ("--task=first_move", "--data=tests/data/vsp_planning/test.jsonl", "--limit=2")
    assert "first_move" in run(fork, "-m", "ilvr_jax.evaluate", "runs/mine", *flags)
