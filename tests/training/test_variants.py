"""The base config and its variants: every record has a bucket."""

from pathlib import Path

import pytest

from configs.base import VARIANTS
from ilvr_jax.checkpoints.runs import build_run_model
from ilvr_jax.config.experiments import BadConfig, load_config, parse
from ilvr_jax.data.examples import build_example
from ilvr_jax.data.sources import config_buckets, example_settings, make_tokenizer, open_source
from ilvr_jax.data.tokenizer import special_tokens
from ilvr_jax.method.layout import fits
from tests.paths import REPOSITORY

CONFIG = REPOSITORY / "configs" / "base.py"


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with the words of all variants."""
    config = parse(load_config(f"{CONFIG}:text_tokens"))
    return make_tokenizer(config, open_source(config.data, config.seed))


@pytest.mark.parametrize("variant", ["", *VARIANTS])
def test_every_record_of_every_stage_has_a_bucket(variant, tokenizer):
    config = parse(load_config(f"{CONFIG}:{variant}" if variant else CONFIG))
    source = open_source(config.data, config.seed)
    special, geometry = special_tokens(tokenizer), build_run_model(config, Path(), tokenizer).geometry
    for stage in config.stages.values():
        settings = example_settings(config, geometry, stage.helper_images)
        buckets = config_buckets(config, stage.helper_images)
        for number in range(60):
            sample = build_example(source[number], tokenizer, special, settings, number)
            assert any(fits(sample, layout, geometry) for layout in buckets.values()), (stage, number)


def test_an_unknown_variant_is_named():
    with pytest.raises(BadConfig, match="must be one of text, text_tokens, markers, pause, .*got 'texts'"):
        load_config(f"{CONFIG}:texts")
