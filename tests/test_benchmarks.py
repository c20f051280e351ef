"""The arithmetic of the benchmarks: lower bounds against numbers worked out by hand."""

import dataclasses

import pytest

from benchmarks import decode, latency
from benchmarks.latency import figures, least
from benchmarks.latency_cases import CASES, FIRST_WORD, METHODS, Case, forced_tokens, trace
from ilvr_jax.analysis.flops import Cost, Peaks, decoder_cost, layer_weights, vision_cost
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig, VisionConfig

VISION = VisionConfig(4, 16, 24, 2, 8, 112, (3,))
# Two layers of 2 heads of 4 channels, one of them with keys and values, and a vocabulary of 10.
CONFIG = ModelConfig(10, 8, 12, 2, 2, 1, 1e4, (0, 1, 1), VISION)
SMALL = Case("small", vision_tokens=64, looks=2, slots=3, text=2)


def test_weights_of_a_layer():
    assert layer_weights(CONFIG) == 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12


def test_one_token_of_the_decoder():
    """Two layers of 480 numbers, 80 in the head, and for each of 5 columns 2 x 4 cached numbers per layer."""
    cost = decoder_cost(CONFIG, start=5, count=1, rows=1)
    assert cost.reads == 2 * 480 + 80 + 5 * 2 * 2 * 4
    # Each layer multiplies 8 channels with the keys, and again with the values, of 6 columns.
    assert cost.flops == 2 * (2 * 480 + 80 + 2 * 2 * 8 * 6)


def test_rows_share_weights_and_a_common_prefix():
    one, four = (decoder_cost(CONFIG, 5, 1, rows) for rows in (1, 4))
    assert four.flops == 4 * one.flops
    assert four.reads - one.reads == 3 * 5 * 16
    assert decoder_cost(CONFIG, 5, 1, 4, shared=3).reads == 2 * 480 + 80 + 16 * (4 * 2 + 3)


def test_many_columns_cost_as_much_as_one_by_one_except_for_the_head():
    together = decoder_cost(CONFIG, 5, 4, 1).flops
    single = sum(decoder_cost(CONFIG, start, 1, 1).flops for start in range(5, 9))
    assert together == single - 3 * 2 * 80


def test_an_image():
    """64 vision tokens are 256 patches; 3 blocks see windows of 64 patches, one sees all."""
    cost = vision_cost(CONFIG, 64, images=1)
    block, embedding, merger = 4 * 16 * 16 + 3 * 16 * 24, 588 * 16, 64 * (64 + 8)
    assert cost.reads == 4 * block + embedding + merger
    attention = 256 * 2 * 16 * (3 * 64 + 256)
    assert cost.flops == 2 * (256 * (4 * block + embedding) + attention + 64 * merger)
    assert vision_cost(CONFIG, 64, 3) == Cost(3 * cost.flops, cost.reads)


def test_the_steps_of_an_answer():
    """A prompt of 102 tokens; three texts of 2, and looks of 5 columns or pictures of 68 in between."""
    assert SMALL.prompt == 102
    latent, pixels, text, single = (trace(SMALL, method) for method in ("latent", "pixels", "text", "single"))
    assert latent.text == (103, 104, 110, 111, 117) and latent.slots == (*range(105, 110), *range(112, 117))
    assert pixels.text == (103, 104, 173, 174, 243) and pixels.pictures == (104, 174) and not pixels.slots
    assert text.text == tuple(range(103, 108)) and text.steps == 5
    assert single.slots == tuple(range(103, 108)) and single.text == tuple(range(108, 113))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_method_writes_the_same_text(case):
    counts = {method: forced_tokens(case, method).count(FIRST_WORD) for method in METHODS}
    assert set(counts.values()) == {case.text * (case.looks + 1)}
    assert len(trace(case, "pixels").pictures) == case.looks
    assert len(trace(case, "latent").slots) == case.looks * (case.slots + 2)


def test_the_least_time_is_the_larger_of_arithmetic_and_memory():
    assert Peaks(flops=100.0, bandwidth=10.0).seconds(1000, 50) == 10.0
    assert Peaks(flops=100.0, bandwidth=10.0).seconds(1000, 200) == 20.0


def test_the_least_answer_is_made_of_its_parts():
    peaks = Peaks(flops=1e30, bandwidth=4.0)  # so that seconds equal the numbers read, of 4 bytes each
    floor = least(CONFIG, SMALL, "latent", peaks)
    weights = 2 * 480 + 80
    assert floor["first_token"] == vision_cost(CONFIG, 64, 1).reads + weights
    columns = sum(column - 1 for column in trace(SMALL, "latent").slots)
    assert floor["look"] == (10 * weights + 16 * columns) / 2
    assert floor["answer"] == pytest.approx(floor["first_token"] + floor["text"] + floor["looks"])
    assert "look" not in least(CONFIG, SMALL, "text", peaks)


def test_figures_are_shares_of_an_answer():
    steps = trace(SMALL, "pixels")
    parts = figures(3.0, 10.0, 4.0, steps, "pixels", SMALL)
    assert parts["text_token"] == 2.0 and parts["look"] == 2.0 and parts["answer"] == 17.0


@pytest.mark.parametrize("model, layers, whole", [("3b", 9, 36), ("7b", 7, 28)])
def test_a_quarter_of_a_model_keeps_its_proportions(model, layers, whole):
    full, quarter = (latency.scaled_config(model, count, "bfloat16") for count in (whole, layers))
    assert quarter.num_hidden_layers * 4 == full.num_hidden_layers and quarter.vision.depth * 4 == full.vision.depth
    assert quarter.vision.fullatt_block_indexes == (7,) and abs(quarter.vocab_size * 4 - full.vocab_size) <= 128
    same = {"num_hidden_layers": 1, "vocab_size": 1, "vision": VISION}
    assert dataclasses.replace(quarter, **same) == dataclasses.replace(full, **same)


def test_rates_exclude_the_first_tokens():
    assert decode.rates(batch=4, new_tokens=11, seconds=6.0, first=1.0) == (44 / 6, 8.0)
