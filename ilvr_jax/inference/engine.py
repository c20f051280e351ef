"""Serving many requests at once: rows of one batch, each filled, decoded and freed by itself.

It schedules the functions of `decode`, on one device or on the mesh of `sharding.on_mesh`. Of several processes each
must make the same calls with the same requests: the devices of each then decode their rows, and all get all outputs.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, PyTree
from transformers import PreTrainedTokenizerFast

from ilvr_jax.errors import one_line
from ilvr_jax.inference.batch import DecodeBatch, Prefill
from ilvr_jax.inference.decode import Status
from ilvr_jax.inference.prefix_cache import PrefixCache, image_columns, prompt_digests
from ilvr_jax.inference.requests import (
    Look,
    Request,
    RequestOutput,
    Timings,
    check_given_slots,
    check_picture,
    check_prompt,
    check_request,
    check_tokens,
)
from ilvr_jax.inference.sampling import check_whole
from ilvr_jax.inference.sizes import EngineSettings, fit_settings, plan_chunks
from ilvr_jax.inference.transcript import cut_texts, find_stop, show_look, show_text, split_at_looks
from ilvr_jax.method.positions import answer_positions
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import Model
from ilvr_jax.models.qwen2_5_vl.images import MERGE

STEPS = 32  # the most decoding steps between two reads of the rows' status by the host


class EngineInUse(RuntimeError):
    """A second call of an engine that is serving; its rows hold the requests of the first."""


@dataclasses.dataclass(eq=False)
class _RunningRequest:
    """The host's record of the request in a row."""

    number: int
    sample: int
    request: Request
    started: float  # on the host's clock
    length: int = 0  # columns of the prompt and its pictures
    shared_tokens: int = 0
    first_token: float = 0.0  # seconds until then
    picture_seconds: float = 0.0
    streamed: int = 0  # tokens given to `on_tokens`
    searched: int = 0  # tokens without a stop string
    text_length: int | None = None  # up to a stop string
    pictures: list[int] = dataclasses.field(default_factory=list)  # vision tokens of each
    error: str | None = None


def generate(
    model: Model,
    params: PyTree,
    requests: Sequence[Request],
    special: SpecialTokens,
    tokenizer: PreTrainedTokenizerFast | None = None,
    rows: int = 256,
    **settings: Any,
) -> list[RequestOutput]:
    """Return the outputs of all requests, up to `rows` decoded at a time; `settings` are fields of EngineSettings."""
    fitted = fit_settings(requests, rows, model.geometry, **settings)
    return Engine(model, params, special, fitted, tokenizer).answer(requests)


