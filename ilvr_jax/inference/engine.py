"""Serving many requests at once: rows of one batch, each filled, decoded and freed by itself.

An answer depends on its request alone. A prompt is prefilled by itself, in chunks that its own length decides; in
decoding, a row's numbers come from its own columns; and prefixes are reused in whole chunks, whose keys and values are
those that prefilling again would compute.
"""

import contextlib
import dataclasses
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
from ilvr_jax.inference.image_cache import ImageCache
from ilvr_jax.inference.prefix_cache import PrefixCache, image_columns, prompt_digests
from ilvr_jax.inference.requests import (
    Answer,
    Look,
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
    place_features,
    prefill,
    request_row,
    resume_row,
    set_row,
)
from ilvr_jax.inference.sampling import check_whole
from ilvr_jax.inference.sizes import EngineSettings, plan_chunks
from ilvr_jax.inference.transcript import show_look, show_text, split_at_looks
from ilvr_jax.method.layout import NO_IMAGE
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import Model
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.models.qwen2_5_vl.decoder import split_layers
from ilvr_jax.models.qwen2_5_vl.images import MERGE

STEPS = 32  # the most decoding steps between two reads of the rows' status by the host


class EngineInUse(RuntimeError):
    """A second call of an engine that is serving; its rows hold the requests of the first."""


@dataclasses.dataclass
class _RunningRequest:
    """The host's record of the request in a row."""

    number: int
    request: Request
    started: float  # on the host's clock
    shared_tokens: int = 0
    first_token: float = 0.0  # seconds until then
    picture_seconds: float = 0.0
    streamed: int = 0  # tokens given to `on_tokens`
    pictures: list[int] = dataclasses.field(default_factory=list)  # vision tokens of each
    error: str | None = None


