"""Interventions on slots: each row gets what its request gives, exactly, and other rows are not touched."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from ilvr_jax.config.schema import RopeScaling
from ilvr_jax.inference.engine import Engine, generate
from ilvr_jax.inference.interventions import repeat_last_look
from ilvr_jax.inference.requests import GivenSlots, Request, RequestOutput
from ilvr_jax.inference.sizes import fit_settings
from ilvr_jax.method.layout import Sample, build_sample, collate, required_layout
from ilvr_jax.method.slots import fill_slots, with_slot_parameters
from ilvr_jax.models.attention import causal_mask
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.sharding import make_mesh, on_mesh, shardings
from tests.decoding import (
    MODEL,
    PARAMS,
    changed,
    draw_look,
    make_engine,
    make_prompt,
    make_request,
    positions_by_definition,
    prompts,
    same,
)
from tests.paths import REPOSITORY
from tests.samples import CONFIG, FIRST_WORD, GEOMETRY, SPECIAL

K = 3
LOOK = (SPECIAL.latent_start, *[-1] * (K + 1))  # forced: what follows the marker is written in any case
ROOM = {"latent_vectors": True, "slot_states": True, "given_slots": 24, "given_states": True, "rows": 8}
SHAPE = (CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.head_dim)


@pytest.fixture(scope="module")
def engine():
    return make_engine(**ROOM)


def recording(prompt: Sample, new_tokens: int = 24, **changes) -> Request:
    """Return a request whose output has all that its slots hold."""
    changes = {"log_probabilities": True, "latent_vectors": True, "slot_states": True, **changes}
    return make_request(prompt, new_tokens, K, **changes)


def from_output(output: RequestOutput, states: bool = True) -> GivenSlots:
    """Return the slots of an answer, to be given to another."""
    own = output.slot_keys, output.slot_values, output.slot_positions
    return GivenSlots(output.latent_vectors, np.ones(len(output.latent_vectors), bool), *(own if states else ()))


def zeros(slots: int = K) -> GivenSlots:
    return GivenSlots(np.zeros((slots, CONFIG.hidden_size), np.float32), np.ones(slots, bool))


def random_slots(slots: int, given=None, seed: int = 0) -> GivenSlots:
    inputs = np.random.default_rng(seed).standard_normal((slots, CONFIG.hidden_size)).astype(np.float32)
    return GivenSlots(inputs, np.ones(slots, bool) if given is None else np.array(given))


def model_of(dtype: str, rule: str) -> tuple[Qwen2_5VL, dict]:
    """Return a model of another dtype and rule of slots, whose own parameters are not at their start."""
    model = Qwen2_5VL(dataclasses.replace(CONFIG, dtype=dtype, slot_input=rule))
    params = with_slot_parameters(model, PARAMS, jax.random.key(5))
    if rule == "projected":
        down = params["decoder"]["slot_input"]["down"]["kernel"]
        params["decoder"]["slot_input"]["down"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(6), down.shape)
    return model, params


def run_and_replay(engine: Engine) -> list[RequestOutput]:
    """Assert that the slots of some answers, given back, change no bit of them; return the answers."""
    requests = [recording(prompt, 24 - number, forced_tokens=(11, *LOOK)) for number, prompt in enumerate(prompts())]
    answers = engine.answer(requests)
    assert all(len(answer.latent_vectors) >= K for answer in answers)
    for states in (True, False):
        replays = [
            dataclasses.replace(request, given_slots=from_output(answer, states))
            for request, answer in zip(requests, answers, strict=True)
        ]
        for replay, answer in zip(engine.answer(replays), answers, strict=True):
            same(replay, answer)
    return answers


@pytest.mark.parametrize(
    ("dtype", "rule"), [("float32", "hidden"), ("bfloat16", "hidden"), ("bfloat16", "projected"), ("float32", "pause")]
)
def test_an_answer_given_its_own_slots_is_the_same_to_the_last_bit(engine, dtype, rule):
    model, params = model_of(dtype, rule)
    engine = engine if (dtype, rule) == ("float32", "hidden") else make_engine(params, model, **ROOM)
    answers = run_and_replay(engine)
    for answer in answers:
        slots = len(answer.latent_vectors)
        assert answer.latent_vectors.dtype == answer.slot_keys.dtype == np.dtype(model.config.dtype)
        assert answer.slot_keys.shape == answer.slot_values.shape == (SHAPE[0], slots, *SHAPE[1:])
        assert answer.slot_positions.shape == (slots,)
    others = engine.answer([recording(prompt, forced_tokens=(11, *LOOK), given_slots=zeros()) for prompt in prompts()])
    assert all(zero.log_probabilities != own.log_probabilities for zero, own in zip(others, answers, strict=True))


def test_engines_with_and_without_the_room_agree():
    requests = [recording(prompt) for prompt in prompts()]
    answers = generate(MODEL, PARAMS, requests, SPECIAL)
    given = [from_output(answer) if answer.slots else None for answer in answers]
    assert any(given)
    requests = [
        dataclasses.replace(request, given_slots=slots, slot_states=False, latent_vectors=False)
        for request, slots in zip(requests, given, strict=True)
    ]
    assert [answer.tokens for answer in generate(MODEL, PARAMS, requests, SPECIAL)] == [
        answer.tokens for answer in answers
    ]
    settings = fit_settings(requests, 4, GEOMETRY)
    assert settings.given_slots == max(len(slots.inputs) for slots in given if slots)
    assert settings.given_states and not settings.slot_states
    settings = fit_settings([recording(prompts()[0])], 4, GEOMETRY)
    assert (settings.given_slots, settings.given_states, settings.slot_states) == (0, False, True)


def mixed_interventions(donor: RequestOutput) -> list[Request]:
    """Return requests about one prompt with every kind of intervention, all with looks where these can be."""
    prompt, forced = make_prompt(3), {"forced_tokens": (11, *LOOK, 12, *LOOK)}
    return [
        recording(prompt, **forced),
        recording(prompt, given_slots=zeros(), **forced),
        recording(prompt, given_slots=from_output(donor, states=False), **forced),
        recording(prompt, given_slots=from_output(donor), **forced),
        recording(prompt, given_slots=random_slots(5, [True, False, False, True, True]), **forced),
        dataclasses.replace(recording(prompt, forced_tokens=(11, SPECIAL.latent_start, -1, 12)), latent_size=0),
        recording(prompt, method="text"),
        recording(prompt, method="single", given_slots=random_slots(4)),
        recording(prompt, method="pixels", draw_look=draw_look, slot_states=False),
    ]


def donated(engine: Engine) -> RequestOutput:
    """Return an answer to another prompt, with two looks."""
    return engine.answer([recording(make_prompt(8, ((1, 2),)), forced_tokens=(*LOOK, 13, *LOOK))])[0]


def test_rows_with_all_interventions_share_a_batch_without_compiling(engine):
    """Each answer is the one that it is alone; compilations are counted by JAX itself."""
    engine.warm_up()
    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        jax.jit(lambda x: x - len(compiled))(1.0)
        assert len(compiled) == 1  # the listener hears
        requests = mixed_interventions(donated(engine))
        together = engine.answer(requests)
        backwards = engine.answer(requests[::-1])[::-1]
        alone = [engine.answer([request])[0] for request in requests]
        assert len(compiled) == 1
    finally:
        monitoring.clear_event_listeners()
    for answer, *others in zip(together, alone, backwards, strict=True):
        assert answer.stop_reason in ("end", "length")
        for other in others:
            same(answer, other)
    assert len({answer.log_probabilities for answer in together}) == len(together)


def test_looks_without_slots_are_two_markers(engine):
    request = dataclasses.replace(recording(make_prompt(1), forced_tokens=(11, SPECIAL.latent_start)), latent_size=0)
    (answer,) = engine.answer([request])
    assert answer.tokens[:3] == (11, SPECIAL.latent_start, SPECIAL.latent_end)
    assert answer.log_probabilities[2] == 0 and answer.slots == 0 and answer.latent_vectors.shape[0] == 0
    for look in answer.looks:
        assert answer.tokens[look.position + 1 :][:1] in ((SPECIAL.latent_end,), ())


def test_only_the_given_slots_are_replaced(engine):
    """The second slot of the second look, and, as it is the last look with a given one, of the third."""
    request = recording(make_prompt(2), forced_tokens=(*LOOK, 11, *LOOK, 11, *LOOK))
    (own,) = engine.answer([request])
    given = random_slots(2 * K, np.arange(2 * K) == K + 1)
    (answer,) = engine.answer([dataclasses.replace(request, given_slots=given)])
    same_slots = (answer.latent_vectors[: 3 * K] == own.latent_vectors[: 3 * K]).all(axis=1)
    assert same_slots.tolist() == [True] * (K + 1) + [False] * (2 * K - 1)
    for slot in (K + 1, 2 * K + 1):
        np.testing.assert_array_equal(answer.latent_vectors[slot], given.inputs[K + 1])
    for slot in (K + 2, 2 * K, 2 * K + 2):
        assert not (answer.latent_vectors[slot] == given.inputs[slot % (2 * K)]).any()
    for name in ("slot_keys", "slot_values"):
        before, after = (getattr(output, name)[:, : 3 * K] for output in (own, answer))
        np.testing.assert_array_equal(before[:, : K + 1], after[:, : K + 1])
        assert (before[:, K + 1 :] != after[:, K + 1 :]).any(axis=(0, 2, 3)).all()


@pytest.mark.parametrize(
    ("count", "places"),
    [(3, [0, 1, 2] * 3), (6, [0, 1, 2, 3, 4, 5, 3, 4, 5]), (5, [0, 1, 2, 3, 4, 2, 3, 4, 2]), (2, [0, 1, 1] * 3)],
)
def test_slots_past_the_last_given_one_repeat_the_last_look(engine, count, places):
    assert repeat_last_look(jnp.arange(9), jnp.full(9, count), jnp.full(9, K)).tolist() == places
    given = random_slots(count)
    request = recording(make_prompt(2), forced_tokens=(*LOOK, 11, *LOOK, 11, *LOOK), given_slots=given)
    (answer,) = engine.answer([request])
    np.testing.assert_array_equal(answer.latent_vectors[:9], given.inputs[places])


@pytest.mark.parametrize(("rule", "slot_positions"), [("projected", "text"), ("placed", "turning_grid")])
def test_vectors_are_the_inputs_that_the_rule_makes(rule, slot_positions):
    """Computed again from the whole sequence at once: what the rule makes of the hidden state before each slot."""
    model, params = model_of("float32", rule)
    decoder, prompt = params["decoder"], make_prompt(4)
    engine = make_engine(params, model, latent_vectors=True)
    look, settings = (SPECIAL.latent_start, *[-1] * 5), {"latent_vectors": True, "slot_positions": slot_positions}
    (answer,) = engine.answer([make_request(prompt, 18, 4, forced_tokens=(11, *look, 12, *look), **settings)])
    tokens = np.array(answer.tokens[:-1])
    slots = np.flatnonzero(tokens == SPECIAL.latent_pad)
    inputs, positions = prompt_inputs(prompt, params)
    after = np.array(model.embed(decoder, tokens[None]))
    after[0, slots] = answer.latent_vectors
    inputs = jnp.concatenate([inputs, after], axis=1)
    following = positions_by_definition(tokens, slot_positions, positions.max() + 1)[None]
    positions = np.concatenate([positions, following], axis=2)
    hidden, _ = model.decode(decoder, inputs, positions, np.ones(inputs.shape[:2], bool))
    before = hidden[0, len(prompt.tokens) + slots - 1]
    places = (following[0, 1:] - following[0, 0])[:, slots].T
    made = fill_slots(model, decoder, before, after[0, slots], places)
    np.testing.assert_allclose(answer.latent_vectors, made, atol=1e-4)
    assert np.abs(answer.latent_vectors - before).mean() > 0.1


def prompt_inputs(prompt: Sample, params=PARAMS) -> tuple[jax.Array, np.ndarray]:
    """Return the inputs of a prompt's columns, [1, columns, channels], and their positions."""
    batch = collate([prompt], required_layout(prompt, GEOMETRY), SPECIAL, GEOMETRY)
    features = MODEL.encode_images(params["vision"], batch.images)
    return MODEL.embed(params["decoder"], batch.tokens, batch.image_index, features), np.array(batch.positions)


