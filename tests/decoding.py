"""Parameters and prompts for tests of decoding."""

import dataclasses

import jax
import numpy as np

from ilvr_jax.config.schema import SamplingParams
from ilvr_jax.inference.engine import Engine
from ilvr_jax.inference.requests import Request, RequestOutput
from ilvr_jax.inference.sizes import EngineSettings
from ilvr_jax.method.layout import collate, merge_layouts, required_layout
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from tests.samples import CONFIG, GEOMETRY, SPECIAL, prompt_of, random_image, random_sample

MODEL = Qwen2_5VL(CONFIG)
SLOT_ARRAYS = ("latent_vectors", "slot_keys", "slot_values", "slot_positions")  # fields of RequestOutput
SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}


def make_request(prompt, max_new_tokens: int, latent_size: int, **changes) -> Request:
    """Return a request; `changes` are its fields or those of its sampling."""
    return changed(Request(prompt, SamplingParams(max_new_tokens), latent_size), **changes)


def changed(request: Request, **changes) -> Request:
    """Return a request with other fields, its own or those of its sampling."""
    sampling = {name: changes.pop(name) for name in SAMPLING & changes.keys()}
    sampling = dataclasses.replace(request.sampling, **sampling)
    return dataclasses.replace(request, **{"sampling": sampling} | changes)


def positions_by_definition(tokens, rule, first):
    """Return the rotary positions of an answer's tokens [3, tokens], with 4 slots a look."""
    positions, place, look = [], 0, -1
    for token in tokens:
        look, place = (look + 1, 0) if token == SPECIAL.latent_start else (look, place)
        if token != SPECIAL.latent_pad or rule == "text":
            positions.append([first] * 3)
            first += 1
            continue
        row, column = divmod(3 - place if rule == "turning_grid" and look % 2 else place, 2)
        positions.append([first, first + row, first + column])
        place += 1
        first += 2 * (place == 4)
    return np.array(positions).T


def eager_to_look(scale: float = 3.0):
    """Return parameters under which `latent_start` is likely, so that latent mode occurs."""
    params = MODEL.init(jax.random.key(3))
    params["decoder"]["lm_head"] = params["decoder"]["lm_head"].at[SPECIAL.latent_start].multiply(scale)
    return params


PARAMS = eager_to_look()


def prompts():
    rng = np.random.default_rng(6)
    shapes = [((2, 3),), ((1, 1), (3, 2)), (), ((4, 1),), ((1, 2),)]
    return [prompt_of(random_sample(rng, (2,), 3, images)) for images in shapes]


def lay_out(rows):
    layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in rows])
    return collate(rows, layout, SPECIAL, GEOMETRY)


SETTINGS = EngineSettings(
    rows=4, columns=96, max_new_tokens=24, chunks=(8, 16), image_tokens=(8, 16), repetition_penalty=True
)
IMAGES = (((2, 3),), ((1, 1), (3, 2)), (), ((4, 1),), ((1, 2),))


def make_engine(params=PARAMS, model=MODEL, special=SPECIAL, **changes) -> Engine:
    return Engine(model, params, special, dataclasses.replace(SETTINGS, **{"batch_invariant": True} | changes))


def make_prompt(seed: int, images=((2, 3),), words: int = 2):
    return prompt_of(random_sample(np.random.default_rng(seed), (words,), 3, images))


def draw_look(tokens):
    """A stand-in for a renderer: return a picture that depends on the length of the answer so far."""
    return random_image(np.random.default_rng(len(tokens)), 2, 1 + len(tokens) % 2)


def mixed_requests(count: int) -> list[Request]:
    """Return requests of every method and sampling, with prompts of several lengths."""
    rng = np.random.default_rng(0)
    return [
        make_request(
            make_prompt(number, IMAGES[number % len(IMAGES)]),
            max_new_tokens=int(rng.integers(1, 25)),
            latent_size=int(rng.integers(1, 5)),
            method=("latent", "pixels", "single", "text")[number % 4],
            temperature=(0.0, 0.8, 1.2)[number % 3],
            top_k=(0, 20)[number % 2],
            top_p=(1.0, 0.9)[number // 2 % 2],
            repetition_penalty=(1.0, 1.3)[number // 3 % 2],
            seed=number,
            early_end=number % 5 == 0,
            draw_look=draw_look,
            log_probabilities=True,
            name=f"request {number}",
        )
        for number in range(count)
    ]


def same(first: RequestOutput, second: RequestOutput) -> None:
    """Assert that two answers are the same to the last bit."""
    ignored = {"number": 0, "timings": None, "shared_tokens": 0} | dict.fromkeys(SLOT_ARRAYS)
    assert dataclasses.replace(first, **ignored) == dataclasses.replace(second, **ignored)
    for name in SLOT_ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
