"""Decoding: rows are independent, latent mode follows its rules, sampling follows its distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilvr_jax.inference.decode import DecodeSettings, generate
from ilvr_jax.inference.sampling import Sampling, sample_tokens
from ilvr_jax.models.attention import causal_mask
from tests.decoding import MODEL, PARAMS, eager_to_look, lay_out, prompts
from tests.samples import SPECIAL


def decode(rows, seeds, how, extra=0, params=None):
    seeds = np.asarray(seeds, np.uint32)
    return generate(MODEL, params or PARAMS, lay_out(rows, extra), seeds, how, SPECIAL)


SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_is_decoded_alike_alone_and_in_company(sampling):
    how = DecodeSettings(24, 3, **sampling)
    rows, seeds = prompts(), [7, 8, 9, 10, 11]
    together = decode(rows, seeds, how, extra=4)
    assert (np.asarray(together.tokens) == SPECIAL.latent_pad).any()
    for row, seed, tokens, length in zip(rows, seeds, *map(np.asarray, together), strict=True):
        alone = decode([row], [seed], how)
        np.testing.assert_array_equal(alone.tokens[0], tokens)
        assert int(alone.lengths[0]) == length


def test_latent_segments_are_whole_and_closed():
    tokens = np.asarray(decode(prompts(), range(5), DecodeSettings(40, 3, temperature=1.0)).tokens)
    starts = np.argwhere(tokens[:, :-5] == SPECIAL.latent_start)
    assert len(starts) > 3
    for row, column in starts:
        run = tokens[row, column + 1 : column + 5].tolist()
        assert run == [SPECIAL.latent_pad] * 3 + [SPECIAL.latent_end]
    inside = sum((tokens == token).sum() for token in (SPECIAL.latent_pad, SPECIAL.latent_end))
    whole = sum((tokens[row, column:] > 0).sum() >= 5 for row, column in starts)
    assert inside >= whole * 4


def test_tokens_are_those_of_step_by_step_recomputation():
    """The definition, slow: the whole sequence again for every token, a slot's input the hidden state before it."""
    how, decoder = DecodeSettings(20, 3), PARAMS["decoder"]
    for prompt in prompts()[:3]:
        expected = np.asarray(decode([prompt], [0], how).tokens[0])
        batch = lay_out([prompt])
        features = MODEL.encode_images(PARAMS["vision"], batch.images)
        room = ((0, 0), (0, how.max_new_tokens), (0, 0))
        inputs = jnp.pad(MODEL.embed(decoder, batch.tokens, batch.image_index, features), room)
        new_positions = batch.positions.max() + 1 + jnp.arange(how.max_new_tokens)
        new_positions = jnp.broadcast_to(new_positions, (1, 3, how.max_new_tokens))
        positions = jnp.concatenate([batch.positions, new_positions], axis=2)
        mask = causal_mask(jnp.ones(inputs.shape[:2], bool))
        recompute = jax.jit(lambda inputs, positions, mask: MODEL.decode(decoder, inputs, positions, mask)[0])
        last, slots, tokens = batch.tokens.shape[1] - 1, 0, []
        for _ in range(how.max_new_tokens):
            hidden = recompute(inputs, positions, mask)[:, last]
            if slots > 0:
                slots, token = slots - 1, SPECIAL.latent_pad
            elif tokens and tokens[-1] == SPECIAL.latent_pad:
                token = SPECIAL.latent_end
            else:
                logits = MODEL.logits(decoder, hidden)
                token = int(jnp.argmax(logits.at[:, jnp.array([SPECIAL.latent_pad, SPECIAL.latent_end])].set(-jnp.inf)))
                slots = 3 if token == SPECIAL.latent_start else 0
            tokens.append(token)
            if token == SPECIAL.im_end:
                break
            following = MODEL.embed(decoder, jnp.array([token]))
            last += 1
            inputs = inputs.at[:, last].set(hidden if token == SPECIAL.latent_pad else following)
        np.testing.assert_array_equal(expected[: len(tokens)], tokens)


def test_a_segment_can_end_early():
    params = eager_to_look()
    eager_to_end = params["decoder"]["lm_head"].at[SPECIAL.latent_end].set(40 * params["decoder"]["lm_head"][7])
    params["decoder"]["lm_head"] = eager_to_end
    how = DecodeSettings(30, 6, temperature=1.0)
    fixed = np.asarray(decode(prompts(), range(5), how, params=params).tokens)
    early = np.asarray(decode(prompts(), range(5), dataclasses.replace(how, early_end=True), params=params).tokens)

    def slots_a_segment(tokens):
        starts = (tokens[:, :23] == SPECIAL.latent_start).sum()
        return (tokens == SPECIAL.latent_pad).sum() / max(1, starts)

    assert slots_a_segment(early) < slots_a_segment(fixed)
    assert SPECIAL.latent_end in early


def test_rows_stop_at_their_own_end():
    params = MODEL.init(jax.random.key(3))
    params["decoder"]["lm_head"] = params["decoder"]["lm_head"].at[SPECIAL.im_end].multiply(4.0)
    decoded = decode(prompts(), range(5), DecodeSettings(30, 3, temperature=1.0), params=params)
    tokens, lengths = map(np.asarray, decoded)
    assert len(set(lengths.tolist())) > 1
    for row, length in zip(tokens, lengths, strict=True):
        if length < 30:
            assert row[length - 1] == SPECIAL.im_end and (row[length:] == SPECIAL.pad).all()


def test_sampling_follows_the_truncated_distribution():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    rows = 20000
    seeds = jnp.arange(rows, dtype=jnp.uint32)

    def shares(temperature, top_k, top_p):
        sampling = Sampling(*(jnp.full(rows, value) for value in (temperature, top_k, top_p)), seeds)
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
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 to 131072, got 0"),
        ({"temperature": -1.0}, r"temperature must be 0 or a number from 1e-6 to 1e6, got -1.0"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DecodeSettings(**{"max_new_tokens": 8, "latent_size": 3, **changes})