class Engine:
    """Answers requests with one model, `settings.rows` of them at a time.

    It holds a copy of the parameters, in the model's dtype and layer by layer, so the caller may free its own.

    One `serve`, `answer` or `warm_up` runs at a time: a second one, from the same thread or another, raises
    EngineInUse. `serve` holds the engine from the first `next` until it is exhausted, closed, collected or ended by an
    exception, after which the engine serves again.
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
        vision = jax.tree_util.tree_map_with_path(self._in_dtype, params["vision"])
        decoder = jax.tree_util.tree_map_with_path(self._in_dtype, decoder_params(params))
        self._decoder = split_layers(decoder, outputs_first=settings.rows > 1)
        self._images = ImageCache(model, vision, settings.image_tokens)
        self._idle_row = jax.device_get(empty_rows(model, 1, settings.max_new_tokens, settings.latent_vectors))
        self._in_use = threading.Lock()
        self._empty()

    def _empty(self) -> None:
        """Make all rows new, without a request or a prompt."""
        model, settings = self._model, self.settings
        self._rows = empty_rows(model, settings.rows, settings.max_new_tokens, settings.latent_vectors)
        self._cache = empty_cache(model, settings.rows, settings.columns)
        largest = max((settings.chunks[-1], *settings.image_tokens))
        places = settings.columns + largest  # so that no dynamic slice or update is clamped at the end
        self._vision_inputs = jnp.zeros((places, model.config.hidden_size), model.config.dtype)
        self._running: list[_RunningRequest | None] = [None] * settings.rows
        self._prefixes = PrefixCache(settings.rows, settings.share_prefixes)

    def _in_dtype(self, path: tuple[Any, ...], leaf: Array) -> Array:
        """Return a matrix in the dtype it is multiplied in, so that it is not cast for every token.

        That of the patch embedding stays as it is: it is first summed, in its own dtype.
        """
        matrix = path[-1].key in ("kernel", "embed_tokens", "lm_head", "a", "b") and path[0].key != "patch_embed"
        return leaf.astype(self._model.config.dtype) if matrix else leaf

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the engine, with all rows free, for one caller; raise EngineInUse if it has another."""
        if not self._in_use.acquire(blocking=False):
            raise EngineInUse(
                "the engine is serving another call of serve, answer or warm_up; exhaust or close that one first, or "
                "make an engine for each caller"
            )
        try:
            if any(array.is_deleted() for array in jax.tree.leaves((self._rows, self._cache, self._vision_inputs))):
                self._empty()  # an exception (Ctrl-C) hit a call that had donated the arrays
            # Rows of an abandoned `serve` are freed here, not when it ends: the garbage collector may end it at any
            # moment, even while JAX traces a function.
            for row in self._rows_in_use():
                self._free(row)
            yield
        finally:
            self._in_use.release()

    def warm_up(self) -> None:
        """Compile all that requests can need, and drop the prompts that rows hold. Raises EngineInUse."""
        row = np.int32(0)
        with self._held():
            for tokens in self.settings.image_tokens:
                self._place(self._images.encode(NO_IMAGE, tokens), 0)
            for size in self.settings.chunks:
                hidden = self._prefill(0, 0, np.zeros(1, np.int32), np.zeros((3, 1), np.int32), [(0, 1, size)])
            self._cache = copy_row(self._cache, row, row)
            self._set_row(0, self._idle_row)
            self._resume(0, hidden, 1, 1)
            self._decode(1)
            self._set_row(0, self._idle_row)
            self._prefixes = PrefixCache(self.settings.rows, self.settings.share_prefixes)
            jax.block_until_ready(self._rows)

    def answer(self, requests: Iterable[Request]) -> list[Answer]:
        """Return the answers to all requests, in their order. Raises EngineInUse."""
        return sorted(self.serve(requests), key=lambda answer: answer.number)

    def serve(
        self, requests: Iterable[Request], on_tokens: Callable[[int, list[int]], None] | None = None
    ) -> Iterator[Answer]:
        """Yield the answer to each request when it is complete.

        A request is taken from `requests` when a row is free. `on_tokens(number, tokens)` is called with the new tokens
        of a request as they come. A request that cannot be served, whatever it holds, is answered with `error`, and the
        others as without it. The first `next` raises EngineInUse.
        """
        with self._held():
            waiting, exhausted = enumerate(requests), False
            steps = np.int32(1 if on_tokens else STEPS)
            while True:
                while not exhausted and None in self._running:
                    number, request = next(waiting, (None, None))
                    if number is None:
                        exhausted = True
                        break
                    if error := self.validate(request):
                        yield Answer(number, getattr(request, "name", ""), (), None, (), "refused", error)
                        continue
                    self._schedule(number, request)
                if not any(self._running):
                    return
                yield from self._finish_stopped(on_tokens)
                if any(self._running):
                    self._decode(steps)
                    yield from self._finish_stopped(on_tokens)

    def validate(self, request: Request) -> str | None:
        """Return why a request cannot be served, in one sentence, or None if it can."""
        try:
            check_request(request)
            check_prompt(request.prompt, self._special, self._model.config)
            check_tokens("each of forced_tokens", request.forced_tokens, -1, self._model.config.vocab_size)
            self._check_room(request)
        except ValueError as error:
            return one_line(str(error))
        return None

    def _check_room(self, request: Request) -> None:
        """Raise ValueError, one sentence, if a request is larger than the engine's sizes."""
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
            self._images.check_size(image)

    def _schedule(self, number: int, request: Request) -> None:
        """Give a request a row, prefill what the row lacks of its prompt, and let it write its first token."""
        running, prompt = _RunningRequest(number, request, time.monotonic()), request.prompt
        plan = plan_chunks(len(prompt.tokens), self.settings.chunks)
        digests = prompt_digests(prompt, plan, self._special)
        free = [row for row, other in enumerate(self._running) if other is None]
        row, source, shared, hidden = self._prefixes.place(digests, free)
        running.shared_tokens = sum(count for _, count, _ in plan[:shared])
        self._prefixes.forget(row)  # first, since what follows may be interrupted
        if shared and row != source:
            self._cache = copy_row(self._cache, np.int32(source), np.int32(row))
        for image, column in zip(prompt.images, image_columns(prompt, self._special), strict=True):
            if column + image.vision_tokens > running.shared_tokens:
                self._place(self._images.features(image), column)
        if shared < len(plan):
            hidden = self._prefill(row, 0, prompt.tokens, prompt.positions, plan[shared:])
        self._prefixes.hold(row, digests, hidden)
        self._running[row] = running
        self._set_row(row, request_row(self._idle_row, request, self._special))
        self._resume(row, hidden, len(prompt.tokens), int(prompt.positions.max()) + 1)
        jax.block_until_ready(self._rows.count)
        running.first_token = time.monotonic() - running.started

    def _rows_in_use(self) -> list[int]:
        return [row for row, running in enumerate(self._running) if running]

    def _place(self, features: Float[Array, "units channels"], column: int) -> None:
        self._vision_inputs = place_features(self._vision_inputs, features, np.int32(column))

    def _prefill(
        self,
        row: int,
        first: int,
        tokens: Int[np.ndarray, " count"],
        positions: Int[np.ndarray, "3 count"],
        plan: Sequence[tuple[int, int, int]],
    ) -> Float[Array, " channels"]:
        """Prefill chunks of tokens, of which the first goes to the column `first`; return the last hidden state."""
        for start, count, size in plan:
            part, padding = slice(start, start + count), (0, size - count)
            self._cache, hidden = prefill(
                self._model,
                self._decoder,
                self._cache,
                self._vision_inputs,
                np.int32(row),
                np.int32(first + start),
                np.pad(np.asarray(tokens[part], np.int32), padding),
                np.pad(np.asarray(positions[:, part], np.int32), ((0, 0), padding)),
                np.int32(count),
                self._special,
            )
        return hidden

    def _set_row(self, row: int, content: Rows) -> None:
        self._rows = set_row(self._rows, np.int32(row), content)

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

    def _finish_stopped(self, on_tokens: Callable[[int, list[int]], None] | None) -> Iterator[Answer]:
        """Yield the answers of rows that ended, and resume those that wait for a picture, until none waits."""
        while True:
            status, count = jax.device_get((self._rows.status, self._rows.count))
            if on_tokens:
                self._stream(count, on_tokens)
            looking = [row for row in self._rows_in_use() if status[row] == Status.LOOKING]
            reasons = {Status.ENDED: "end", Status.FULL: "length"}
            ended = {row: reasons[status[row]] for row in self._rows_in_use() if status[row] in reasons}
            ended |= {row: reason for row in looking if (reason := self._show_picture(row))}
            for row in sorted(ended):
                answer = self._read_answer(row, int(count[row]), ended[row])
                self._free(row)
                yield answer
            if all(row in ended for row in looking):
                return

    def _stream(self, count: Int[np.ndarray, " rows"], on_tokens: Callable[[int, list[int]], None]) -> None:
        tokens = np.asarray(self._rows.tokens)
        for row in self._rows_in_use():
            running = self._running[row]
            if running.streamed < count[row]:
                on_tokens(running.number, tokens[row, running.streamed : count[row]].tolist())
                running.streamed = int(count[row])

    def _show_picture(self, row: int) -> str | None:
        """Prefill the picture that a row waits for, between latent markers, and resume the row.

        Return None, or why the answer ends instead: "picture" if there is no room for it, "refused" if there is none.
        """
        running, special, began = self._running[row], self._special, time.monotonic()
        length, position, count, written = (
            jax.device_get(array)[row]
            for array in (self._rows.length, self._rows.position, self._rows.count, self._rows.tokens)
        )
        try:
            image = running.request.draw_look(written[:count].tolist())
            check_picture(image, self._model.config)
        except Exception as error:  # of any kind: the function is the caller's, and other requests are being served
            running.error = one_line(f"draw_look must return a picture, got {type(error).__name__}: {error}")
            return "refused"
        grid = image.height // MERGE, image.width // MERGE
        pads = [special.image_pad] * image.vision_tokens
        tokens = [special.latent_start, special.vision_start, *pads, special.vision_end, special.latent_end]
        tokens = np.array(tokens, np.int32)
        room = self.settings.columns - length - (running.request.max_new_tokens - count)
        try:
            self._images.check_size(image)
            if len(tokens) > room:
                raise ValueError(
                    f"picture {len(running.pictures) + 1} must take at most {room} tokens here, got {len(tokens)}"
                )
        except ValueError as error:
            running.error = str(error)
            return "picture"
        positions = self._model.geometry.position_ids(tokens, [grid], special.image_pad) + position
        self._place(self._images.features(image), int(length) + 2)
        hidden = self._prefill(row, int(length), tokens, positions, plan_chunks(len(tokens), self.settings.chunks))
        self._resume(row, hidden, int(length) + len(tokens), int(positions.max()) + 1)
        jax.block_until_ready(self._rows.count)
        running.pictures.append(image.vision_tokens)
        running.picture_seconds += time.monotonic() - began
        return None

    def _read_answer(self, row: int, count: int, reason: str) -> Answer:
        running, special = self._running[row], self._special
        request = running.request
        tokens = np.asarray(self._rows.tokens)[row, :count]
        starts = np.flatnonzero(tokens == special.latent_start)
        slots = [int((part == special.latent_pad).sum()) for part in np.split(tokens, starts)[1:]]
        pictures = running.pictures + [0] * (len(starts) - len(running.pictures))
        looks = tuple(map(Look, starts.tolist(), slots, pictures))
        text = None
        if self._tokenizer:
            texts, _ = split_at_looks(tokens, self._tokenizer, special)
            text = show_text(texts, [show_look(look.slots, look.picture_tokens) for look in looks])
        log_probabilities = np.asarray(self._rows.log_probabilities)[row, :count] if request.log_probabilities else None
        latents = np.asarray(self._rows.latents)[row] if request.latent_vectors else None
        return Answer(
            number=running.number,
            name=request.name,
            tokens=tuple(tokens.tolist()),
            text=text,
            looks=looks,
            stop_reason=reason,
            error=running.error,
            log_probabilities=None if log_probabilities is None else tuple(log_probabilities.tolist()),
            latent_vectors=None if latents is None else latents[:count][tokens == special.latent_pad],
            shared_tokens=running.shared_tokens,
            timings=Timings(running.first_token, time.monotonic() - running.started, running.picture_seconds),
        )

    def _free(self, row: int) -> None:
        self._running[row] = None
        self._prefixes.release(row)
        self._set_row(row, self._idle_row)
