"""The slot-aligned layout: a ragged batch whose latent slots are in the same columns for every row.

    prefix | slots_1 text | slots_2 text | ... | slots_S text | tail

The prefix holds the prompt and the first text up to `latent_start`. Each text is padded on the left, up to the slots
that follow it; the text after a row's last slots is right-aligned in all remaining text columns. Columns keep the order
of the tokens, so attention is causal by column; padding is masked as a key, and rotary positions are explicit. A sample
therefore gives the same numbers in any layout that holds it.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Int, Int8

from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.method.positions import sample_positions
from ilvr_jax.method.tokens import Role, SpecialTokens, Visibility, answer_labels, token_roles, token_visibility
from ilvr_jax.models.attention import causal_mask
from ilvr_jax.models.base import ImageGeometry, PositionIds
from ilvr_jax.models.qwen2_5_vl.images import (
    MERGE,
    STILL_PATCH_DIM,
    EncodedImage,
    FeatureBatch,
    ImageBatch,
    PatchedImage,
)
from ilvr_jax.models.qwen2_5_vl.positions import mrope_positions


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static shape of a batch; each is compiled once."""

    prefix: int  # columns of the prompt and the first text
    segments: int = 0  # latent segments
    text: int = 0  # columns of the text after each segment
    tail: int = 0  # further columns for the last text
    latent_size: int = 0  # K, slots per segment; a sample may use fewer
    images: int = 1  # user images per sample
    image_tokens: int = 1  # vision tokens per user image, the padding of the backbone's layout included
    helper_tokens: int = 1  # vision tokens per helper image

    @property
    def columns(self) -> int:
        return self.prefix + self.segments * (self.latent_size + self.text) + self.tail

    @property
    def segment_starts(self) -> Int[np.ndarray, " segments"]:
        """The column of each segment's first slot."""
        return self.prefix + np.arange(self.segments) * (self.latent_size + self.text)

    @property
    def slot_columns(self) -> Int[np.ndarray, "segments latent_size"]:
        return self.segment_starts[:, None] + np.arange(self.latent_size)

    @property
    def text_columns(self) -> Int[np.ndarray, " text_columns"]:
        return np.setdiff1d(np.arange(self.columns), self.slot_columns)

    @property
    def column_segment(self) -> Int[np.ndarray, " columns"]:
        """For each column the segment whose slots come next (`segments` after the last)."""
        if not self.segments:
            return np.zeros(self.columns, np.int32)
        ends = self.segment_starts + self.latent_size
        return np.searchsorted(ends, np.arange(self.columns), side="right").astype(np.int32)


