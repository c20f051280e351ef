"""Requests to the engine, their outputs, and the checks of requests that do not depend on an engine's sizes."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float, Int

from ilvr_jax.config.schema import IMAGE_VISIBILITY, SLOT_POSITIONS, SamplingParams
from ilvr_jax.errors import quote
from ilvr_jax.inference.sampling import check_sampling, check_whole
from ilvr_jax.method.layout import Sample
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl.images import MERGE, EncodedImage, PatchedImage

METHODS = {
    "latent": "each look is latent slots, wherever the model begins one",
    "text": "no looks",
    "single": "one look of latent slots, at the start of the answer (as in Mirage)",
    "pixels": "each look is a picture, drawn and encoded wherever the model begins one",
}

# Of an image or a slot: normalised pixels are below 3, features of the vision tower, hidden states and keys in the
# hundreds at most.
LARGEST_VALUE = 1e6

Picture = PatchedImage | EncodedImage


@dataclasses.dataclass(frozen=True)
class GivenSlots:
    """Slots of an answer whose contents are given, by their number in the answer: 0 is the first of the first look.

    Slots after the last of these get those of the last look again. Keys and values replace, where `given`, those that
    the slots' columns have in the cache; keys are rotated from `positions` to the positions of the answer's slots.
    """

    inputs: Float[np.ndarray, "slots channels"]  # of the decoder: they do not pass the rule that fills slots
    given: Bool[np.ndarray, " slots"]  # the others are the model's own
    keys: Float[np.ndarray, "layers slots key_value_heads head_dim"] | None = None
    values: Float[np.ndarray, "layers slots key_value_heads head_dim"] | None = None
    positions: Int[np.ndarray, " slots"] | None = None  # rotary ones, at which the keys were computed


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and the settings of its answers, of which there are `sampling.n`.

    Nothing is checked here: `Engine.validate` checks all values.
    """

    prompt: Sample  # from `data.examples.build_prompt`; it ends with the assistant header
    sampling: SamplingParams  # `max_new_tokens` does not count the tokens of pictures
    latent_size: int  # K; 0 for looks of markers only
    method: str = "latent"  # one of METHODS
    image_visibility: str = "all"  # as in the config's latents, like the next
    slot_positions: str = "text"
    seed: int = 0
    draw_look: Callable[[list[int]], Picture] | None = None  # for "pixels": draws the picture after the tokens so far
    log_probabilities: bool = False  # whether the outputs have those of their tokens
    latent_vectors: bool = False  # whether the outputs have the inputs of their slots
    slot_states: bool = False  # whether the outputs have the keys, values and positions of their slots
    given_slots: GivenSlots | None = None
    forced_tokens: tuple[int, ...] = ()  # the first tokens of answers; -1 where the model chooses
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Look:
    """One look of an answer: slots, or a picture."""

    position: int  # of its `latent_start` among the answer's tokens
    slots: int
    picture_tokens: int = 0  # vision tokens


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds on the host's clock."""

    first_token: float = 0.0  # from admission to the first token: the prompt and its images
    total: float = 0.0  # from admission to the last token
    pictures: float = 0.0  # of these, for pictures: drawn, encoded and prefilled


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """An answer to a request."""

    number: int  # of the request, in their order
    sample: int  # of the request's answers
    name: str
    tokens: tuple[int, ...]  # new ones, those that ended the answer included; a slot's is `latent_pad`
    text: str | None  # with looks marked, up to a stop string; None for an engine without a tokenizer
    looks: tuple[Look, ...]
    stop_reason: str  # "end", "stop" (a stop string), "length", "picture" (one did not fit) or "refused"
    error: str | None = None  # one sentence, if it was refused or a picture did not fit
    plain_text: str | None = None  # `text` without the marks of looks
    log_probabilities: tuple[float, ...] | None = None  # of the tokens, 0 in slots and their `latent_end`
    # Of the slots that were inputs: all, except one that is the last token.
    latent_vectors: Float[np.ndarray, "slots channels"] | None = None
    slot_keys: Float[np.ndarray, "layers slots key_value_heads head_dim"] | None = None
    slot_values: Float[np.ndarray, "layers slots key_value_heads head_dim"] | None = None
    slot_positions: Int[np.ndarray, " slots"] | None = None
    shared_tokens: int = 0  # of the prompt: reused from an earlier prompt
    timings: Timings = Timings()

    @property
    def slots(self) -> int:
        return sum(look.slots for look in self.looks)


