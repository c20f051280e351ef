"""The sizes of an engine: its static shapes, chosen from requests so that few are compiled and little is padded."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ilvr_jax.inference.requests import Picture, Request, check_request, check_size
from ilvr_jax.models.base import ImageGeometry
from ilvr_jax.models.sharding import divisor

PREFILL_CHUNK = 512  # the most prompt tokens prefilled at a time
PAD_MULTIPLE = 16  # sizes chosen from requests are rounded up to multiples of this
MAX_SIZES = 3  # chunk sizes, and rooms of images: each is compiled
GROUPS = (1, 4, 16)  # prompts prefilled at once
PICTURES = 6  # pictures of an answer that room is made for by default


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """The static shape of an engine. `fit_settings` chooses one that holds given requests."""

    rows: int  # requests served at once
    columns: int  # tokens of a request: prompt, new ones and pictures together
    max_new_tokens: int  # of any request
    chunks: tuple[int, ...]  # prompt tokens prefilled at a time, ascending
    image_tokens: tuple[int, ...]  # vision tokens that images are padded to, ascending
    latent_vectors: bool = False  # whether the inputs of slots are kept, for requests with `latent_vectors`
    slot_states: bool = False  # whether keys and values of slots can be read, for requests with `slot_states`
    given_slots: int = 0  # slots of any request's `given_slots`
    given_states: bool = False  # whether these can have keys and values
    repetition_penalty: bool = False  # whether written tokens are kept by row, for requests with a penalty
    batch_invariant: bool = False  # whether an answer is the same to the last bit in any company; prefills one by one
    share_prefixes: bool = True  # whether a prompt reuses the keys and values of another that begins alike

    def __post_init__(self):
        for name in ("rows", "columns", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("chunks", "image_tokens"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or not all(size >= 1 for size in sizes):
                raise ValueError(f"{name} must be ascending numbers from 1, got {sizes}")
        if not self.chunks:
            raise ValueError("chunks must hold at least one size, got none")


def fit_settings(
    requests: Iterable[Request], rows: int, geometry: ImageGeometry, pictures: int = PICTURES, **changes: Any
) -> EngineSettings:
    """Return settings that hold all `requests`, of few sizes with little padding; `changes` override fields.

    A request by "pixels" gets room for `pictures` pictures of the size of its prompt's largest image or of the picture
    that it draws first, whichever is larger. On a mesh, rows are rounded up to a multiple of the devices that share
    them. Requests that no engine can serve are skipped. Raises ValueError if there are no others.
    """
    lengths, rooms, columns, new_tokens, count, given_slots = [], [], 0, 0, 0, 0
    latent_vectors = slot_states = given_states = penalty = False
    for request in requests:
        try:
            check_request(request)
        except ValueError:  # the engine answers it with this error
            continue
        images = (*request.prompt.images, *_first_picture(request))
        sizes = [len(request.prompt.tokens)]
        if request.method == "pixels":
            sizes += [4 + max((image.vision_tokens for image in images), default=0)] * pictures
        rooms += map(geometry.room, images)
        lengths += sizes[:2]
        params = request.sampling
        columns = max(columns, sum(sizes) + params.max_new_tokens)
        new_tokens, count = max(new_tokens, params.max_new_tokens), count + params.n
        latent_vectors |= request.latent_vectors
        slot_states |= request.slot_states
        if request.given_slots is not None:
            given_slots = max(given_slots, len(request.given_slots.inputs))
            given_states |= request.given_slots.keys is not None
        penalty |= params.repetition_penalty != 1
    if not count:
        raise ValueError("there are no requests that can be served; one or more are needed to choose sizes from")
    largest, shards = min(PREFILL_CHUNK, _rounded(max(lengths))), divisor("rows")
    rests = [_rounded(length % largest or largest) for length in lengths]
    settings = {
        "rows": -(-min(rows, count) // shards) * shards,
        "columns": _rounded(columns),
        "max_new_tokens": new_tokens,
        "chunks": few_sizes([*rests, largest]),
        "image_tokens": few_sizes(rooms),
        "latent_vectors": latent_vectors,
        "slot_states": slot_states,
        "given_slots": given_slots,
        "given_states": given_states,
        "repetition_penalty": penalty,
    }
    return EngineSettings(**settings | changes)


def _first_picture(request: Request) -> tuple[Picture, ...]:
    """Return the picture that a request by "pixels" draws at the beginning of an answer, if it can be drawn."""
    if request.method != "pixels":
        return ()
    try:
        picture = request.draw_look([])
        check_size(picture)
    except Exception:  # of any kind, as in the engine, which answers the request with the error
        return ()
    return (picture,)


def _rounded(tokens: int) -> int:
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def few_sizes(needed: Sequence[int], most: int = MAX_SIZES) -> tuple[int, ...]:
    """Return up to `most` of the `needed` sizes, the largest among them, so that rounding up to them adds little.

    Sizes are dropped one by one: each time the one whose users grow the least in sum.
    """
    sizes = sorted(set(needed))
    users = {size: needed.count(size) for size in sizes}
    while len(sizes) > most:
        place = min(range(len(sizes) - 1), key=lambda place: users[sizes[place]] * (sizes[place + 1] - sizes[place]))
        users[sizes[place + 1]] += users[sizes[place]]
        del sizes[place]
    return tuple(sizes)


def group_sizes(settings: EngineSettings) -> tuple[int, ...]:
    """Return the numbers of prompts that are prefilled at once, ascending.

    On a mesh that shards the rows it is the number of all rows: each device prefills its own.
    """
    if divisor("rows") > 1:
        return (settings.rows,)
    if settings.batch_invariant:
        return (1,)
    return tuple(sorted({min(size, settings.rows) for size in GROUPS}))


def plan_chunks(tokens: int, chunks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return start, count and size of the chunks of a prompt, which depend on its number of tokens alone.

    All but the last are full and of the largest size; the last is of the smallest size that holds the rest.
    """
    full = [(start, chunks[-1], chunks[-1]) for start in range(0, tokens - chunks[-1] + 1, chunks[-1])]
    rest = tokens - len(full) * chunks[-1]
    size = next(size for size in chunks if size >= rest)
    return [*full, (tokens - rest, rest, size)] if rest else full
