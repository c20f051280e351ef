"""Serving many requests at once: rows of one batch that are filled, decoded and freed each by itself.

What a request gives depends on it alone. Its prompt is prefilled by itself, in chunks that its own length decides; in
decoding, a row's numbers come from its own columns; and a prefix is taken over from another row in whole chunks, which
hold what computing them again would give.
"""

import contextlib
import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from transformers import PreTrainedTokenizerFast

from ilvr_jax.errors import one_line
from ilvr_jax.inference.decode import Mode
from ilvr_jax.inference.requests import (
    Answer,
    Look,
    Picture,
    Request,
    Timings,
    check_picture,
    check_prompt,
    check_request,
    check_tokens,
)
from ilvr_jax.inference.rows import (
    Rows,
    Status,
    copy_row,
    decode_rows,
    empty_cache,
    empty_rows,
    encode_image,
    place_features,
    prefill,
    resume_row,
    set_row,
)
from ilvr_jax.inference.sampling import Sampling, check_whole
from ilvr_jax.inference.transcript import show_look, show_text, split_at_looks
from ilvr_jax.method.layout import NO_IMAGE, Sample
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import ImageGeometry, Model
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.models.qwen2_5_vl.decoder import split_layers
from ilvr_jax.models.qwen2_5_vl.images import MERGE, EncodedImage

UNLIMITED = np.iinfo(np.int32).max
STEPS = 32  # tokens that rows write between two looks at them from the host, if none of them stops
WIDEST_CHUNK = 512  # prompt tokens prefilled at a time
COLUMN_STEP = 16  # sizes that are chosen from data are rounded up to multiples of this
MOST_SIZES = 3  # chunk sizes, and rooms of images: each is compiled
IMAGES_KEPT = 64  # images whose vision tokens are kept for requests to come
PICTURES = 6  # of one answer, that room is made for if nothing else is said


