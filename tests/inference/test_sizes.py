"""The sizes of an engine: chunks cover a prompt, few sizes hold all, and the requests fit."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilvr_jax.inference.engine import Engine
from ilvr_jax.inference.sizes import few_sizes, fit_settings, plan_chunks
from tests.decoding import MODEL, PARAMS, SETTINGS, make_prompt, make_request, mixed_requests
from tests.samples import FIRST_WORD, GEOMETRY, SPECIAL, VOCABULARY, random_image


@given(st.integers(1, 4000), st.sets(st.integers(1, 600), min_size=1, max_size=4))
def test_chunks_cover_a_prompt_once(tokens, sizes):
    plan = plan_chunks(tokens, sorted(sizes))
    places = [place for start, count, _ in plan for place in range(start, start + count)]
    assert places == list(range(tokens))
    assert all(count <= size and size in sizes for _, count, size in plan)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_few_sizes_hold_all_that_is_needed(needed):
    sizes = few_sizes(needed)
    assert max(sizes) == max(needed) and len(sizes) <= 3 and set(sizes) <= set(needed)
    assert len(set(needed)) > 3 or set(sizes) == set(needed)


def test_settings_fit_the_requests():
    requests = mixed_requests(12)
    settings = fit_settings(requests, 4, GEOMETRY)
    engine = Engine(MODEL, PARAMS, SPECIAL, settings)
    assert not any(engine.validate(request) for request in requests)
    assert settings.rows == 4 and len(settings.chunks) <= 3
    with pytest.raises(ValueError, match="there are no requests"):
        fit_settings([], 4, GEOMETRY)
    with pytest.raises(ValueError, match="ascending numbers"):
        dataclasses.replace(SETTINGS, chunks=(16, 8))
    assert VOCABULARY > FIRST_WORD


def test_pictures_larger_than_the_prompts_images_have_room():
    def draw(rows, columns):
        return lambda tokens: random_image(np.random.default_rng(0), rows, columns)

    request = make_request(make_prompt(0), 24, 3, method="pixels", draw_look=draw(1, 1))
    small, large, broken = (
        fit_settings([dataclasses.replace(request, draw_look=function)], 1, GEOMETRY, pictures=2)
        for function in (draw(1, 1), draw(6, 6), draw(None, 1))
    )
    assert small.columns == broken.columns and large.columns >= len(request.prompt.tokens) + 24 + 2 * (4 + 36)
    assert small.image_tokens[-1] < 36 <= large.image_tokens[-1]