class Engine:
    """Answers requests with one model, `settings.rows` of them at a time.

    One `serve`, `answer` or `warm_up` runs at a time: a second one, from the same thread or another, raises
    EngineInUse. `serve` holds the engine from the first `next` until it is exhausted, closed, collected or ended by an
    exception, after which the engine serves again.

    Raises ValueError as `DecodeBatch` does.
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
        self._batch = DecodeBatch(model, params, special, settings)
        self._in_use = threading.Lock()
        self._forget_all()

    def _forget_all(self) -> None:
        self._running: list[_RunningRequest | None] = [None] * self.settings.rows
        self._prefixes = PrefixCache(self.settings.rows, self.settings.share_prefixes)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the engine, with all rows free, for one caller; raise EngineInUse if it has another."""
        if not self._in_use.acquire(blocking=False):
            raise EngineInUse(
                "the engine is serving another call of serve, answer or warm_up; exhaust or close that one first, or "
                "make an engine for each caller"
            )
        try:
            if self._batch.is_lost:
                self._batch.empty()
                self._forget_all()
            # Rows of an abandoned `serve` are freed here, not when it ends: the garbage collector may end it at any
            # moment, even while JAX traces a function.
            for row in self._rows_in_use():
                self._free(row)
            yield
        finally:
            self._in_use.release()

    def warm_up(self) -> None:
        """Compile all that requests can need, and drop the prompts that rows hold. Raises EngineInUse."""
        with self._held():
            self._prefixes = PrefixCache(self.settings.rows, self.settings.share_prefixes)
            self._batch.warm_up()

    def answer(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """Return the outputs of all requests, in their order. Raises EngineInUse."""
        return sorted(self.serve(requests), key=lambda output: (output.number, output.sample))

    def serve(
        self, requests: Iterable[Request], on_tokens: Callable[[int, list[int]], None] | None = None
    ) -> Iterator[RequestOutput]:
        """Yield the outputs of each request, of which there are `sampling.n`, when they are complete.

        A request is taken from `requests` when a row is free. `on_tokens(number, tokens)` is called with the new tokens
        of a request as they come. A request that cannot be served, whatever it holds, has one output with `error`, and
        the others are answered as without it. The first `next` raises EngineInUse.
        """
        with self._held():
            waiting, exhausted = self._samples(requests), False
            while True:
                admitted, refused = [], []
                while not exhausted and len(admitted) < self._running.count(None):
                    sample = next(waiting, None)
                    exhausted = sample is None
                    if isinstance(sample, RequestOutput):
                        refused.append(sample)
                    elif not exhausted:
                        admitted.append(sample)
                self._schedule(admitted)
                yield from refused
                if not any(self._running):
                    return
                yield from self._finish_stopped(on_tokens)
                if any(self._running):
                    self._batch.decode(1 if on_tokens else STEPS, self._most_stopped(exhausted))
                    yield from self._finish_stopped(on_tokens)

    def _samples(self, requests: Iterable[Request]) -> Iterator[_RunningRequest | RequestOutput]:
        """Yield the samples of each request, or the output of one that cannot be served."""
        for number, request in enumerate(requests):
            if error := self.validate(request):
                yield RequestOutput(number, 0, getattr(request, "name", ""), (), None, (), "refused", error)
                continue
            for sample in range(request.sampling.n):
                yield _RunningRequest(number, sample, request, time.monotonic(), len(request.prompt.tokens))

    def _most_stopped(self, exhausted: bool) -> int:
        """Return how many rows may stop before the host looks: those that go to waiting requests at once.

        A row that waits for a picture is not kept waiting.
        """
        if any(running and running.request.method == "pixels" for running in self._running):
            return 1
        return self.settings.rows if exhausted else max(1, self.settings.rows // 4)

    def validate(self, request: Request) -> str | None:
        """Return why a request cannot be served, in one sentence, or None if it can."""
        try:
            check_request(request)
            check_prompt(request.prompt, self._special, self._model.config)
            check_tokens("each of forced_tokens", request.forced_tokens, -1, self._model.config.vocab_size)
            check_given_slots(request.given_slots, self._model.config)
            self._check_room(request)
        except ValueError as error:
            return one_line(str(error))
        return None

    def _check_room(self, request: Request) -> None:
        """Raise ValueError, one sentence, if a request is larger than the engine's sizes."""
        settings, params = self.settings, request.sampling
        check_whole("max_new_tokens", params.max_new_tokens, 1, settings.max_new_tokens)
        for name in ("latent_vectors", "slot_states"):
            if getattr(request, name) and not getattr(settings, name):
                raise ValueError(f"{name} must be false for an engine that was made without them, got true")
        if given := request.given_slots:
            if len(given.inputs) > settings.given_slots:
                raise ValueError(
                    f"given_slots must have at most {settings.given_slots} slots for an engine that was made with that "
                    f"room, got {len(given.inputs)}"
                )
            if given.keys is not None and not settings.given_states:
                raise ValueError("keys of given_slots must be None for an engine that was made without, got some")
        if params.repetition_penalty != 1 and not settings.repetition_penalty:
            raise ValueError(
                f"repetition_penalty must be 1 for an engine that was made without, got {params.repetition_penalty}"
            )
        if params.stop and not self._tokenizer:
            raise ValueError("stop must be empty for an engine without a tokenizer, which finds no text")
        room, length = settings.columns - params.max_new_tokens, len(request.prompt.tokens)
        if length > room:
            raise ValueError(
                f"the prompt must have at most {room} tokens beside {params.max_new_tokens} new ones, got {length}"
            )
        for image in request.prompt.images:
            self._batch.images.check_size(image)

    def _schedule(self, admitted: Sequence[_RunningRequest]) -> None:
        """Give requests rows, prefill what the rows lack of their prompts, and let them write their first tokens."""
        waiting: list[Prefill] = []
        try:
            for running in admitted:
                self._place_prompt(running, waiting)
            self._batch.prefill(waiting)
        except BaseException:  # these rows do not hold their prompts
            for part in waiting:
                self._prefixes.forget(part.row)
            raise
        ends = {}
        for row in (self._running.index(running) for running in admitted):
            running, prompt = self._running[row], self._running[row].request.prompt
            seed = running.request.seed
            if running.sample:
                seed = np.random.SeedSequence((seed, running.sample)).generate_state(1)[0]
            self._batch.insert(row, running.request, seed)
            ends[row] = len(prompt.tokens), int(prompt.positions.max()) + 1
        if ends:
            self._batch.start(ends)
        for running in admitted:
            running.first_token = time.monotonic() - running.started

    def _place_prompt(self, running: _RunningRequest, waiting: list[Prefill]) -> None:
        """Give a request a row, reuse what rows hold of its prompt, and add the rest to what waits for prefill."""
        prompt, special = running.request.prompt, self._special
        plan = plan_chunks(len(prompt.tokens), self.settings.chunks)
        digests = prompt_digests(prompt, plan, special)
        free = [row for row, other in enumerate(self._running) if other is None]
        row, source, shared = self._prefixes.place(digests, free)
        if shared and any(part.row == source for part in waiting):
            self._batch.prefill(waiting)
            waiting.clear()
        running.started = time.monotonic()
        running.shared_tokens = sum(count for _, count, _ in plan[:shared])
        self._prefixes.forget(row)  # first, since what follows may be interrupted
        if shared and row != source:
            self._batch.copy_prompt(source, row)
        self._running[row] = running
        images = list(zip(prompt.images, image_columns(prompt, special), strict=True))
        waiting.append(Prefill(row, prompt.tokens, prompt.positions, images, plan[shared:]))
        self._prefixes.hold(row, digests)

    def _rows_in_use(self) -> list[int]:
        return [row for row, running in enumerate(self._running) if running]

    def _finish_stopped(self, on_tokens: Callable[[int, list[int]], None] | None) -> Iterator[RequestOutput]:
        """Yield the outputs of rows that ended, and resume those that wait for a picture, until none waits."""
        while True:
            status, count = (np.array(array) for array in (self._batch.state.status, self._batch.state.count))
            reasons = {Status.ENDED: "end", Status.FULL: "length"}
            ended = {row: reasons[status[row]] for row in self._rows_in_use() if status[row] in reasons}
            ended |= self._find_stops(count)
            if on_tokens:
                self._stream(count, on_tokens)
            looking = [row for row in self._rows_in_use() if status[row] == Status.LOOKING and row not in ended]
            ended |= self._show_pictures(looking, count)
            outputs = [self._read_output(row, int(count[row]), ended[row]) for row in sorted(ended)]
            for row in ended:
                self._free(row)
            yield from outputs
            if all(row in ended for row in looking):
                return

    def _find_stops(self, count: Int[np.ndarray, " rows"]) -> dict[int, str]:
        """Return the rows whose text holds a stop string; their `count` becomes that of the tokens up to it."""
        found, tokens = {}, None
        for row in self._rows_in_use():
            running, params = self._running[row], self._running[row].request.sampling
            first = max(running.searched, params.min_new_tokens)
            if not params.stop or count[row] <= first:
                continue
            tokens = np.asarray(self._batch.state.tokens) if tokens is None else tokens
            end = find_stop(tokens[row, : count[row]], params.stop, first, self._tokenizer, self._special)
            if end is None:
                running.searched = int(count[row])
            else:
                (count[row], running.text_length), found[row] = end, "stop"
        return found

    def _stream(self, count: Int[np.ndarray, " rows"], on_tokens: Callable[[int, list[int]], None]) -> None:
        tokens = np.asarray(self._batch.state.tokens)
        for row in self._rows_in_use():
            running = self._running[row]
            if running.streamed < count[row]:
                on_tokens(running.number, tokens[row, running.streamed : count[row]].tolist())
                running.streamed = int(count[row])

    def _show_pictures(self, rows: Sequence[int], count: Int[np.ndarray, " rows"]) -> dict[int, str]:
        """Prefill the pictures that rows wait for, between latent markers, and resume the rows.

        Return why answers end instead, by row: "picture" if there is no room for it, "refused" if there is none.
        """
        began, parts, ended = time.monotonic(), {}, {}
        for row in rows:
            part = self._draw_picture(row, int(count[row]))
            (ended if isinstance(part, str) else parts)[row] = part
        if not parts:
            return ended
        self._batch.prefill(parts.values())
        ends = {row: (part.first + len(part.tokens), int(part.position_ids.max()) + 1) for row, part in parts.items()}
        self._batch.start(ends, after_picture=True)
        seconds = time.monotonic() - began
        for row, part in parts.items():
            running = self._running[row]
            running.length += len(part.tokens) - 1
            running.pictures.append(part.images[0][0].vision_tokens)
            running.picture_seconds += seconds
        return ended

    def _draw_picture(self, row: int, count: int) -> Prefill | str:
        """Return the columns of the picture that a row waits for, or the reason that its answer ends instead."""
        running, special = self._running[row], self._special
        state = self._batch.state
        written, position, hidden = (np.asarray(array)[row] for array in (state.tokens, state.position, state.hidden))
        length = running.length + count - 1  # the marker has no column of its own yet
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
        room = self.settings.columns - length - (running.request.sampling.max_new_tokens - count)
        try:
            self._batch.images.check_size(image)
            if len(tokens) > room:
                raise ValueError(
                    f"picture {len(running.pictures) + 1} must take at most {room} tokens here, got {len(tokens)}"
                )
        except ValueError as error:
            running.error = str(error)
            return "picture"
        positions = self._model.geometry.position_ids(tokens, [grid], special.image_pad) + position
        chunks = plan_chunks(len(tokens), self.settings.chunks)
        return Prefill(row, tokens, positions, [(image, 2)], chunks, length, is_picture=True, hidden=tuple(hidden))

    def _read_output(self, row: int, count: int, reason: str) -> RequestOutput:
        running, special = self._running[row], self._special
        request = running.request
        tokens = np.asarray(self._batch.state.tokens)[row, :count]
        starts = np.flatnonzero(tokens == special.latent_start)
        slots = [int((part == special.latent_pad).sum()) for part in np.split(tokens, starts)[1:]]
        pictures = running.pictures + [0] * (len(starts) - len(running.pictures))
        looks = tuple(map(Look, starts.tolist(), slots, pictures))
        text = plain_text = None
        if self._tokenizer:
            texts, _ = split_at_looks(tokens, self._tokenizer, special)
            texts = texts if running.text_length is None else cut_texts(texts, running.text_length)
            text = show_text(texts, [show_look(look.slots, look.picture_tokens) for look in looks])
            plain_text = "".join(texts)
        log_probabilities = None
        if request.log_probabilities:
            log_probabilities = tuple(np.asarray(self._batch.state.log_probabilities)[row, :count].tolist())
        return RequestOutput(
            number=running.number,
            sample=running.sample,
            name=request.name,
            tokens=tuple(tokens.tolist()),
            text=text,
            looks=looks,
            stop_reason=reason,
            error=running.error,
            plain_text=plain_text,
            log_probabilities=log_probabilities,
            shared_tokens=running.shared_tokens,
            timings=Timings(running.first_token, time.monotonic() - running.started, running.picture_seconds),
            **self._read_slots(row, tokens),
        )

    def _read_slots(self, row: int, tokens: Int[np.ndarray, " count"]) -> dict[str, np.ndarray]:
        """Return what a request asks for of its slots, as fields of its output."""
        request, found = self._running[row].request, {}
        places = np.flatnonzero(tokens[:-1] == self._special.latent_pad)  # the last token was never an input
        if request.latent_vectors:
            found["latent_vectors"] = np.asarray(self._batch.state.latents)[row, places]
        if request.slot_states:  # the method has no pictures: each token has one column
            columns = len(request.prompt.tokens) + places
            found["slot_keys"], found["slot_values"] = self._batch.read_columns(row, columns)
            positions = answer_positions(tokens, request.latent_size, self._special, request.slot_positions)
            found["slot_positions"] = int(request.prompt.positions.max()) + 1 + positions[places]
        return found

    def _free(self, row: int) -> None:
        self._running[row] = None
        self._prefixes.release(row)
        self._batch.free(row)
