"""Decoding: rows are independent, latent mode follows its rules, sampling follows its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilvr_jax.config.schema import SamplingParams
from ilvr_jax.inference import kv_cache
from ilvr_jax.inference.engine import generate
from ilvr_jax.inference.kv_cache import init_kv_cache, write_columns
from ilvr_jax.inference.sampling import RowSampling, check_sampling, sample_tokens
from ilvr_jax.models.attention import causal_mask
from tests.decoding import MODEL, PARAMS, eager_to_look, lay_out, make_request, positions_by_definition, prompts
from tests.samples import SPECIAL, seen_until_look


def decode(rows, seeds, params=PARAMS, max_new_tokens=24, latent_size=3, **sampling):
    """Return the tokens of one batch of answers."""
    settings = (max_new_tokens, latent_size)
    requests = [make_request(row, *settings, seed=seed, **sampling) for row, seed in zip(rows, seeds, strict=True)]
    return [output.tokens for output in generate(MODEL, params, requests, SPECIAL)]


SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_is_decoded_alike_alone_and_in_company(sampling):
    rows, seeds = prompts(), [7, 8, 9, 10, 11]
    together = decode(rows, seeds, **sampling)
    assert any(SPECIAL.latent_pad in tokens for tokens in together)
    for row, seed, tokens in zip(rows, seeds, together, strict=True):
        assert decode([row], [seed], **sampling) == [tokens]


def test_latent_segments_are_whole_and_closed():
    answers = decode(prompts(), range(5), max_new_tokens=40, temperature=1.0)
    looks, run = 0, (SPECIAL.latent_pad,) * 3 + (SPECIAL.latent_end,)
    for tokens in answers:
        starts = [place for place, token in enumerate(tokens) if token == SPECIAL.latent_start]
        for place in starts:
            inside = tokens[place + 1 : place + 5]
            assert inside == run[: len(inside)]
        outside = [token for token in tokens if token in run]
        assert len(outside) == sum(len(tokens[place + 1 : place + 5]) for place in starts)
        looks += len(starts)
    assert looks > 3


@pytest.mark.parametrize(
    ("visibility", "rule"),
    [("all", "text"), ("until_look", "text"), ("all", "grid"), ("until_look", "turning_grid")],
)
def test_tokens_are_those_of_step_by_step_recomputation(visibility, rule):
    """The definition, slow: the whole sequence again for every token, a slot's input the hidden state before it."""
    decoder, new_tokens = PARAMS["decoder"], 24
    settings, masked, looks = {"image_visibility": visibility, "slot_positions": rule}, 0, 0
    for prompt in prompts()[:3]:
        (expected,) = decode([prompt], [0], max_new_tokens=new_tokens, latent_size=4, **settings)
        looks = max(looks, expected.count(SPECIAL.latent_end))
        batch = lay_out([prompt])
        features = MODEL.encode_images(PARAMS["vision"], batch.images)
        room = ((0, 0), (0, new_tokens), (0, 0))
        inputs = jnp.pad(MODEL.embed(decoder, batch.tokens, batch.image_index, features), room)
        new_positions = positions_by_definition(expected, rule, batch.positions.max() + 1)[None]
        new_positions = jnp.pad(new_positions, ((0, 0), (0, 0), (0, new_tokens - len(expected))))
        positions = jnp.concatenate([batch.positions, new_positions], axis=2)
        mask = causal_mask(jnp.ones(inputs.shape[:2], bool))
        if visibility == "until_look" and len(prompt.images) and SPECIAL.latent_start in expected:
            visible = seen_until_look([*prompt.tokens, *expected])
            mask = np.array(mask)
            mask[0, : len(visible), : len(visible)] = visible
            masked += 1
        recompute = jax.jit(lambda inputs, positions, mask: MODEL.decode(decoder, inputs, positions, mask)[0])
        last, slots, tokens = batch.tokens.shape[1] - 1, 0, []
        for _ in range(new_tokens):
            hidden = recompute(inputs, positions, mask)[:, last]
            if slots > 0:
                slots, token = slots - 1, SPECIAL.latent_pad
            elif tokens and tokens[-1] == SPECIAL.latent_pad:
                token = SPECIAL.latent_end
            else:
                logits = MODEL.logits(decoder, hidden)
                token = int(jnp.argmax(logits.at[:, jnp.array([SPECIAL.latent_pad, SPECIAL.latent_end])].set(-jnp.inf)))
                slots = 4 if token == SPECIAL.latent_start else 0
            tokens.append(token)
            if token == SPECIAL.im_end:
                break
            following = MODEL.embed(decoder, jnp.array([token]))
            last += 1
            inputs = inputs.at[:, last].set(hidden if token == SPECIAL.latent_pad else following)
        assert list(expected) == tokens
    assert looks > 1
    assert masked or visibility == "all"


