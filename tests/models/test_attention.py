"""Attention by a kernel against attention without one; the latter is held against transformers in test_qwen2_5_vl."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilvr_jax.models.attention import (
    CACHE_BLOCK,
    QUERY_BLOCK,
    KVCache,
    attention,
    cached_attention,
    causal_attention,
    causal_mask,
)
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.training.step import OBJECTIVES
from tests.samples import CONFIG
from tests.steps import assert_same, gradients, lay_out, samples


def inputs(columns, heads=4, key_value_heads=2, head_dim=16, rows=3):
    keys = jax.random.split(jax.random.key(columns), 4)
    query = jax.random.normal(keys[0], (rows, columns, heads, head_dim))
    key, value = (jax.random.normal(k, (rows, columns, key_value_heads, head_dim)) for k in keys[1:3])
    valid = jax.random.bernoulli(keys[3], 0.7, (rows, columns))  # padding anywhere, as between texts of unequal length
    return query, key, value, valid.at[0].set(True)


@pytest.mark.parametrize("columns", [7, 256, 300, 770])
def test_splash_equals_plain_attention_gradients_included(columns):
    query, key, value, valid = inputs(columns)
    weight = jax.random.normal(jax.random.key(1), query.shape) * valid[..., None, None]

    def weighed(kernel):
        def total(query, key, value):
            return (causal_attention(query, key, value, valid, kernel) * weight).sum()

        return jax.value_and_grad(total, (0, 1, 2))(query, key, value)

    for splash, plain in zip(jax.tree.leaves(weighed("splash")), jax.tree.leaves(weighed("xla")), strict=True):
        np.testing.assert_allclose(splash, plain, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU with cuDNN")
def test_cudnn_equals_plain_attention():
    query, key, value, valid = inputs(300, heads=8, head_dim=128)
    half = [array.astype(jnp.bfloat16) for array in (query, key, value)]
    plain = causal_attention(query, key, value, valid, "xla")
    np.testing.assert_allclose(causal_attention(*half, valid, "cudnn")[valid], plain[valid], atol=3e-2)


def test_what_padding_holds_changes_nothing():
    query, key, value, valid = inputs(40)
    other = jnp.where(valid[..., None, None], key, 100.0), jnp.where(valid[..., None, None], value, -100.0)
    for kernel in ("xla", "splash"):
        same = causal_attention(query, key, value, valid, kernel)
        changed = causal_attention(query, *other, valid, kernel)
        assert np.isfinite(changed).all()
        np.testing.assert_allclose(same[valid], changed[valid], atol=1e-6, err_msg=kernel)


def test_a_mask_of_columns_is_the_causal_mask_of_them():
    model = Qwen2_5VL(CONFIG)
    decoder = model.init(jax.random.key(0))["decoder"]
    batch = lay_out(samples())
    embedded = model.embed(decoder, batch.tokens)
    by_columns, _ = model.decode(decoder, embedded, batch.positions, batch.valid)
    by_pairs, _ = model.decode(decoder, embedded, batch.positions, causal_mask(batch.valid))
    np.testing.assert_array_equal(by_columns, by_pairs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_with_splash_has_the_gradients_of_one_without(name):
    batch = lay_out(samples())
    assert_same(gradients(name, batch, attention="splash"), gradients(name, batch))


@pytest.mark.parametrize(("queries", "block"), [(1, QUERY_BLOCK), (5, CACHE_BLOCK)])
def test_attention_to_a_cache_is_that_to_its_columns_in_use(queries, block):
    """The cache has blocks that nobody uses, and rows that end within different ones."""
    rng = np.random.default_rng(0)
    columns, lengths = 2 * block + 9, np.array([0, 7, block, 2 * block + 1])

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    query, key, value = normal(4, queries, 6, 8), normal(4, queries, 2, 8), normal(4, queries, 2, 8)
    past = [normal(4, columns, 2, 8), normal(4, columns, 2, 8)]
    here = np.tril(np.ones((1, queries, queries), bool))
    layer, others = 2, rng.standard_normal((3, 2, 4, 2, columns, 8)).astype(np.float32)
    others[layer] = [part.swapaxes(1, 2) for part in past]
    stacked, split = (others[:, 0], others[:, 1]), (tuple(others[:, 0]), tuple(others[:, 1]))
    given = cached_attention(query, key, value, here, KVCache(*stacked, lengths), layer)
    apart = cached_attention(query, key, value, here, KVCache(*split, lengths), layer)
    np.testing.assert_array_equal(apart, given)
    before = np.broadcast_to(np.arange(columns) < lengths[:, None, None], (4, queries, columns))
    mask = np.concatenate([before, np.broadcast_to(here, (4, queries, queries))], axis=2)
    np.testing.assert_allclose(given, attention(query, [past[0], key], [past[1], value], mask), atol=1e-5)
    for row in range(4):  # to the last bit, whatever the longest row is
        longer = np.where(np.arange(4) == row, lengths, columns)
        other = cached_attention(query, key, value, here, KVCache(*stacked, longer), layer)
        np.testing.assert_array_equal(other[row], given[row])
