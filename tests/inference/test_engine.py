"""The engine: an answer depends on its request alone, whatever else is served, reused or compiled beside it."""

import contextlib
import dataclasses
import threading
from unittest import mock

import jax
import numpy as np
import pytest
from jax import monitoring

from ilvr_jax.inference.batch import DecodeBatch
from ilvr_jax.inference.engine import Engine, EngineInUse
from ilvr_jax.inference.requests import Request
from ilvr_jax.inference.sizes import fit_settings
from ilvr_jax.method.layout import build_sample, collate, required_layout
from ilvr_jax.models.qwen2_5_vl.images import EncodedImage
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from tests.decoding import (
    MODEL,
    PARAMS,
    changed,
    draw_look,
    make_engine,
    make_prompt,
    make_request,
    mixed_requests,
    same,
)
from tests.samples import CONFIG, FIRST_WORD, GEOMETRY, SPECIAL, random_image, seen_until_look
from tests.vectors import of_kind


@pytest.fixture(scope="module")
def engine():
    return make_engine(latent_vectors=True)


def request_of(vector) -> Request:
    return make_request(vector.sample(), vector.meta["max_new_tokens"], vector.meta["latent_size"])


def test_published_tokens_alone_and_in_one_batch(request):
    """The conformance files have weights of their own: the batch is served under each, and that file compared."""
    vectors = of_kind(request.config.getoption("vectors"), "generate")
    for vector in vectors:
        group = [other for other in vectors if other.config == vector.config]
        geometry, special = vector.config.vision.geometry, vector.special
        requests = [request_of(other) for other in group]
        settings = fit_settings(requests, len(requests), geometry)
        engine = Engine(Qwen2_5VL(vector.config), vector.params(), special, settings)
        expected, number = vector["expect_tokens"], group.index(vector)
        for answer in (engine.answer(requests)[number], engine.answer([requests[number]])[0]):
            np.testing.assert_array_equal(answer.tokens[: len(expected)], expected)


def test_an_answer_is_the_same_alone_and_among_fifteen_others():
    requests = [dataclasses.replace(request, latent_vectors=True) for request in mixed_requests(16)]
    crowd = make_engine(rows=16, latent_vectors=True)
    together = crowd.answer(requests)
    assert {answer.stop_reason for answer in together} >= {"end", "length"}
    assert any(answer.slots for answer in together) and any(
        look.picture_tokens for answer in together for look in answer.looks
    )
    for request, answer in zip(requests, together, strict=True):
        same(crowd.answer([request])[0], answer)
    fresh = make_engine(rows=16, latent_vectors=True, share_prefixes=False)
    for answer, other in zip(fresh.answer(requests[::-1])[::-1], together, strict=True):
        same(answer, other)


def test_greedy_answers_are_the_same_whatever_is_prefilled_together():
    requests = [changed(request, temperature=0.0) for request in mixed_requests(24)]
    together = make_engine(rows=16, batch_invariant=False)
    answers = [answer.tokens for answer in together.answer(requests)]
    assert answers == [answer.tokens for answer in make_engine().answer(requests)]
    assert answers == [together.answer([request])[0].tokens for request in requests]


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_nothing_is_compiled_after_the_warm_up(batch_invariant):
    """Counted by JAX itself, over 200 requests of all kinds through four rows."""
    engine = make_engine(batch_invariant=batch_invariant)
    engine.warm_up()
    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        jax.jit(lambda x: x + len(compiled))(1.0)
        assert len(compiled) == 1  # the listener hears
        answers = engine.answer(mixed_requests(200))
        assert len(compiled) == 1
    finally:
        monitoring.clear_event_listeners()
    assert len(answers) == 200 and all(answer.stop_reason in ("end", "length") for answer in answers)
    assert [answer.name for answer in answers] == [f"request {number}" for number in range(200)]