def following(positions: np.ndarray, count: int) -> np.ndarray:
    """Return positions [1, 3, columns] and those of `count` columns of text after them."""
    after = positions.max() + 1 + np.broadcast_to(np.arange(count), (1, 3, count))
    return np.concatenate([positions, after], axis=2)


def rotated(keys: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return keys [layers, slots, heads, head_dim] at other positions, in float64."""
    half = CONFIG.head_dim // 2
    angles = shift[:, None, None] * CONFIG.rope_theta ** (-np.arange(half) / half)
    first, second = np.split(keys.astype(np.float64), 2, axis=-1)
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def test_slots_of_another_prompt_are_attended_to_at_their_new_positions(engine):
    """The text after the look, by one pass over the recipient's prompt, the donor's keys and values, and that text."""
    decoder, recipient = PARAMS["decoder"], make_prompt(3)
    rng = np.random.default_rng(1)
    extra = rng.integers(FIRST_WORD, CONFIG.vocab_size, 19)
    other = make_prompt(8)
    longer = build_sample(np.concatenate([other.tokens[:-3], extra, other.tokens[-3:]]), other.images, (), SPECIAL, K)
    (donor,) = engine.answer([recording(longer, K + 2, forced_tokens=LOOK)])
    words = rng.integers(FIRST_WORD, CONFIG.vocab_size, 7)
    request = recording(recipient, len(LOOK) + 7, forced_tokens=(*LOOK, *words.tolist()))
    own, inputs_alone, answer = engine.answer(
        [request, *(dataclasses.replace(request, given_slots=from_output(donor, states)) for states in (False, True))]
    )
    shift = own.slot_positions - donor.slot_positions
    assert (shift == -19).all() and (answer.slot_positions == own.slot_positions).all()
    np.testing.assert_array_equal(answer.slot_values, donor.slot_values)

    inputs, positions = prompt_inputs(recipient)
    text = np.array([SPECIAL.latent_end, *words[:-1]])
    inputs = np.concatenate([inputs, MODEL.embed(decoder, np.array([[SPECIAL.latent_start]]))], axis=1)
    columns = inputs.shape[1]
    positions = following(positions, 1 + K + len(text))
    valid = np.ones((1, columns), bool)
    _, before = MODEL.decode(decoder, inputs, positions[:, :, :columns], valid)
    mask = np.concatenate([np.ones((1, len(text), columns + K), bool), causal_mask(np.ones((1, len(text)), bool))], 2)

    def oracle(keys: np.ndarray) -> np.ndarray:
        """Return the log-probabilities of the words."""
        slots = jnp.float32(keys)[:, None], jnp.float32(donor.slot_values)[:, None]
        after = MODEL.embed(decoder, text[None])
        hidden, _ = MODEL.decode(decoder, after, positions[:, :, columns + K :], mask, [before, slots])
        logits = MODEL.logits(decoder, hidden[0]).at[:, [SPECIAL.latent_pad, SPECIAL.latent_end]].set(-jnp.inf)
        return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(words)), words]

    found, expected = answer.log_probabilities[-7:], oracle(rotated(donor.slot_keys, shift))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(answer.slot_keys, rotated(donor.slot_keys, shift), atol=1e-4)
    assert np.abs(found - oracle(donor.slot_keys)).max() > 1e-2  # keys that are not rotated
    assert np.abs(np.subtract(found, inputs_alone.log_probabilities[-7:])).max() > 1e-2
    assert np.abs(np.subtract(found, own.log_probabilities[-7:])).max() > 1e-2


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling("yarn", 4.0, original_max_position_embeddings=64)])
def test_shifted_keys_are_those_of_the_other_positions(scaling):
    """Keys of the first layer depend on inputs and positions alone, also where YaRN multiplies them."""
    model = Qwen2_5VL(dataclasses.replace(CONFIG, rope_scaling=scaling))
    inputs = jax.random.normal(jax.random.key(0), (1, 5, CONFIG.hidden_size))

    def keys_at(position: int) -> jax.Array:
        positions = np.broadcast_to(position + np.arange(5), (1, 3, 5))
        return model.decode(PARAMS["decoder"], inputs, positions, np.ones((1, 5), bool))[1][0][0, 0]

    keys = keys_at(40)
    np.testing.assert_allclose(model.shift_keys(keys, jnp.full(5, 17)), keys_at(57), atol=1e-4)
    np.testing.assert_allclose(model.shift_keys(keys, jnp.full(5, -33)), keys_at(7), atol=1e-4)
    np.testing.assert_array_equal(model.shift_keys(keys, jnp.zeros(5, int)), keys)
    assert np.abs(keys - keys_at(57)).max() > 0.1


def test_a_slot_that_is_the_last_token_has_no_input_yet(engine):
    (answer,) = engine.answer([recording(make_prompt(0), 4, forced_tokens=(11, *LOOK)[:4])])
    assert answer.stop_reason == "length" and answer.slots == 2
    assert len(answer.latent_vectors) == len(answer.slot_positions) == answer.slot_keys.shape[1] == 1
    (longer,) = engine.answer([recording(make_prompt(0), 8, forced_tokens=(11, *LOOK))])
    assert len(longer.latent_vectors) == K
    np.testing.assert_array_equal(longer.latent_vectors[0], answer.latent_vectors[0])
    np.testing.assert_array_equal(longer.slot_keys[:, :1], answer.slot_keys)


def changed_slots(**changes) -> GivenSlots:
    states = np.zeros((SHAPE[0], K, *SHAPE[1:]), np.float32)
    return dataclasses.replace(GivenSlots(zeros().inputs, np.ones(K, bool), states, states, np.arange(K)), **changes)


STATES = changed_slots().keys
REFUSALS = [
    (zeros().inputs, "given_slots must be GivenSlots, got "),
    (
        changed_slots(inputs=[0.0]),
        "inputs of given_slots must be floats [slots, channels], one slot or more, got [0.0]",
    ),
    (
        changed_slots(inputs=np.zeros((K, 32), int)),
        "inputs of given_slots must be floats [slots, channels], one slot or more, got (3, 32) int64",
    ),
    (zeros(0), "inputs of given_slots must be floats [slots, channels], one slot or more, got (0, 32) float32"),
    (changed_slots(inputs=zeros().inputs[:, :31]), "inputs of given_slots must have 32 channels, got 31"),
    (changed_slots(given=np.ones(K, int)), "given of given_slots must be 3 booleans, got (3,) int64"),
    (changed_slots(given=np.ones(2, bool)), "given of given_slots must be 3 booleans, got (2,) bool"),
    (changed_slots(values=None), "keys and values of given_slots must be given together or not at all, got keys alone"),
    (changed_slots(keys=None), "keys and values of given_slots must be given together or not at all, got values alone"),
    (changed_slots(keys=STATES[:, :2]), "keys of given_slots must have shape (2, 3, 2, 8), got (2, 2, 2, 8)"),
    (
        changed_slots(values=STATES[..., None]),
        "values of given_slots must have shape (2, 3, 2, 8), got (2, 3, 2, 8, 1)",
    ),
    (changed_slots(values="x"), "values of given_slots must be an array of floats, got 'x'"),
    (changed_slots(positions=None), "positions of given_slots must be 3 whole numbers, of the given keys, got None"),
    (
        changed_slots(positions=np.zeros(K)),
        "positions of given_slots must be 3 whole numbers, of the given keys, got (3,) float64",
    ),
    (changed_slots(positions=np.arange(K) - 1), "positions of given_slots must be from 0 to 2**30, got -1"),
    (changed_slots(inputs=np.full((K, 32), np.nan)), "inputs of given_slots must be finite and at most 1e+06"),
    (changed_slots(keys=STATES + np.inf), "keys of given_slots must be finite and at most 1e+06 in magnitude"),
    (zeros(25), "given_slots must have at most 24 slots for an engine that was made with that room, got 25"),
]


def test_what_cannot_be_given_is_refused_in_one_sentence(engine):
    good = make_request(make_prompt(0), 8, K, given_slots=changed_slots())
    assert engine.validate(good) is None
    refusals = [(dataclasses.replace(good, given_slots=slots), sentence) for slots, sentence in REFUSALS]
    for method in ("text", "pixels"):
        request = changed(good, method=method, draw_look=draw_look)
        sentence = f'given_slots must be None for method "{method}", whose answers have no slots, got some'
        refusals.append((request, sentence))
        request = changed(request, given_slots=None, slot_states=True)
        if method == "pixels":
            refusals.append((request, 'slot_states must be false for method "pixels", whose looks have no slots'))
    plain = make_engine(given_slots=K)
    for request, sentence in refusals:
        error = engine.validate(request)
        assert error and sentence in error and len(error) < 400, error
    for request, sentence in (
        (good, "keys of given_slots must be None for an engine that was made without, got some"),
        (changed(good, given_slots=zeros(4)), "given_slots must have at most 3 slots for an engine that was made with"),
        (changed(good, given_slots=None, slot_states=True), "slot_states must be false for an engine that was made"),
    ):
        assert sentence in plain.validate(request)
    assert plain.validate(changed(good, given_slots=zeros())) is None


def test_a_mesh_gives_the_same_answers(engine):
    """On four simulated devices, where layers are stacked and rows and heads are divided."""
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "tests.inference.test_interventions"]
    done = subprocess.run(command, capture_output=True, cwd=REPOSITORY, env=environment, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = engine.answer(mixed_interventions(donated(engine)))
    assert json.loads(done.stdout) == [list(answer.tokens) for answer in expected]


def answer_on_a_mesh() -> None:
    """Replay answers on a mesh, and print the tokens of all kinds of interventions."""
    mesh = make_mesh({"slice": 1, "data": 1, "fsdp": 2, "tensor": 2})
    with on_mesh(mesh):
        engine = make_engine(jax.device_put(PARAMS, shardings(PARAMS, mesh)), batch_invariant=False, **ROOM)
        run_and_replay(engine)
        print(json.dumps([answer.tokens for answer in engine.answer(mixed_interventions(donated(engine)))]))


if __name__ == "__main__":
    answer_on_a_mesh()