def check_request(request: Request) -> None:
    """Raise ValueError, one sentence, for a request that no engine can serve."""
    if not isinstance(request, Request):
        raise ValueError(f"a request must be a Request, got {quote(request)}")
    if not isinstance(request.method, str) or request.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {quote(request.method)}")
    for name, values in (("image_visibility", IMAGE_VISIBILITY), ("slot_positions", SLOT_POSITIONS)):
        if getattr(request, name) not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, got {quote(getattr(request, name))}")
    if request.method == "pixels" and not callable(request.draw_look):
        raise ValueError(f'draw_look must be a function for method "pixels", got {quote(request.draw_look)}')
    if not isinstance(request.sampling, SamplingParams):
        raise ValueError(f"sampling must be SamplingParams, got {quote(request.sampling)}")
    check_sampling(request.sampling)
    check_whole("latent_size", request.latent_size)
    if request.slot_positions != "text":
        if math.isqrt(request.latent_size) ** 2 != request.latent_size:
            raise ValueError(f"latent_size must be a square number for slots in a grid, got {request.latent_size}")
        if request.sampling.early_end:
            raise ValueError("early_end must be false for slots in a grid, which is filled, got true")
    check_whole("seed", request.seed, 0, 2**32 - 1)
    for name in ("log_probabilities", "latent_vectors", "slot_states"):
        if not isinstance(getattr(request, name), (bool, np.bool_)):
            raise ValueError(f"{name} must be true or false, got {quote(getattr(request, name))}")
    if request.slot_states and request.method == "pixels":
        raise ValueError('slot_states must be false for method "pixels", whose looks have no slots, got true')
    if request.given_slots is not None:
        _check_given(request.given_slots, request.method)
    if not isinstance(request.forced_tokens, (tuple, list)):
        raise ValueError(f"forced_tokens must be a tuple of tokens, got {quote(request.forced_tokens)}")
    most, length = request.sampling.max_new_tokens, len(request.forced_tokens)
    if length > most:
        raise ValueError(f"forced_tokens must hold at most max_new_tokens ({most}) tokens, got {length}")
    if len(request.forced_tokens) and request.method == "single":
        raise ValueError('forced_tokens must be empty for method "single", which begins with a look')
    _check_shapes(request.prompt)


def _check_given(slots: GivenSlots, method: str) -> None:
    """Raise ValueError unless slots are given for a method that has some, in arrays that fit each other."""
    if not isinstance(slots, GivenSlots):
        raise ValueError(f"given_slots must be GivenSlots, got {quote(slots)}")
    if method in ("text", "pixels"):
        raise ValueError(f'given_slots must be None for method "{method}", whose answers have no slots, got some')
    if not _is_float_array(slots.inputs) or slots.inputs.ndim != 2 or not len(slots.inputs):
        raise ValueError(
            f"inputs of given_slots must be floats [slots, channels], one slot or more, got {_described(slots.inputs)}"
        )
    count = len(slots.inputs)
    if not isinstance(slots.given, np.ndarray) or slots.given.dtype != bool or slots.given.shape != (count,):
        raise ValueError(f"given of given_slots must be {count} booleans, got {_described(slots.given)}")
    if (slots.keys is None) != (slots.values is None):
        alone = "values" if slots.keys is None else "keys"
        raise ValueError(f"keys and values of given_slots must be given together or not at all, got {alone} alone")
    if slots.keys is not None:
        _check_given_positions(slots.positions, count)
    for name in ("inputs",) if slots.keys is None else ("inputs", "keys", "values"):
        array = getattr(slots, name)
        if not _is_float_array(array):
            raise ValueError(f"{name} of given_slots must be an array of floats, got {_described(array)}")
        _check_values(f"{name} of given_slots", array)


def _check_given_positions(positions: Int[np.ndarray, " slots"], count: int) -> None:
    """Raise ValueError unless there is a position for each slot whose keys are given."""
    if not _is_whole_array(positions) or positions.shape != (count,):
        raise ValueError(
            f"positions of given_slots must be {count} whole numbers, of the given keys, got {_described(positions)}"
        )
    if positions.min() < 0 or positions.max() >= 2**30:
        outside = positions[(positions < 0) | (positions >= 2**30)][0]
        raise ValueError(f"positions of given_slots must be from 0 to 2**30, got {outside}")


def check_given_slots(slots: GivenSlots | None, config: ModelConfig) -> None:
    """Raise ValueError, one sentence, if given slots that passed `check_request` do not suit a model."""
    if slots is None:
        return
    count, channels = slots.inputs.shape
    if channels != config.hidden_size:
        raise ValueError(f"inputs of given_slots must have {config.hidden_size} channels, got {channels}")
    shape = (config.num_hidden_layers, count, config.num_key_value_heads, config.head_dim)
    for name in ("keys", "values"):
        array = getattr(slots, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} of given_slots must have shape {shape}, got {array.shape}")


