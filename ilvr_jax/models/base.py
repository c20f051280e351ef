"""The interface of a backbone: of its models, and of how images lie in their batches.

To add one, write a package beside `qwen2_5_vl` and name its `Backbone` in `models.BACKBONES`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from ilvr_jax.config.schema import ModelSettings
from ilvr_jax.models.attention import KVCache

# From token ids [time], height and width in vision tokens of each image in order, and the id of an image's token:
# the position of each token [axes, time]. Raises ValueError if tokens and images do not match.
PositionIds = Callable[[Int[np.ndarray, " time"], Sequence[tuple[int, int]], int], Int[np.ndarray, "axes time"]]


class ImageGeometry(Protocol):
    """The layout of images in batches, on the host. It can be pickled: grain's workers get copies of it.

    The pipeline and the buckets count vision tokens alone; whatever else a vision tower needs, such as windows, is
    derived here.
    """

    position_ids: PositionIds

    def room(self, image: Any) -> int:
        """Return the vision tokens that an image takes in a batch, padding included."""

    def stack(self, images: Sequence[Sequence[Any]], per_row: int, tokens: int, like: Any) -> PyTree:
        """Return ragged lists of images as arrays with leading axes [rows, per_row], each padded to `tokens`.

        `like` has the kind (patches, or features from the tower), the channels and the dtype of all images. Raises
        ValueError if a list or an image does not fit.
        """


class Model(Protocol):
    """A backbone of a given shape: pure functions of parameters {"vision": ..., "decoder": ...}.

    Where a decoder adds features of images in several of its layers (Qwen3-VL), `encode_images` returns them side by
    side as further channels, `embed` places them with the first ones, and `decode` takes them apart; slots leave the
    further channels zero.
    """

    # A frozen dataclass with hidden_size, vocab_size, num_hidden_layers, num_key_value_heads, head_dim, dtype, lora,
    # slot_input, ...
    config: Any

    @property
    def geometry(self) -> ImageGeometry:
        """How images lie in batches."""

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Return fresh float32 parameters."""

    def encode_images(self, vision: PyTree, images: PyTree) -> Float[Array, "*images units channels"]:
        """Return the vision tokens of what `geometry.stack` laid out, in raster order, padding last."""

    def embed(
        self,
        decoder: PyTree,
        tokens: Int[Array, "rows columns"],
        image_index: Int[Array, "rows columns"] | None = None,
        features: Float[Array, "rows images units channels"] | None = None,
    ) -> Float[Array, "rows columns channels"]:
        """Return the inputs of the decoder: token embeddings, and image features where `image_index` >= 0."""

    def decode(
        self,
        decoder: PyTree,
        inputs_embeds: Float[Array, "rows columns channels"],
        position_ids: Int[Array, "rows axes columns"],
        attention_mask: Bool[Array, "rows columns"] | Bool[Array, "rows columns keys"],
        past: Sequence[PyTree] | KVCache = (),
        dropout_keys: Key[Array, "rows columns"] | None = None,
    ) -> tuple[Float[Array, "rows columns channels"], PyTree]:
        """Return final hidden states, and these columns' keys and values.

        Without a past, `attention_mask` marks the columns that are not padding. With parts of a past, as returned
        before, its keys are their columns and then the present ones; with a KVCache it is the mask among the present
        columns.
        """

    def attention_weights(
        self,
        decoder: PyTree,
        inputs_embeds: Float[Array, "rows columns channels"],
        position_ids: Int[Array, "rows axes columns"],
        attention_mask: Bool[Array, "rows columns"] | Bool[Array, "rows columns columns"],
        queries: Int[np.ndarray, " queries"],
        layers: int,
    ) -> Float[Array, "rows layers heads queries columns"]:
        """Return the weights with which some columns attend to all, float32, in the last layers (all if fewer).

        They are exactly 0 where the mask, that of whole sequences as `decode` has it, hides a column. Only pages of
        answers need them.
        """

    def logits(self, decoder: PyTree, hidden_states: Float[Array, "*batch channels"]) -> Float[Array, "*batch vocab"]:
        """Return float32 logits."""

    def shift_keys(
        self, keys: Float[Array, "*batch key_value_heads head_dim"], shift: Int[Array, "*batch"]
    ) -> Float[Array, "*batch key_value_heads head_dim"]:
        """Return keys of text-like positions (equal on all axes) as they would be `shift` positions later.

        Of a shift by 0 they are the same to the last bit.
        """

    def last_projections(
        self, decoder: PyTree, hidden_states: Float[Array, "rows columns channels"]
    ) -> tuple[Array, Array]:
        """Return `hidden_states` under the last layer's query and key projections, for selection."""


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A kind of model, under the `model_type` of its published checkpoints.

    Attributes:
        model: makes the model of a config; the config is a frozen dataclass.
        config: returns the config for the `model` section of a run, the rows of its vocabulary and, for a run that
            begins from a published checkpoint, the content of its config.json.
        config_from_published: returns the config for the content of a config.json alone; keywords replace fields.
    """

    model: Callable[[Any], Model]
    config: Callable[[ModelSettings, int, Mapping[str, Any] | None], Any]
    config_from_published: Callable[..., Any]