def test_a_segment_can_end_early():
    params = eager_to_look()
    eager_to_end = params["decoder"]["lm_head"].at[SPECIAL.latent_end].set(40 * params["decoder"]["lm_head"][7])
    params["decoder"]["lm_head"] = eager_to_end
    settings = {"max_new_tokens": 30, "latent_size": 6, "temperature": 1.0}
    fixed = decode(prompts(), range(5), params, **settings)
    early = decode(prompts(), range(5), params, **settings, early_end=True)

    def slots_per_look(answers):
        looks = sum(tokens[:23].count(SPECIAL.latent_start) for tokens in answers)
        return sum(tokens.count(SPECIAL.latent_pad) for tokens in answers) / max(1, looks)

    assert slots_per_look(early) < slots_per_look(fixed)
    assert any(SPECIAL.latent_end in tokens for tokens in early)


def test_rows_stop_at_their_own_end():
    params = MODEL.init(jax.random.key(3))
    params["decoder"]["lm_head"] = params["decoder"]["lm_head"].at[SPECIAL.im_end].multiply(4.0)
    answers = decode(prompts(), range(5), params, max_new_tokens=30, temperature=1.0)
    assert len(set(map(len, answers))) > 1
    for tokens in answers:
        assert SPECIAL.im_end not in tokens[:-1] and (len(tokens) == 30 or tokens[-1] == SPECIAL.im_end)


def test_sampling_follows_the_truncated_distribution():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    rows = 20000
    seeds = jnp.arange(rows, dtype=jnp.uint32)

    def shares(temperature, top_k, top_p):
        values = (temperature, top_k, top_p, 1.0, 0)
        sampling = RowSampling(*(jnp.full(rows, value) for value in values), seeds)
        tokens = sample_tokens(jnp.tile(logits, (rows, 1)), sampling, jnp.full(rows, 3))
        return np.bincount(tokens, minlength=4) / rows

    np.testing.assert_allclose(shares(1.0, 0, 1.0), [0.5, 0.25, 0.15, 0.1], atol=0.015)
    np.testing.assert_allclose(shares(1.0, 2, 1.0), [2 / 3, 1 / 3, 0, 0], atol=0.015)
    np.testing.assert_allclose(shares(1.0, 0, 0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], atol=0.015)
    squared = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(shares(0.5, 0, 1.0), squared / squared.sum(), atol=0.015)
    np.testing.assert_allclose(shares(0.0, 0, 1.0), [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be from 1 to 131072, got 0"),
        ({"temperature": -1.0}, "temperature must be from 0 to 1000000.0, got -1.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"min_new_tokens": 9}, r"min_new_tokens must be at most max_new_tokens \(8\), got 9"),
        ({"stop": "end"}, "stop must be a tuple, got 'end'"),
        ({"n": 0}, "n must be from 1 to 65536, got 0"),
    ],
)
def test_bad_sampling_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(SamplingParams(**{"max_new_tokens": 8} | changes))


@pytest.mark.parametrize("rows", [None, [2, 0, 5]], ids=["all rows", "some rows"])
@pytest.mark.parametrize("split", [False, True])
def test_columns_are_written_alike_on_every_platform(monkeypatch, rows, split):
    """Windows that end beyond the cache, and rows without columns, are those that a slice would clamp."""
    rng = np.random.default_rng(0)
    cache = init_kv_cache(MODEL, 3, 10, split)
    cache = jax.tree.map(lambda part: jnp.array(rng.standard_normal(part.shape), part.dtype), cache)
    shape = (MODEL.config.num_hidden_layers, 3, 4, MODEL.config.num_key_value_heads, MODEL.config.head_dim)
    new = tuple(jnp.array(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    new = tuple(map(tuple, new)) if split else new
    starts, counts = np.array([2, 8, 0]), np.array([4, 2, 0])
    rows = None if rows is None else np.array(rows)
    scattered = write_columns(cache, new, starts, counts, rows)
    monkeypatch.setattr(kv_cache, "current_platform", lambda: "tpu")
    jax.tree.map(np.testing.assert_array_equal, write_columns(cache, new, starts, counts, rows), scattered)
    written = np.asarray(scattered.values[0])[0 if rows is None else 2]
    np.testing.assert_array_equal(written[:, 2:6], np.swapaxes(new[1][0][0], 0, 1))
