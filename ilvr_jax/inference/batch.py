"""The rows of an engine on the device: parameters, cache, decode state and images, and the calls that change them."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import with_logical_constraint
from jaxtyping import Array, Int, PyTree

from ilvr_jax.inference.decode import (
    DecodeState,
    chunk_margin,
    copy_prompt,
    decode_steps,
    init_decode_state,
    insert,
    prefill,
    request_row,
    start,
)
from ilvr_jax.inference.image_cache import ImageCache, place_features
from ilvr_jax.inference.kv_cache import init_kv_cache, read_columns
from ilvr_jax.inference.requests import Picture, Request
from ilvr_jax.inference.sizes import EngineSettings, group_sizes
from ilvr_jax.method.layout import NO_IMAGE
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import Model
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.models.qwen2_5_vl.decoder import split_layers
from ilvr_jax.models.sharding import check_mesh, divisor, replicate


@dataclasses.dataclass
class Prefill:
    """Columns of a row that are to be prefilled, chunk by chunk."""

    row: int
    tokens: Int[np.ndarray, " columns"]
    position_ids: Int[np.ndarray, "3 columns"]
    images: Sequence[tuple[Picture, int]]  # each with the first of its columns
    chunks: list[tuple[int, int, int]]  # those left, as from `plan_chunks`
    first: int = 0  # the column of the row that tokens begin at
    is_picture: bool = False  # of a look, and not a prompt
    hidden: tuple[int, int] = (0, 0)  # columns that are hidden from the text after it, as in DecodeState


class DecodeBatch:
    """Rows that are filled, decoded and freed one by one.

    On one CPU or GPU it holds a copy of the decoder's parameters layer by layer, and elsewhere only of those that are
    not in the model's dtype. On a mesh it is made and used inside `sharding.on_mesh`.

    Raises ValueError if the mesh does not divide the model or the rows.

    Attributes:
        state: of all rows, `DecodeState`.
        images: the vision tokens of images.
    """

    def __init__(self, model: Model, params: PyTree, special: SpecialTokens, settings: EngineSettings):
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            check_mesh(mesh, model.config)
        if settings.rows % divisor("rows"):
            raise ValueError(
                f"rows must be a multiple of {divisor('rows')}, the devices that share them, got {settings.rows}"
            )
        self._model, self._special, self._settings = model, special, settings
        vision = jax.tree_util.tree_map_with_path(self._in_dtype, params["vision"])
        self._decoder = jax.tree_util.tree_map_with_path(self._in_dtype, decoder_params(params))
        self._split = mesh.size <= 1 and jax.default_backend() != "tpu"
        if self._split:
            self._decoder = split_layers(self._decoder, settings.rows > 1 and jax.default_backend() == "cpu")
        self.images = ImageCache(model, vision, settings.image_tokens)
        self._groups = group_sizes(settings)
        self._idle_row = jax.tree.map(np.asarray, self._init_state(1))
        self.empty()

    def _in_dtype(self, path: tuple[Any, ...], leaf: Array) -> Array:
        """Return a matrix in the dtype it is multiplied in, so that it is not cast for every token.

        That of the patch embedding stays as it is: it is first summed, in its own dtype.
        """
        matrix = path[-1].key in ("kernel", "embed_tokens", "lm_head", "a", "b") and path[0].key != "patch_embed"
        dtype = self._model.config.dtype
        return leaf.astype(dtype) if matrix and leaf.dtype != dtype else leaf

    def _init_state(self, rows: int) -> DecodeState:
        return init_decode_state(self._model, rows, self._settings)

    def empty(self) -> None:
        """Make all rows new, without a request or a prompt."""
        model, settings = self._model, self._settings
        self.state = self._init_state(settings.rows)
        self._kv_cache = init_kv_cache(model, settings.rows, settings.columns, self._split)
        channels, dtype = model.config.hidden_size, model.config.dtype
        # Room on both sides, so that an image may begin before a chunk and end after it.
        places = settings.chunks[-1] + 2 * max(settings.image_tokens, default=0)
        self._vision_inputs = _zeros((self._groups[-1], places, channels), dtype, rows=self._groups == (settings.rows,))
        # The last hidden state of each row's prompt, which later prompts may share, and (True) of its last picture.
        self._last_hidden = {is_picture: _zeros((settings.rows, channels), dtype) for is_picture in (False, True)}

    @property
    def is_lost(self) -> bool:
        """Whether an exception (Ctrl-C) hit a call that had donated arrays."""
        arrays = (self.state, self._kv_cache, self._vision_inputs, self._last_hidden)
        return any(array.is_deleted() for array in jax.tree.leaves(arrays))

    def warm_up(self) -> None:
        """Compile all that requests can need."""
        for tokens in self._settings.image_tokens:
            self._place(self.images.encode(NO_IMAGE, tokens), 0, 0)
        for size in self._settings.chunks:
            for slots in self._groups:
                self._prefill_group([], size, slots, False)
        self.copy_prompt(0, 0)
        self.free(0)
        self.start({})
        self.decode(1, 1)
        if self._settings.slot_states:
            self.read_columns(0, np.zeros(0, np.int32))
        jax.block_until_ready(self.state)

    def prefill(self, parts: Collection[Prefill]) -> None:
        """Prefill all chunks of some rows, those of one size together."""
        while waiting := [part for part in parts if part.chunks]:
            first = waiting[0]
            size, of_picture = first.chunks[0][2], first.is_picture
            group = [part for part in waiting if part.chunks[0][2] == size and part.is_picture == of_picture]
            # With batch_invariant each is alone, also in a group of all rows.
            group = group[: 1 if self._settings.batch_invariant else self._groups[-1]]
            slots = next(slots for slots in self._groups if slots >= len(group))
            self._prefill_group(group, size, slots, of_picture)

    def _prefill_group(self, group: Sequence[Prefill], size: int, slots: int, of_picture: bool) -> None:
        """Prefill the next chunk, of one size, of up to `slots` rows; a group of all rows has them in their order."""
        whole, margin = slots == self._settings.rows, chunk_margin(self._vision_inputs, size)
        tokens, position_ids = np.zeros((slots, size), np.int32), np.zeros((slots, 3, size), np.int32)
        starts, counts = np.zeros((2, slots), np.int32)
        hidden = np.zeros((slots, 2), np.int32)
        rows = np.full(slots, self._settings.rows, np.int32)  # out of range
        for slot, part in enumerate(group):
            slot = part.row if whole else slot
            first, count, _ = part.chunks.pop(0)
            rows[slot], starts[slot], counts[slot], hidden[slot] = part.row, part.first + first, count, part.hidden
            tokens[slot, :count] = part.tokens[first : first + count]
            position_ids[slot, :, :count] = part.position_ids[:, first : first + count]
            for image, column in part.images:
                if column < first + count and column + image.vision_tokens > first:
                    self._place(self.images.features(image), slot, margin + column - first)
        self._kv_cache, self._last_hidden[of_picture] = prefill(
            self._model,
            self._decoder,
            self._kv_cache,
            self._last_hidden[of_picture],
            self._vision_inputs,
            None if whole else rows,
            tokens,
            position_ids,
            starts,
            counts,
            hidden,
            self._special,
        )

    def _place(self, features: Array, slot: int, place: int) -> None:
        self._vision_inputs = place_features(self._vision_inputs, features, np.int32(slot), np.int32(place))

    def copy_prompt(self, source: int, row: int) -> None:
        """Copy the columns of row `source`, and the last hidden state of its prompt, to another row."""
        self._kv_cache, self._last_hidden[False] = copy_prompt(
            self._kv_cache, self._last_hidden[False], np.int32(source), np.int32(row)
        )

    def insert(self, row: int, request: Request, seed: int) -> None:
        """Give a row the settings of a request."""
        self.state = insert(self.state, np.int32(row), request_row(self._idle_row, request, seed, self._special))

    def free(self, row: int) -> None:
        """Make a row idle; its columns stay."""
        self.state = insert(self.state, np.int32(row), self._idle_row)

    def start(self, ends: Mapping[int, tuple[int, int]], after_picture: bool = False) -> None:
        """Let rows write the token after their prompts, or pictures, and wait for it.

        `ends` are the number of a row's columns and the position of the next, by row.
        """
        starting = np.zeros(self._settings.rows, bool)
        columns, position = np.zeros((2, self._settings.rows), np.int32)
        for row, end in ends.items():
            starting[row], (columns[row], position[row]) = True, end
        lengths, self.state = start(
            self._model,
            self._decoder,
            self._kv_cache.lengths,
            self.state,
            self._last_hidden[after_picture],
            starting,
            columns,
            position,
            self._special,
        )
        self._kv_cache = self._kv_cache._replace(lengths=lengths)
        jax.block_until_ready(self.state.count)

    def decode(self, steps: int, most_stopped: int) -> None:
        """Let running rows write up to `steps` tokens, fewer if `most_stopped` rows stop."""
        self._kv_cache, self.state = decode_steps(
            self._model,
            self._decoder,
            self._kv_cache,
            self.state,
            np.int32(steps),
            np.int32(most_stopped),
            self._special,
        )

    def read_columns(self, row: int, columns: Int[np.ndarray, " some"]) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys and values of some columns of a row, each [layers, columns, key_value_heads, head_dim]."""
        padded = np.zeros(self._settings.max_new_tokens, np.int32)
        padded[: len(columns)] = columns
        keys, values = read_columns(self._kv_cache, np.int32(row), padded)
        return np.asarray(keys)[:, : len(columns)], np.asarray(values)[:, : len(columns)]


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "rows"))
def _zeros(shape: tuple[int, ...], dtype: str, rows: bool = False) -> Array:
    """Return zeros, on a mesh whole on each device, or with `rows` sharded by rows."""
    zeros = jnp.zeros(shape, dtype)
    return with_logical_constraint(zeros, ("rows", *[None] * (zeros.ndim - 1))) if rows else replicate(zeros)