@pytest.mark.parametrize("end", [16, 21])
def test_a_shared_prefix_is_taken_over_and_changes_nothing(end):
    """Prompts that begin alike, images included, for whole chunks; 16 is the end of one."""
    first = make_prompt(1, ((2, 3), (1, 2)), words=1)
    tokens = np.concatenate([first.tokens[:-2], np.full(60, FIRST_WORD, np.int32), first.tokens[-2:]])

    def prompt(length: int, images=first.images):
        kept = np.concatenate([tokens[: length - 2], tokens[-2:]])
        return build_sample(kept, images, (), SPECIAL, 3)

    alone, sharing = make_engine(share_prefixes=False), make_engine()
    long, short = prompt(60), prompt(32 + end)
    other_image = prompt(60, (first.images[0], random_image(np.random.default_rng(9), 1, 2)))
    requests = [make_request(sample, 20, 3) for sample in (long, short, long, other_image)]
    shared = (0, 16 * ((30 + end) // 16), 60, 0)
    for request, expected, tokens in zip(requests, alone.answer(requests), shared, strict=True):
        (answer,) = sharing.answer([request])
        same(answer, expected)
        assert answer.shared_tokens == tokens
    samples = sharing.answer([make_request(long, 20, 3, temperature=1.0, seed=seed) for seed in range(8)])
    assert all(answer.shared_tokens == 60 for answer in samples)
    assert len({answer.tokens for answer in samples}) > 1


def test_methods_look_as_they_should(engine):
    requests = [
        make_request(make_prompt(seed), 24, 3, method=method, temperature=1.0, seed=seed, draw_look=draw_look)
        for method in ("latent", "text", "single", "pixels")
        for seed in range(6)
    ]
    answers = make_engine(columns=160).answer(requests)
    latent, text, single, pixels = (answers[start : start + 6] for start in range(0, 24, 6))
    assert sum(len(answer.looks) for answer in latent) > 3
    assert not any(answer.looks for answer in text)
    assert all([look.position for look in answer.looks] == [0] and answer.slots == 3 for answer in single)
    assert all(SPECIAL.latent_start not in answer.tokens for answer in text)
    for answer in pixels:
        assert not answer.slots and SPECIAL.latent_pad not in answer.tokens
        for look in answer.looks[:-1]:
            assert look.picture_tokens == draw_look(answer.tokens[: look.position + 1]).vision_tokens
    assert any(look.picture_tokens for answer in pixels for look in answer.looks)


def test_a_picture_is_seen_as_if_it_had_been_in_the_prompt():
    """Pixel-level: what follows a picture is what follows the same tokens given at once."""
    request = make_request(make_prompt(2), 20, 3, method="pixels", forced_tokens=(11, 12, SPECIAL.latent_start))
    request = dataclasses.replace(request, draw_look=draw_look)
    engine = make_engine(columns=160)
    (answer,) = engine.answer([request])
    picture = draw_look(answer.tokens[:3])
    shown = [SPECIAL.vision_start, *[SPECIAL.image_pad] * picture.vision_tokens, SPECIAL.vision_end]
    tokens = [*request.prompt.tokens, 11, 12, SPECIAL.latent_start, *shown, SPECIAL.latent_end]
    whole = build_sample(np.array(tokens), (*request.prompt.images, picture), (), SPECIAL, 3)
    second = next((look.position for look in answer.looks[1:]), len(answer.tokens))
    (expected,) = engine.answer([make_request(whole, 17, 3)])
    assert second > 3
    assert expected.tokens[: second - 3] == answer.tokens[3:second]


def test_text_after_a_picture_does_not_see_the_image_if_that_is_hidden():
    forced = (11, 12, SPECIAL.latent_start, 13, 14, 15, 16)
    request = make_request(make_prompt(2), 20, 3, method="pixels", forced_tokens=forced)
    request = dataclasses.replace(request, draw_look=draw_look, image_visibility="until_look", log_probabilities=True)
    (answer,) = make_engine(columns=160).answer([request])
    picture, second = draw_look(answer.tokens[:3]), next((look.position for look in answer.looks[1:]), 20)
    shown = [SPECIAL.vision_start, *[SPECIAL.image_pad] * picture.vision_tokens, SPECIAL.vision_end]
    before = [*request.prompt.tokens, *answer.tokens[:3], *shown, SPECIAL.latent_end]
    tokens = np.array([*before, *answer.tokens[3:second]])
    whole = build_sample(tokens, (*request.prompt.images, picture), (), SPECIAL, 3)
    batch = collate([whole], required_layout(whole, GEOMETRY), SPECIAL, GEOMETRY)
    features = MODEL.encode_images(PARAMS["vision"], batch.images)
    inputs = MODEL.embed(PARAMS["decoder"], batch.tokens, batch.image_index, features)
    hidden, _ = MODEL.decode(PARAMS["decoder"], inputs, batch.positions, seen_until_look(tokens)[None])
    logits = np.array(MODEL.logits(PARAMS["decoder"], hidden[0, len(before) - 1 : -1]))
    logits[:, [SPECIAL.latent_pad, SPECIAL.latent_end]] = -np.inf
    expected = jax.nn.log_softmax(logits)[np.arange(len(logits)), tokens[len(before) :]]
    assert len(expected) > 3
    np.testing.assert_allclose(answer.log_probabilities[3:second], expected, atol=1e-4)


def test_log_probabilities_are_the_models():
    (answer,) = make_engine().answer(
        [make_request(make_prompt(0), 24, 3, log_probabilities=True, temperature=1.0, seed=3)]
    )
    prompt, decoder = make_prompt(0), PARAMS["decoder"]
    first_look = answer.looks[0].position if answer.looks else len(answer.tokens)
    assert first_look > 1
    batch = collate([prompt], required_layout(prompt, GEOMETRY), SPECIAL, GEOMETRY)
    features = MODEL.encode_images(PARAMS["vision"], batch.images)
    inputs = MODEL.embed(decoder, batch.tokens, batch.image_index, features)
    hidden, _ = MODEL.decode(decoder, inputs, batch.positions, batch.valid)
    logits = np.array(MODEL.logits(decoder, hidden[0, -1]))
    logits[[SPECIAL.latent_pad, SPECIAL.latent_end]] = -np.inf
    expected = jax.nn.log_softmax(logits)[answer.tokens[0]]
    np.testing.assert_allclose(answer.log_probabilities[0], expected, atol=1e-4)
    inside = [tokens in (SPECIAL.latent_pad, SPECIAL.latent_end) for tokens in answer.tokens]
    assert all((log == 0) == slot for log, slot in zip(answer.log_probabilities, inside, strict=True))


def test_vectors_of_slots_are_the_hidden_states_before_them(engine):
    prompt = make_prompt(4)
    given_tokens = (11, SPECIAL.latent_start)
    (answer,) = engine.answer([make_request(prompt, 12, 3, forced_tokens=given_tokens, latent_vectors=True)])
    assert answer.latent_vectors.shape == (answer.slots, CONFIG.hidden_size) and answer.looks[0].position == 1
    tokens = np.concatenate([prompt.tokens, given_tokens])
    batch = collate([prompt], dataclasses.replace(required_layout(prompt, GEOMETRY)), SPECIAL, GEOMETRY)
    features = MODEL.encode_images(PARAMS["vision"], batch.images)
    before = MODEL.embed(PARAMS["decoder"], batch.tokens, batch.image_index, features)
    inputs = np.concatenate([before, MODEL.embed(PARAMS["decoder"], np.array([given_tokens]))], axis=1)
    after = batch.positions.max() + 1 + np.broadcast_to(np.arange(2), (1, 3, 2))
    positions = np.concatenate([batch.positions, after], axis=2)
    hidden, _ = MODEL.decode(PARAMS["decoder"], inputs, positions, np.ones((1, len(tokens)), bool))
    np.testing.assert_allclose(answer.latent_vectors[0], hidden[0, -1], atol=1e-4)


def test_encoded_images_serve_as_well():
    prompt = make_prompt(0)
    batch = collate([prompt], required_layout(prompt, GEOMETRY), SPECIAL, GEOMETRY)
    features = np.asarray(MODEL.encode_images(PARAMS["vision"], batch.images))[0, 0, :6].reshape(2, 3, -1)
    encoded = dataclasses.replace(prompt, images=(EncodedImage(features),))
    engine = make_engine()
    assert (
        engine.answer([make_request(encoded, 12, 3)])[0].tokens
        == engine.answer([make_request(prompt, 12, 3)])[0].tokens
    )


def test_tokens_are_streamed_as_they_come(engine):
    requests, streamed = mixed_requests(6), {}
    served = engine.serve(requests, lambda number, tokens: streamed.setdefault(number, []).append(tokens))
    for answer in served:
        assert tuple(token for tokens in streamed[answer.number] for token in tokens) == answer.tokens
    assert max(len(tokens) for parts in streamed.values() for tokens in parts) <= 2


GOOD = make_request(make_prompt(0), 8, 3)
PATCHES = GOOD.prompt.images[0]


def raise_error(tokens):
    raise ZeroDivisionError("a fault\nof the renderer")


@pytest.mark.parametrize("draw", [raise_error, lambda tokens: None, lambda tokens: PATCHES._replace(height=2)])
def test_a_renderer_that_fails_ends_its_own_answer_alone(engine, draw):
    looking = make_request(
        make_prompt(0), 24, 3, method="pixels", forced_tokens=(11, SPECIAL.latent_start), draw_look=draw
    )
    others = mixed_requests(5)
    answers = engine.answer([others[0], looking, *others[1:]])
    failed = answers.pop(1)
    assert failed.stop_reason == "refused" and failed.tokens == (11, SPECIAL.latent_start)
    assert failed.error.startswith("draw_look must return a picture, got ") and "\n" not in failed.error
    for answer, expected in zip(answers, engine.answer(others), strict=True):
        same(answer, expected)


def in_threads(function, count: int) -> None:
    threads = [threading.Thread(target=function) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_second_caller_is_refused_and_the_first_is_not_disturbed(engine):
    requests = mixed_requests(8)
    expected = engine.answer(requests)
    first = engine.serve(requests)
    answers = [next(first)]
    refused = []

    def ask():
        with pytest.raises(EngineInUse, match="the engine is serving another call"):
            engine.answer(requests)
        refused.append(True)

    in_threads(ask, 2)
    ask()
    with pytest.raises(EngineInUse):
        engine.warm_up()
    assert len(refused) == 3
    answers += first
    for answer, other in zip(sorted(answers, key=lambda answer: answer.number), expected, strict=True):
        same(answer, other)


def test_threads_that_share_an_engine_get_their_own_answers_or_an_error(engine):
    requests = mixed_requests(8)
    expected, outcomes = engine.answer(requests), []

    def ask():
        try:
            outcomes.append(engine.answer(requests))
        except EngineInUse:
            outcomes.append(None)

    in_threads(ask, 4)
    assert len(outcomes) == 4 and any(outcomes)
    for answers in filter(None, outcomes):
        for answer, other in zip(answers, expected, strict=True):
            same(answer, other)


def failing_requests(count):
    yield from mixed_requests(count)
    raise ZeroDivisionError


def interrupt(name: str):
    """Return a stand-in for a method that is interrupted between donating arrays and replacing them."""

    def run(batch, *arguments):
        jax.tree.map(lambda array: array.delete(), (batch.state, batch._kv_cache))
        raise KeyboardInterrupt

    return mock.patch.object(DecodeBatch, name, run)


def test_an_engine_serves_again_after_it_was_left_in_the_middle(engine):
    requests = mixed_requests(9)
    expected = engine.answer(requests)

    def fail(number, tokens):
        raise ZeroDivisionError

    def leave():
        next(engine.serve(requests))

    def close():
        served = engine.serve(requests)
        next(served)
        served.close()

    def ask_again(number, tokens):
        engine.answer(requests)

    def interrupted():
        with interrupt("decode"):
            engine.answer(requests)

    for way, error in (
        (leave, None),
        (close, None),
        (lambda: engine.serve(requests), None),
        (lambda: list(engine.serve(requests, fail)), ZeroDivisionError),
        (lambda: list(engine.serve(requests, ask_again)), EngineInUse),
        (lambda: engine.answer(failing_requests(6)), ZeroDivisionError),
        (lambda: engine.answer(None), TypeError),
        (interrupted, KeyboardInterrupt),
    ):
        with pytest.raises(error) if error else contextlib.nullcontext():
            way()
        for answer, other in zip(engine.answer(requests), expected, strict=True):
            same(answer, other)


def test_a_picture_that_does_not_fit_ends_its_answer_and_no_other(engine):
    looking = make_request(make_prompt(0), 24, 3, method="pixels", forced_tokens=(11, SPECIAL.latent_start))
    wide = dataclasses.replace(looking, draw_look=lambda tokens: random_image(np.random.default_rng(0), 6, 6))
    many = dataclasses.replace(looking, draw_look=lambda tokens: random_image(np.random.default_rng(0), 4, 4))
    many = dataclasses.replace(many, forced_tokens=(SPECIAL.latent_start,) * 8)
    text = make_request(make_prompt(0), 24, 3, method="text")
    expected, first, second = engine.answer([text, wide, many])
    assert first.stop_reason == "picture" and "got 36 for 6x6" in first.error and len(first.tokens) == 2
    assert second.stop_reason == "picture" and second.error == "picture 3 must take at most 18 tokens here, got 20"
    assert [look.picture_tokens for look in second.looks] == [16, 16, 0]
    same(engine.answer([text])[0], expected)


def test_the_answers_to_a_request_are_drawn_apart_and_share_its_prompt():
    request = make_request(make_prompt(3), 16, 3, temperature=1.2, n=6, seed=5)
    engine = make_engine(batch_invariant=False)
    answers = engine.answer([GOOD, request])
    assert [(answer.number, answer.sample) for answer in answers] == [(0, 0), *((1, sample) for sample in range(6))]
    assert len({answer.tokens for answer in answers[1:]}) > 3
    assert [answer.shared_tokens for answer in answers[1:]] == [0] + [len(request.prompt.tokens)] * 5
    same(engine.answer([changed(request, n=1)])[0], answers[1])
