"""A run with other rules than the paper's, from training to answers."""

import numpy as np
import pytest

from ilvr_jax.checkpoints.export import export
from ilvr_jax.checkpoints.trained import load_model
from ilvr_jax.config.experiments import parse
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.data.examples import build_prompt
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.inference.engine import Engine
from ilvr_jax.inference.sizes import fit_settings
from ilvr_jax.training.loop import train
from ilvr_jax.training.run import check_choices
from tests.decoding import make_request
from tests.samples import tiny_config


def test_a_run_with_pauses_trains_resumes_answers_and_is_not_exported(tmp_path):
    config = tiny_config()
    config.stages = ("stage1", "stage2")
    config.model.slot_input = "pause"
    config.latents.selection = "random"
    for name in config.stages:
        config[name].steps = 2
    summary = train(parse(config), tmp_path / "run")
    assert [summary["stages"][name]["steps"] for name in config.stages] == [2, 2]
    trained = load_model(str(tmp_path / "run"))
    constant = np.asarray(trained.params["decoder"]["slot_input"]["embedding"])
    before = load_model(str(tmp_path / "run"), stage="stage1").params["decoder"]["slot_input"]["embedding"]
    assert np.abs(constant - np.asarray(before)).max() > 0  # it is learned
    record = FrozenLakeSource(parse(config).data.frozen_lake, 0, 1)[0]
    prompt = build_prompt(record, trained.tokenizer, trained.special, trained.prompts)
    look = (trained.special.latent_start,)
    request = make_request(prompt, 12, 3, forced_tokens=look)
    settings = fit_settings([request], 1, trained.model.geometry)
    answer = Engine(trained.model, trained.params, trained.special, settings, trained.tokenizer).answer([request])[0]
    assert answer.slots >= 3
    with pytest.raises(BadConfig, match="`model.slot_input` of .* must be hidden for an export.* got pause"):
        export(tmp_path / "run", tmp_path / "out", None, None, False, None)


def test_a_rule_that_does_not_exist_is_one_sentence_that_lists_those_that_do():
    config = tiny_config()
    config.model.slot_input = "hiden"
    with pytest.raises(BadConfig, match="`model.slot_input` .*hidden, normed, placed, projected, pause.*hiden"):
        check_choices(parse(config))
    config = tiny_config()
    config.model.slot_input = "placed"
    with pytest.raises(BadConfig, match="`latents.slot_positions` must be grid or turning_grid .* got text"):
        check_choices(parse(config))
    config = tiny_config()
    config.latents.selection = "cover"
    with pytest.raises(
        BadConfig, match="`latents.selection` must be one of coverage, dense, top_k, random, got 'cover'"
    ):
        check_choices(parse(config))