def _check_shapes(prompt: Sample) -> None:
    """Raise ValueError unless a prompt has tokens, and images whose sizes are valid."""
    if not isinstance(prompt, Sample):
        raise ValueError(f"prompt must be a Sample, got {quote(prompt)}")
    if not _is_whole_array(prompt.tokens) or prompt.tokens.ndim != 1 or not len(prompt.tokens):
        raise ValueError(f"the prompt must have one token or more, got {_described(prompt.tokens)}")
    if not isinstance(prompt.images, (tuple, list)):
        raise ValueError(f"the prompt's images must be a tuple, got {quote(prompt.images)}")
    for image in prompt.images:
        check_size(image)


def check_size(image: Picture) -> None:
    """Raise ValueError unless an image is one, of whole vision tokens in height and width."""
    if not isinstance(image, (PatchedImage, EncodedImage)):
        raise ValueError(f"an image must be a PatchedImage or EncodedImage, got {quote(image)}")
    if isinstance(image, EncodedImage) and not (_is_float_array(image.features) and image.features.ndim == 3):
        raise ValueError(f"features of an image must be [rows, columns, channels], got {_described(image.features)}")
    for name in ("height", "width"):
        check_whole(f"the {name} of an image in patches", getattr(image, name), MERGE)
        if getattr(image, name) % MERGE:
            raise ValueError(f"the {name} of an image in patches must be even, got {getattr(image, name)}")


def check_prompt(prompt: Sample, special: SpecialTokens, config: ModelConfig) -> None:
    """Raise ValueError, one sentence, if a prompt that passed `check_request` does not suit a model."""
    tokens, positions = prompt.tokens, prompt.positions
    if not _is_whole_array(positions) or positions.shape != (3, len(tokens)):
        raise ValueError(f"the prompt's positions must have shape (3, {len(tokens)}), got {_described(positions)}")
    check_tokens("a token of the prompt", (tokens.min(), tokens.max()), 0, config.vocab_size)
    if positions.min() < 0 or positions.max() >= 2**30:
        raise ValueError(f"the prompt's positions must be from 0 to 2**30, got up to {positions.max()}")
    if (tokens == special.latent_pad).any():
        raise ValueError("the prompt must have no latent slots, got a sample for training")
    for image in prompt.images:
        check_picture(image, config)
    pads = np.flatnonzero(tokens == special.image_pad)
    counts = [image.vision_tokens for image in prompt.images]
    if len(pads) != sum(counts):
        raise ValueError(f"the prompt must have an image_pad for each of {sum(counts)} vision tokens, got {len(pads)}")
    for run in np.split(pads, np.cumsum(counts)[:-1]) if counts else ():
        if run[-1] - run[0] >= len(run):
            raise ValueError(f"the {len(run)} vision tokens of an image must follow each other in the prompt")


def check_picture(image: Picture, config: ModelConfig) -> None:
    """Raise ValueError, one sentence, if an image does not suit a model."""
    check_size(image)
    if isinstance(image, EncodedImage):
        values, channels = image.features, config.hidden_size
        if values.shape[2] != channels:
            raise ValueError(f"an encoded image must have {channels} channels, got {values.shape[2]}")
    else:
        values, patches = image.pixels, image.height * image.width
        still = config.vision.patch_dim // config.vision.temporal_patch_size
        is_bytes = isinstance(values, np.ndarray) and values.dtype == np.uint8
        shape = patches, still if is_bytes else config.vision.patch_dim
        if not (is_bytes or _is_float_array(values)) or values.shape != shape:
            raise ValueError(
                f"pixels of {image.height}x{image.width} patches must have shape ({patches}, {still}) in uint8 or "
                f"({patches}, {config.vision.patch_dim}) in float32, got {_described(values)}"
            )
    if values.dtype != np.uint8:
        _check_values("the values of an image", values)


def _check_values(name: str, values: Float[np.ndarray, "..."]) -> None:
    """Raise ValueError for floats that are not finite, or too large."""
    # NaN and infinity would stay in the row's cache, and masking multiplies them by 0, which is NaN for later requests.
    if not (np.abs(values.astype(np.float32)) <= LARGEST_VALUE).all():
        raise ValueError(f"{name} must be finite and at most {LARGEST_VALUE:g} in magnitude")


def check_tokens(name: str, tokens: Iterable[int], least: int, vocab_size: int) -> None:
    """Raise ValueError, one sentence, for a token below `least` or outside the vocabulary."""
    for token in tokens:
        check_whole(name, token, least, vocab_size - 1)


def _is_whole_array(value: object) -> bool:
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer)


def _is_float_array(value: object) -> bool:
    # bfloat16 is no np.floating
    return isinstance(value, np.ndarray) and (np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16")


def _described(value: object) -> str:
    """Return an array's shape and dtype, or the quoted value of anything else."""
    return f"{value.shape} {value.dtype}" if isinstance(value, np.ndarray) else quote(value)