class EngineInUse(RuntimeError):
    """A second call of an engine that is serving; its rows hold the requests of the first."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """The static shape of an engine. `fit_settings` chooses one that holds given requests."""

    rows: int  # requests served at once
    columns: int  # tokens of a request, prompt, new ones and pictures together
    max_new_tokens: int  # of any request
    chunks: tuple[int, ...]  # prompt tokens prefilled at a time, ascending
    image_tokens: tuple[int, ...]  # vision tokens that images are padded to, ascending
    latent_vectors: bool = False  # whether the inputs of slots are kept, for requests that ask for them
    share_prefixes: bool = True  # whether prompts take over what others begin with, too

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


@dataclasses.dataclass
class _Served:
    """What the host knows of the request in a row."""

    number: int
    request: Request
    taken: float
    started: float
    shared_tokens: int = 0
    first_token: float = 0.0
    pictures: float = 0.0
    streamed: int = 0
    looks: list[int] = dataclasses.field(default_factory=list)  # vision tokens of each picture
    error: str | None = None


class Engine:
    """Answer requests with one model; holds the keys and values of `settings.rows` of them.

    It has a copy of the parameters, in the model's own dtype and layer by layer: they are there twice while the caller
    holds them, too.

    One `serve`, `answer` or `warm_up` runs at a time: a second one, from the same thread or another, raises
    EngineInUse. `serve` holds the engine from its first answer asked for until it is exhausted, closed, collected or
    ended by an exception, after which the engine serves again.
    """

    def __init__(
        self,
        model: Model,
        params: PyTree,
        special: SpecialTokens,
        settings: EngineSettings,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ):
        self.settings = settings
        self._model, self._special, self._tokenizer = model, special, tokenizer
        self._vision = jax.tree_util.tree_map_with_path(self._in_dtype, params["vision"])
        decoder = jax.tree_util.tree_map_with_path(self._in_dtype, decoder_params(params))
        self._decoder = split_layers(decoder, outputs_first=settings.rows > 1)
        self._geometry = model.geometry
        self._in_use = threading.Lock()
        self._features: dict[bytes, Array] = {}  # of images, the longest unused first
        self._empty()

    def _empty(self) -> None:
        """Make all rows new, without a request or a prompt."""
        model, settings = self._model, self.settings
        self._rows = empty_rows(model, settings.rows, settings.max_new_tokens, settings.latent_vectors)
        self._cache = empty_cache(model, settings.rows, settings.columns)
        units = max(settings.image_tokens, default=0)
        places = settings.columns + max(units, settings.chunks[-1])  # nothing is pushed back from the end
        self._vision_inputs = jnp.zeros((places, model.config.hidden_size), model.config.dtype)
        self._served: list[_Served | None] = [None] * settings.rows
        # What each row's first columns hold: the digest of the prompt up to the end of each chunk, and the hidden
        # state of the prompt's last token.
        self._digests: list[list[bytes]] = [[] for _ in range(settings.rows)]
        self._prompt_hidden: list[Array | None] = [None] * settings.rows
        self._last_used = [0.0] * settings.rows

    def _in_dtype(self, path: tuple[Any, ...], leaf: Array) -> Array:
        """Return a matrix as it is multiplied with, so that it is not turned into that for every token.

        That of the patch embedding is first summed, in the dtype that it has.
        """
        matrix = path[-1].key in ("kernel", "embed_tokens", "lm_head", "a", "b") and path[0].key != "patch_embed"
        return leaf.astype(self._model.config.dtype) if matrix else leaf

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the engine for one caller, with free rows; raises EngineInUse if it has another."""
        if not self._in_use.acquire(blocking=False):
            raise EngineInUse(
                "the engine is serving another call of serve, answer or warm_up; exhaust or close that one first, or "
                "make an engine for each caller"
            )
        try:
            if any(array.is_deleted() for array in jax.tree.leaves((self._rows, self._cache, self._vision_inputs))):
                self._empty()  # an exception (Ctrl-C) came between a call that was given the arrays and its result
            # Rows of a serve that was left are freed here, not at its end: the garbage collector may end it, at any
            # moment, even while JAX traces a function.
            for row, served in enumerate(self._served):
                if served:
                    self._free(row)
            yield
        finally:
            self._in_use.release()

    def warm_up(self) -> None:
        """Compile all that requests can need. Rows forget the prompts they hold. Raises EngineInUse."""
        row = np.int32(0)
        with self._held():
            for tokens in self.settings.image_tokens:
                self._place(self._encode(NO_IMAGE, tokens), 0)
            for size in self.settings.chunks:
                hidden = self._prefill(0, 0, np.zeros(1, np.int32), np.zeros((3, 1), np.int32), size)
            self._cache = copy_row(self._cache, row, row)
            self._set_row(0, None)
            self._resume(0, hidden, 1, 1)
            self._decode(1)
            self._set_row(0, None, Status.IDLE)
            self._digests = [[] for _ in self._digests]
            jax.block_until_ready(self._rows)

    def answer(self, requests: Iterable[Request]) -> list[Answer]:
        """Return the answers to all requests, in their order. Raises EngineInUse."""
        return sorted(self.serve(requests), key=lambda answer: answer.number)

    def serve(
        self, requests: Iterable[Request], on_tokens: Callable[[int, list[int]], None] | None = None
    ) -> Iterator[Answer]:
        """Yield the answer to each request as it is complete.

        A request is taken from `requests` when there is a row for it. `on_tokens(number, tokens)` is called with the
        new tokens of a request as they come. A request that cannot be served, whatever is in it, is answered with
        `error`; the others are answered as without it. Raises EngineInUse, when the first answer is asked for.
        """
        with self._held():
            waiting, exhausted = enumerate(requests), False
            steps = np.int32(1 if on_tokens else STEPS)
            while True:
                while not exhausted and None in self._served:
                    number, request = next(waiting, (None, None))
                    if number is None:
                        exhausted = True
                        break
                    taken = time.monotonic()
                    error = self.refusal(request)
                    if error:
                        yield Answer(number, getattr(request, "name", ""), (), None, (), "refused", error)
                        continue
                    self._admit(number, request, taken)
                if not any(self._served):
                    return
                yield from self._settle(on_tokens)
                if any(self._served):
                    self._decode(steps)
                    yield from self._settle(on_tokens)

    def refusal(self, request: Request) -> str | None:
        """Return one sentence that states why a request cannot be served, None if it can."""
        try:
            check_request(request)
            check_prompt(request.prompt, self._special, self._model.config)
            check_tokens("each of forced_tokens", request.forced_tokens, -1, self._model.config.vocab_size)
            self._check_room(request)
        except ValueError as error:
            return one_line(str(error))
        return None

    def _check_room(self, request: Request) -> None:
        """Raise ValueError, one sentence, if the engine was made for smaller requests."""
        settings = self.settings
        check_whole("max_new_tokens", request.max_new_tokens, 1, settings.max_new_tokens)
        if request.latent_vectors and not settings.latent_vectors:
            raise ValueError("latent_vectors must be false for an engine that was made without them, got true")
        room, length = settings.columns - request.max_new_tokens, len(request.prompt.tokens)
        if length > room:
            raise ValueError(
                f"the prompt must have at most {room} tokens beside {request.max_new_tokens} new ones, got {length}"
            )
        for image in request.prompt.images:
            self._check_size(image)

    def _check_size(self, image: Picture) -> None:
        """Raise ValueError, one sentence, for an image that is larger than the engine was made for."""
        largest, room = max(self.settings.image_tokens, default=0), self._geometry.room(image)
        if room > largest:
            raise ValueError(
                f"an image must take at most {largest} vision tokens, whole attention windows counted, got {room} for "
                f"{image.width // MERGE}x{image.height // MERGE}"
            )

    def _admit(self, number: int, request: Request, taken: float) -> None:
        """Give a request a row, with the keys and values of its prompt, and lets it write its first token."""
        served = _Served(number, request, taken, time.monotonic())
        prompt = request.prompt
        plan = plan_chunks(len(prompt.tokens), self.settings.chunks)
        digests = prompt_digests(prompt, plan, self._special)
        source, shared = self._longest_shared(digests)
        free = [row for row, other in enumerate(self._served) if other is None]
        if shared == len(self._digests[source]) and source in free:
            row = source
        else:  # the row that was not used for longest, but what is longer than the prefix stays for others
            row = min(free, key=lambda row: (row == source, self._last_used[row]))
        hidden = self._prompt_hidden[source] if shared else None
        served.shared_tokens = sum(count for _, count, _ in plan[:shared])
        self._digests[row] = []  # should what follows be interrupted
        if shared and row != source:
            self._cache = copy_row(self._cache, np.int32(source), np.int32(row))
        for image, column in zip(prompt.images, image_columns(prompt, self._special), strict=True):
            if column + image.vision_tokens > served.shared_tokens:
                self._place(self._image_features(image), column)
        for start, count, size in plan[shared:]:
            part = slice(start, start + count)
            hidden = self._prefill(row, start, prompt.tokens[part], prompt.positions[:, part], size)
        self._digests[row], self._prompt_hidden[row] = digests, hidden
        self._served[row] = served
        self._set_row(row, request)
        self._resume(row, hidden, len(prompt.tokens), int(prompt.positions.max()) + 1)
        jax.block_until_ready(self._rows.count)
        served.first_token = time.monotonic() - served.started

    def _longest_shared(self, digests: Sequence[bytes]) -> tuple[int, int]:
        """Return the row that holds the most chunks of a prompt, and how many."""
        best, most = 0, 0
        for row, held in enumerate(self._digests if self.settings.share_prefixes else ()):
            shared = next(
                (place for place, pair in enumerate(zip(held, digests, strict=False)) if pair[0] != pair[1]),
                min(len(held), len(digests)),
            )
            if shared == len(digests) < len(held):  # the hidden state of this prompt's last token was not kept
                shared -= 1
            if (shared, self._served[row] is None) > (most, self._served[best] is None):
                best, most = row, shared
        return best, most

    def _image_features(self, image: Picture) -> Float[Array, "units channels"]:
        """Return an image's vision tokens, computed unless they were kept."""
        digest = image_digest(image)
        features = self._features.pop(digest, None)
        if features is None:
            needed = self._geometry.room(image)
            features = self._encode(image, next(size for size in self.settings.image_tokens if size >= needed))
        self._features[digest] = features
        if len(self._features) > IMAGES_KEPT:
            self._features.pop(next(iter(self._features)))
        return features

    def _encode(self, image: Picture, tokens: int) -> Float[Array, "units channels"]:
        batch = self._geometry.stack([[image]], 1, tokens, image)
        if isinstance(image, EncodedImage):
            return jnp.asarray(batch.features[0, 0], self._model.config.dtype)
        return encode_image(self._model, self._vision, batch)

    def _place(self, features: Float[Array, "units channels"], column: int) -> None:
        self._vision_inputs = place_features(self._vision_inputs, features, np.int32(column))

    def _prefill(
        self, row: int, start: int, tokens: Int[np.ndarray, " count"], positions: Int[np.ndarray, "3 count"], size: int
    ) -> Float[Array, " channels"]:
        count = len(tokens)
        self._cache, hidden = prefill(
            self._model,
            self._decoder,
            self._cache,
            self._vision_inputs,
            np.int32(row),
            np.int32(start),
            np.pad(np.asarray(tokens, np.int32), (0, size - count)),
            np.pad(np.asarray(positions, np.int32), ((0, 0), (0, size - count))),
            np.int32(count),
            self._special,
        )
        return hidden

    def _set_row(self, row: int, request: Request | None, status: Status = Status.IDLE) -> None:
        """Set a row up for a request that has not written anything yet, or for none."""
        every, new_tokens = self._rows, self.settings.max_new_tokens
        forced = np.full(new_tokens, -1, np.int32)
        looks = 0
        if request:
            given = (self._special.latent_start,) if request.method == "single" else request.forced_tokens
            forced[: len(given)] = given
            looks = {"text": 0, "single": 1}.get(request.method, UNLIMITED)

        def of(name: str, default: Any, dtype: str = "int32") -> np.ndarray:
            return np.array([getattr(request, name, default)], dtype)

        one = Rows(
            status=np.array([status], np.int32),
            length=np.zeros(1, np.int32),
            position=np.zeros(1, np.int32),
            token=np.zeros(1, np.int32),
            hidden=np.zeros((1, *every.hidden.shape[1:]), every.hidden.dtype),
            mode=Mode(
                slots_left=np.zeros(1, np.int32),
                looks_left=np.array([looks], np.int32),
                latent_size=of("latent_size", 1),
                early_end=of("early_end", False, "bool"),
            ),
            sampling=Sampling(
                of("temperature", 0, "float32"), of("top_k", 0), of("top_p", 1, "float32"), of("seed", 0, "uint32")
            ),
            pictures=np.array([request is not None and request.method == "pixels"]),
            count=np.zeros(1, np.int32),
            max_new_tokens=of("max_new_tokens", 1),
            tokens=np.zeros((1, new_tokens), np.int32),
            log_probabilities=np.zeros((1, new_tokens), np.float32),
            latents=np.zeros((1, *every.latents.shape[1:]), every.latents.dtype),
            forced=forced[None],
        )
        self._rows = set_row(self._rows, np.int32(row), one)

    def _resume(self, row: int, hidden: Float[Array, " channels"], length: int, position: int) -> None:
        self._rows = resume_row(
            self._model,
            self._decoder,
            self._rows,
            np.int32(row),
            hidden,
            np.int32(length),
            np.int32(position),
            self._special,
        )

    def _decode(self, steps: int) -> None:
        self._cache, self._rows = decode_rows(
            self._model, self._decoder, self._cache, self._rows, np.int32(steps), self._special
        )

    def _settle(self, on_tokens: Callable[[int, list[int]], None] | None) -> Iterator[Answer]:
        """Give pictures to rows that wait for them, and yields the answers of rows that are done."""
        while True:
            status, count = jax.device_get((self._rows.status, self._rows.count))
            looking = [row for row, served in enumerate(self._served) if served and status[row] == Status.LOOKING]
            if on_tokens:
                self._stream(count, on_tokens)
            reasons = {Status.ENDED: "end", Status.FULL: "length"}
            ended = {row: reasons[status[row]] for row in range(len(status)) if status[row] in reasons}
            ended |= {row: reason for row in looking if (reason := self._show_picture(row))}
            for row, served in enumerate(self._served):
                if served and row in ended:
                    answer = self._read_answer(row, int(count[row]), ended[row])
                    self._free(row)
                    yield answer
            if all(row in ended for row in looking):
                return

    def _stream(self, count: Int[np.ndarray, " rows"], on_tokens: Callable[[int, list[int]], None]) -> None:
        tokens = np.asarray(self._rows.tokens)
        for row, served in enumerate(self._served):
            if served and served.streamed < count[row]:
                on_tokens(served.number, tokens[row, served.streamed : count[row]].tolist())
                served.streamed = int(count[row])

    def _show_picture(self, row: int) -> str | None:
        """Prefill the picture that a row waits for, between latent markers.

        Returns the reason if the answer ends here: "picture", there is no room for it, or "refused", there is none.
        """
        served, special, began = self._served[row], self._special, time.monotonic()
        length, position, count, written = (
            jax.device_get(array)[row]
            for array in (self._rows.length, self._rows.position, self._rows.count, self._rows.tokens)
        )
        try:
            image = served.request.draw_look(written[:count].tolist())
            check_picture(image, self._model.config)
        except Exception as error:  # of any kind: it is the caller's function, and other requests are being served
            served.error = one_line(f"draw_look must return a picture, got {type(error).__name__}: {error}")
            return "refused"
        grid = image.height // MERGE, image.width // MERGE
        pads = [special.image_pad] * image.vision_tokens
        tokens = [special.latent_start, special.vision_start, *pads, special.vision_end, special.latent_end]
        tokens = np.array(tokens, np.int32)
        room = self.settings.columns - length - (served.request.max_new_tokens - count)
        try:
            self._check_size(image)
            if len(tokens) > room:
                raise ValueError(
                    f"picture {len(served.looks) + 1} must take at most {room} tokens here, got {len(tokens)}"
                )
        except ValueError as error:
            served.error = str(error)
            return "picture"
        positions = self._geometry.position_ids(tokens, [grid], special.image_pad) + position
        self._place(self._image_features(image), int(length) + 2)
        for start, part, size in plan_chunks(len(tokens), self.settings.chunks):
            here = slice(start, start + part)
            hidden = self._prefill(row, int(length) + start, tokens[here], positions[:, here], size)
        self._resume(row, hidden, int(length) + len(tokens), int(positions.max()) + 1)
        jax.block_until_ready(self._rows.count)
        served.looks.append(image.vision_tokens)
        served.pictures += time.monotonic() - began
        return None

    def _read_answer(self, row: int, count: int, reason: str) -> Answer:
        served, special = self._served[row], self._special
        request = served.request
        tokens = np.asarray(self._rows.tokens)[row, :count]
        starts = np.flatnonzero(tokens == special.latent_start)
        slots = [int((part == special.latent_pad).sum()) for part in np.split(tokens, starts)[1:]]
        pictures = served.looks + [0] * (len(starts) - len(served.looks))
        looks = tuple(map(Look, starts.tolist(), slots, pictures))
        text = None
        if self._tokenizer:
            texts, _ = split_at_looks(tokens, self._tokenizer, special)
            text = show_text(texts, [show_look(look.slots, look.picture_tokens) for look in looks])
        log_probabilities = np.asarray(self._rows.log_probabilities)[row, :count] if request.log_probabilities else None
        latents = np.asarray(self._rows.latents)[row] if request.latent_vectors else None
        return Answer(
            number=served.number,
            name=request.name,
            tokens=tuple(tokens.tolist()),
            text=text,
            looks=looks,
            stop_reason=reason,
            error=served.error,
            log_probabilities=None if log_probabilities is None else tuple(log_probabilities.tolist()),
            latent_vectors=None if latents is None else latents[:count][tokens == special.latent_pad],
            shared_tokens=served.shared_tokens,
            timings=Timings(
                served.started - served.taken,
                served.first_token,
                time.monotonic() - served.started,
                served.pictures,
            ),
        )

    def _free(self, row: int) -> None:
        self._served[row] = None
        self._last_used[row] = time.monotonic()
        self._set_row(row, None)