def padded_tokens(layout: Layout) -> int:
    """Return the cost of a row of the layout: its columns plus the vision tokens that it has room for."""
    return layout.columns + layout.images * layout.image_tokens + layout.segments * layout.helper_tokens


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample as flat arrays, before it is laid out."""

    tokens: Int[np.ndarray, " time"]
    labels: Int[np.ndarray, " time"]  # the token itself where it carries loss, else -100
    roles: Int8[np.ndarray, " time"]
    visibility: Int8[np.ndarray, " time"]
    positions: Int[np.ndarray, "axes time"]
    images: tuple[PatchedImage, ...] | tuple[EncodedImage, ...]
    helper_images: tuple[PatchedImage, ...] | tuple[EncodedImage, ...]
    slot_starts: tuple[int, ...]  # index of each segment's first slot
    latent_size: int
    record: int = 0  # number of its record in the source


@flax.struct.dataclass
class Batch:
    """A batch in a slot-aligned layout. Every array has the rows as its leading axis."""

    tokens: Int[jax.Array, "rows columns"]
    targets: Int[jax.Array, "rows columns"]  # the token that follows, -100 where it carries no loss
    roles: Int8[jax.Array, "rows columns"]
    visibility: Int8[jax.Array, "rows columns"]
    positions: Int[jax.Array, "rows axes columns"]
    image_index: Int[jax.Array, "rows columns"]  # the vision token of the row that is the input, -1: none
    images: ImageBatch | FeatureBatch  # leading axes [rows, images]
    helper_images: ImageBatch | FeatureBatch  # leading axes [rows, segments]
    record: Int[jax.Array, " rows"]
    layout: Layout = flax.struct.field(pytree_node=False)

    @property
    def valid(self) -> Bool[jax.Array, "rows columns"]:
        return self.roles != Role.PADDING

    def causal_mask(self, settings: LatentsConfig) -> Bool[jax.Array, "rows columns columns"]:
        """Return which columns each column attends to, as `latents.image_visibility` has it."""
        mask = causal_mask(self.valid)
        if settings.image_visibility == "all":
            return mask
        after, before = self.visibility == Visibility.AFTER, self.visibility == Visibility.BEFORE
        return mask & ~(after[:, :, None] & before[:, None, :])

    def attention_mask(
        self, settings: LatentsConfig
    ) -> Bool[jax.Array, "rows columns"] | Bool[jax.Array, "rows columns columns"]:
        """Return the mask of whole sequences for `Model.decode`: of columns where attention is plainly causal."""
        return self.valid if settings.image_visibility == "all" else self.causal_mask(settings)


def build_sample(
    tokens: Int[np.ndarray, " time"],
    images: Sequence[PatchedImage] | Sequence[EncodedImage],
    helper_images: Sequence[PatchedImage] | Sequence[EncodedImage],
    special: SpecialTokens,
    latent_size: int,
    record: int = 0,
    position_ids: PositionIds = mrope_positions,
    slot_positions: str = "text",
) -> Sample:
    """Return the sample of a token sequence, with its roles, labels, positions and slots.

    Helper images, one per segment, may be absent where the model fills the slots itself. A picture between latent
    markers is not a segment but one of `images`. `slot_positions` is a rule of `sample_positions`.

    Raises ValueError if the slots are not runs of exactly `latent_size` between `latent_start` and `latent_end`, or
    their number is not that of the helper images.
    """
    tokens = np.asarray(tokens, np.int32)
    starts = np.flatnonzero(tokens == special.latent_start)
    pictures = np.flatnonzero(tokens == special.vision_start) - 1
    slot_starts = tuple(int(start) + 1 for start in np.setdiff1d(starts, pictures))
    for start in slot_starts:
        run = tokens[start : start + latent_size + 1]
        if list(run) != [special.latent_pad] * latent_size + [special.latent_end]:
            raise ValueError(f"the latent segment at token {start} must be {latent_size} slots and an end marker")
    if int((tokens == special.latent_pad).sum()) != len(slot_starts) * latent_size:
        raise ValueError("latent slots must be in latent segments, got some outside")
    if helper_images and len(helper_images) != len(slot_starts):
        raise ValueError(f"{len(slot_starts)} latent segments must have a helper image each, got {len(helper_images)}")
    grids = [(image.height // MERGE, image.width // MERGE) for image in images]
    return Sample(
        tokens=tokens,
        labels=answer_labels(tokens, special),
        roles=token_roles(tokens, special),
        visibility=token_visibility(tokens, special),
        positions=sample_positions(tokens, grids, slot_starts, latent_size, special, slot_positions, position_ids),
        images=tuple(images),
        helper_images=tuple(helper_images),
        slot_starts=slot_starts,
        latent_size=latent_size,
        record=record,
    )


def required_layout(sample: Sample, geometry: ImageGeometry) -> Layout:
    """Return the smallest layout that holds the sample."""
    size, starts = sample.latent_size, sample.slot_starts
    ends = [start + size for start in starts]
    texts = [following - end for end, following in zip(ends[:-1], starts[1:], strict=True)]
    text = max(texts, default=0)
    last = len(sample.tokens) - ends[-1] if starts else 0
    return Layout(
        prefix=starts[0] if starts else len(sample.tokens),
        segments=len(starts),
        text=text,
        tail=max(0, last - text),
        latent_size=size,
        images=len(sample.images),
        image_tokens=max(map(geometry.room, sample.images), default=0),
        helper_tokens=max(map(geometry.room, sample.helper_images), default=0),
    )


def merge_layouts(layouts: Sequence[Layout]) -> Layout:
    """Return the smallest layout that holds every sample that one of `layouts` holds.

    A row's last text may begin in any segment, and a row without slots uses all text columns.
    """
    widest = {
        field.name: max(getattr(layout, field.name) for layout in layouts)
        for field in dataclasses.fields(Layout)
        if field.name != "tail"
    }
    last = max(layout.text + layout.tail if layout.segments else 0 for layout in layouts)
    flat = max((layout.prefix for layout in layouts if not layout.segments), default=0)
    prefix = max((layout.prefix for layout in layouts if layout.segments), default=flat)
    text_columns = prefix + widest["segments"] * widest["text"]
    tail = max(0, last - widest["text"], flat - text_columns)
    return Layout(**{**widest, "prefix": prefix}, tail=tail)


def fits(sample: Sample, layout: Layout, geometry: ImageGeometry) -> bool:
    """Return whether the layout holds the sample."""
    need = required_layout(sample, geometry)
    if need.images > layout.images or need.image_tokens > layout.image_tokens:
        return False
    if not need.segments:
        return need.prefix <= len(layout.text_columns)
    last = len(sample.tokens) - sample.slot_starts[-1] - sample.latent_size
    between = need.text if need.segments > 1 else 0
    return (
        need.latent_size <= layout.latent_size
        and need.segments <= layout.segments
        and need.helper_tokens <= layout.helper_tokens
        and need.prefix <= layout.prefix
        and between <= layout.text
        and last <= (layout.segments - need.segments + 1) * layout.text + layout.tail
    )


def sample_columns(sample: Sample, layout: Layout) -> Int[np.ndarray, " time"]:
    """Return the column of each of the sample's tokens.

    Raises ValueError if the layout has too few segments, slots or text columns.
    """
    size, starts = sample.latent_size, layout.segment_starts
    if len(sample.slot_starts) > layout.segments:
        raise ValueError(f"a sample must have at most {layout.segments} latent segments, got {len(sample.slot_starts)}")
    if sample.slot_starts and size > layout.latent_size:
        raise ValueError(f"a latent segment must have at most {layout.latent_size} slots, got {size}")
    columns = np.empty(len(sample.tokens), np.int32)
    index, first_free = 0, 0
    for segment, start in enumerate(sample.slot_starts):
        count = start - index
        columns[index : start + size] = np.arange(starts[segment] - count, starts[segment] + size)
        room = starts[segment] - first_free
        if count > room:
            raise ValueError(f"text {segment + 1} must have at most {room} tokens, got {count}")
        index, first_free = start + size, starts[segment] + layout.latent_size
    remaining = layout.text_columns[layout.text_columns >= first_free]
    count = len(sample.tokens) - index
    if count > len(remaining):
        raise ValueError(f"the last text must have at most {len(remaining)} tokens, got {count}")
    columns[index:] = remaining[len(remaining) - count :]
    return columns


NO_IMAGE = PatchedImage(np.zeros((0, STILL_PATCH_DIM), np.uint8), 0, 0)


def collate(
    samples: Sequence[Sample],
    layout: Layout,
    special: SpecialTokens,
    geometry: ImageGeometry,
    no_image: PatchedImage | EncodedImage = NO_IMAGE,
) -> Batch:
    """Return samples laid out as one batch of numpy arrays.

    All images are of one kind, patched or encoded: that of `no_image`, which is used if the batch has no images.

    Raises ValueError if a sample does not fit the layout.
    """
    rows, columns = len(samples), layout.columns
    tokens = np.full((rows, columns), special.pad, np.int32)
    targets = np.full((rows, columns), -100, np.int32)
    roles, visibility = np.zeros((2, rows, columns), np.int8)
    axes = samples[0].positions.shape[0] if samples else 3
    positions = np.zeros((rows, axes, columns), np.int32)
    image_index = np.full((rows, columns), -1, np.int32)
    for row, sample in enumerate(samples):
        place = sample_columns(sample, layout)
        tokens[row, place] = sample.tokens
        targets[row, place[:-1]] = sample.labels[1:]
        roles[row, place] = sample.roles
        visibility[row, place] = sample.visibility
        positions[row][:, place] = sample.positions
        features = [
            number * layout.image_tokens + np.arange(image.vision_tokens) for number, image in enumerate(sample.images)
        ]
        image_index[row, place[sample.roles == Role.IMAGE]] = np.concatenate([np.zeros(0, int), *features])
    kind = next((image for sample in samples for image in (*sample.images, *sample.helper_images)), no_image)

    def stack(name: str, per_row: int, room: int) -> ImageBatch | FeatureBatch:
        return geometry.stack([getattr(sample, name) for sample in samples], per_row, room, kind)

    return Batch(
        tokens=tokens,
        targets=targets,
        roles=roles,
        visibility=visibility,
        positions=positions,
        image_index=image_index,
        images=stack("images", layout.images, layout.image_tokens),
        helper_images=stack("helper_images", layout.segments, layout.helper_tokens),
        record=np.array([sample.record for sample in samples], np.int32),
        layout=layout,
    )
