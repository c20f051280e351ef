"""Requests that cannot be served: each gets one sentence, and the others are answered as without it."""

import dataclasses

import numpy as np

from ilvr_jax.inference.requests import Request
from ilvr_jax.inference.sizes import fit_settings
from ilvr_jax.models.qwen2_5_vl.images import EncodedImage
from tests.decoding import changed, make_engine, make_prompt, make_request, mixed_requests, same
from tests.samples import GEOMETRY, VOCABULARY, random_sample

GOOD = make_request(make_prompt(0), 8, 3)


def with_prompt(request: Request, **changes) -> Request:
    """Return a request whose prompt is changed, by field."""
    return dataclasses.replace(request, prompt=dataclasses.replace(request.prompt, **changes))


def with_image(image) -> Request:
    return with_prompt(GOOD, images=(image,))


PATCHES = GOOD.prompt.images[0]
NUMBERS = {
    "max_new_tokens": ("8", 8.0, True, -1, 0, 25, None, 2**31, 10**20, float("nan")),
    "latent_size": ("3", -1, None, 2**31, 10**5000, 1.5),
    "top_k": (-1, 2**31, 1.0, None, "all", False),
    "seed": (-1, 2**32, 10**19, "1", None),
    "temperature": (-1.0, float("nan"), float("inf"), 1e300, 1e-40, "hot", None, 1j),
    "top_p": (0.0, -1, 1.1, float("nan"), 1e-50, None, "all"),
    "method": ("pixel", None, ["text"]),
    "early_end": (None, "no"),
    "log_probabilities": (1,),
    "slot_states": ("yes",),
    "forced_tokens": ((11,) * 9, (VOCABULARY,), (-2,), "ab", 5, (1.5,)),
    "prompt": (None, "a question", np.zeros(3, np.int32)),
}
REFUSALS = [(changed(GOOD, **{name: value}), name) for name in NUMBERS for value in NUMBERS[name]] + [
    (
        changed(GOOD, prompt=make_prompt(0, ((2, 3),) * 12)),
        "the prompt must have at most 88 tokens beside 8 new ones, got 105",
    ),
    (
        changed(GOOD, prompt=make_prompt(0, ((5, 5),))),
        "an image must take at most 16 vision tokens, whole attention windows counted, got 36 for 5x5",
    ),
    (changed(GOOD, max_new_tokens=25), "max_new_tokens must be a whole number from 1 to 24, got 25"),
    (changed(GOOD, temperature=-1.0), "temperature must be from 0 to 1000000.0, got -1.0"),
    (changed(GOOD, method="pixels"), "draw_look must be a function"),
    (changed(GOOD, method="single", forced_tokens=(11,)), "forced_tokens must be empty"),
    (with_prompt(GOOD, tokens=np.zeros(0, np.int32), positions=np.zeros((3, 0), np.int32)), "the prompt must have one"),
    (with_prompt(GOOD, tokens=GOOD.prompt.tokens.astype(float)), "the prompt must have one token or more"),
    (
        with_prompt(GOOD, tokens=GOOD.prompt.tokens + VOCABULARY),
        "a token of the prompt must be a whole number from",
    ),
    (with_prompt(GOOD, positions=GOOD.prompt.positions[:2]), "the prompt's positions must have shape (3, "),
    (with_prompt(GOOD, positions=GOOD.prompt.positions + 2**30), "the prompt's positions must be from 0"),
    (with_prompt(GOOD, images=None), "the prompt's images must be a tuple"),
    (with_prompt(GOOD, images=()), "the prompt must have an image_pad for each of 0 vision tokens, got 6"),
    (
        with_prompt(GOOD, images=(PATCHES, PATCHES)),
        "the prompt must have an image_pad for each of 12 vision tokens, got 6",
    ),
    (make_request(random_sample(np.random.default_rng(0)), 8, 3), "the prompt must have no latent slots"),
    (with_image("map.png"), "an image must be a PatchedImage or EncodedImage"),
    (with_image(PATCHES._replace(height=3)), "the height of an image in patches must be even"),
    (with_image(PATCHES._replace(width=-6)), "the width of an image in patches must be a whole number"),
    (with_image(PATCHES._replace(pixels=PATCHES.pixels[:-1])), "pixels of 4x6 patches must have shape (24, 588)"),
    (with_image(PATCHES._replace(pixels=PATCHES.pixels.astype(np.float32))), "pixels of 4x6 patches must have shape"),
    (
        with_image(PATCHES._replace(pixels=np.full((24, 1176), np.nan, np.float32))),
        "values of an image must be finite",
    ),
    (with_image(PATCHES._replace(pixels=np.full((24, 1176), 1e38, np.float32))), "values of an image must be finite"),
    (
        with_image(EncodedImage(np.full((2, 3, 32), -np.inf, np.float32))),
        "values of an image must be finite and at most",
    ),
    (with_image(EncodedImage(np.zeros((2, 3, 31), np.float32))), "an encoded image must have 32 channels, got 31"),
    (with_image(EncodedImage(np.zeros((2, 3), np.float32))), "features of an image must be [rows, columns, channels]"),
    (None, "a request must be a Request, got None"),
    ({"prompt": "x"}, "a request must be a Request, got"),
]


def test_what_cannot_be_served_is_answered_with_a_sentence_and_the_rest_as_without_it():
    engine = make_engine(latent_vectors=True)
    others = mixed_requests(len(REFUSALS))
    requests = [request for pair in zip(others, [bad for bad, _ in REFUSALS], strict=True) for request in pair]
    answers = engine.answer(requests)
    assert [answer.number for answer in answers] == list(range(len(requests)))
    for (_, sentence), answer in zip(REFUSALS, answers[1::2], strict=True):
        assert answer.stop_reason == "refused" and sentence in answer.error and answer.tokens == ()
        assert len(answer.error) < 400 and " must " in answer.error
    for answer, expected in zip(answers[::2], engine.answer(others), strict=True):
        same(answer, expected)
    assert make_engine().answer([changed(GOOD, latent_vectors=True)])[0].stop_reason == "refused"


def test_sizes_are_chosen_from_the_requests_that_can_be_served():
    bad = [request for request, sentence in REFUSALS if sentence in ("max_new_tokens", "prompt") or request is None]
    bad = [request for request in bad if not (request and request.sampling.max_new_tokens == 25)]
    assert fit_settings([*bad, GOOD], 4, GEOMETRY) == fit_settings([GOOD], 4, GEOMETRY)