def plan_chunks(tokens: int, chunks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return start, count and size of the chunks of a prompt: whole ones of the largest size, the rest in one that
    holds it. They depend on the number of tokens alone.
    """
    whole = [(start, chunks[-1], chunks[-1]) for start in range(0, tokens - chunks[-1] + 1, chunks[-1])]
    rest = tokens - len(whole) * chunks[-1]
    size = next(size for size in chunks if size >= rest)
    return [*whole, (tokens - rest, rest, size)] if rest else whole


def image_columns(prompt: Sample, special: SpecialTokens) -> list[int]:
    """Return where in a prompt the vision tokens of each of its images begin."""
    places = np.flatnonzero(prompt.tokens == special.image_pad)
    firsts = np.cumsum([0, *(image.vision_tokens for image in prompt.images)])[:-1]
    return [int(places[first]) for first in firsts]


def prompt_digests(prompt: Sample, plan: Sequence[tuple[int, int, int]], special: SpecialTokens) -> list[bytes]:
    """Return for each chunk a digest of the prompt up to its end, images included, and of how it is cut."""
    columns, digests, chain = image_columns(prompt, special), [], hashlib.sha256()
    for start, count, size in plan:
        chain.update(size.to_bytes(8, "big") + prompt.tokens[start : start + count].tobytes())
        for image, column in zip(prompt.images, columns, strict=True):
            if start <= column < start + count:
                chain.update(image_digest(image))
        digests.append(chain.digest())
    return digests


def image_digest(image: Picture) -> bytes:
    """Return a digest of an image's size and content."""
    digest = hashlib.sha256(f"{type(image).__name__} {image.height} {image.width} {image[0].dtype}".encode())
    digest.update(np.ascontiguousarray(image[0]).data)
    return digest.digest()


def fit_settings(
    requests: Iterable[Request], rows: int, geometry: ImageGeometry, pictures: int = PICTURES, **changes
) -> EngineSettings:
    """Return settings that hold all `requests`, with few sizes that leave little padding; `changes` go on top.

    An answer by "pixels" gets room for so many `pictures` of the size of its prompt's largest image. Requests that no
    engine can serve are skipped. Raises ValueError if there are no others.
    """
    lengths, rooms, columns, most, count, latents = [], [], 0, 0, 0, False
    for request in requests:
        try:
            check_request(request)
        except ValueError:  # the engine answers it with this error
            continue
        images = request.prompt.images
        sizes = [len(request.prompt.tokens)]
        if request.method == "pixels":
            sizes += [4 + max((image.vision_tokens for image in images), default=0)] * pictures
        rooms += map(geometry.room, images)
        lengths += sizes[:2]
        columns = max(columns, sum(sizes) + request.max_new_tokens)
        most, count = max(most, request.max_new_tokens), count + 1
        latents |= request.latent_vectors
    if not count:
        raise ValueError("there are no requests that can be served; one or more are needed to choose sizes from")
    widest = min(WIDEST_CHUNK, _rounded(max(lengths)))
    rests = [_rounded(length % widest or widest) for length in lengths]
    settings = {
        "rows": min(rows, count),
        "columns": _rounded(columns),
        "max_new_tokens": most,
        "chunks": few_sizes([*rests, widest]),
        "image_tokens": few_sizes(rooms),
        "latent_vectors": latents,
    }
    return EngineSettings(**settings | changes)


def _rounded(tokens: int) -> int:
    return -(-tokens // COLUMN_STEP) * COLUMN_STEP


def few_sizes(needed: Sequence[int], most: int = MOST_SIZES) -> tuple[int, ...]:
    """Return up to `most` sizes, the largest of `needed` among them, that pad the needed ones little.

    One size after another is given up, the one whose users grow the least in sum.
    """
    sizes = sorted(set(needed))
    users = {size: needed.count(size) for size in sizes}
    while len(sizes) > most:
        place = min(range(len(sizes) - 1), key=lambda place: users[sizes[place]] * (sizes[place + 1] - sizes[place]))
        users[sizes[place + 1]] += users[sizes[place]]
        del sizes[place]
    return tuple(sizes)
