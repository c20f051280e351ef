"""FLOPs and memory traffic of the model, peaks of chips, and shapes of published models.

A FLOP is one multiplication or one addition. `cost_analysis()` of a compiled program counts the body of a scan once, so
FLOPs come from formulas here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ilvr_jax.method.layout import Layout
from ilvr_jax.method.objectives import OBJECTIVES
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl.images import MERGE, STILL_PATCH_DIM

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The highest rates of a device, published or measured."""

    flops: float  # per second, in products of large matrices
    bandwidth: float  # bytes per second, of its memory

    def seconds(self, flops: float, bytes_moved: float) -> float:
        """Return the least time for this arithmetic and memory traffic."""
        return max(flops / self.flops, bytes_moved / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Chip(Peaks):
    """A TPU chip, as in Google Cloud's documentation; `flops` in bfloat16."""

    memory: int  # bytes
    topologies: tuple[str, ...]


PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v5e": Chip(flops=197e12, bandwidth=819e9, memory=16 * GIB, topologies=PLANE),
    "v5p": Chip(flops=459e12, bandwidth=2765e9, memory=95 * GIB, topologies=CUBE),
    "v6e": Chip(flops=918e12, bandwidth=1640e9, memory=32 * GIB, topologies=PLANE),
}


@dataclasses.dataclass(frozen=True)
class PublishedShape:
    """The shape of a published checkpoint; names as in its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 152064
    tie_word_embeddings: bool = False
    vision_intermediate_size: int = 3420


# Held here so that nothing is fetched to count or compile them.
SHAPES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": PublishedShape(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": PublishedShape(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Qwen/Qwen2.5-VL-32B-Instruct": PublishedShape(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vision_intermediate_size=3456,
    ),
    "Qwen/Qwen2.5-VL-72B-Instruct": PublishedShape(
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vision_intermediate_size=3456,
    ),
}


def published_description(name: str) -> dict[str, Any]:
    """Return the part of a published checkpoint's config.json that defines its shape."""
    shape = dataclasses.asdict(SHAPES[name])
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": shape.pop("vision_intermediate_size"),
        "num_heads": 16,
        "window_size": 112,
        "out_hidden_size": shape["hidden_size"],
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return {
        "model_type": "qwen2_5_vl",
        **shape,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": vision,
    }


def layer_weights(config: ModelConfig) -> int:
    """Return the number of weights in the matrices of a decoder layer."""
    key_value_dim = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * config.hidden_size + 2 * key_value_dim + 3 * config.intermediate_size)


def decoder_flops(config: ModelConfig, columns: int, labelled: int, attended: float | None = None) -> float:
    """Return the FLOPs of one sample's forward pass through the decoder, with logits at `labelled` columns.

    `attended` counts the pairs of a column and one that it attends to, by default half of all (causal attention).
    """
    attended = columns**2 / 2 if attended is None else attended
    weights = config.num_hidden_layers * layer_weights(config)
    attention = 2 * config.num_hidden_layers * config.hidden_size * attended
    return 2.0 * (weights * columns + attention + labelled * config.hidden_size * config.vocab_size)


def vision_flops(config: ModelConfig, tokens: int, patch_inputs: int | None = None) -> float:
    """Return the FLOPs of the vision tower on one sample's vision tokens, padding included.

    `patch_inputs` are the numbers of a patch, by default those of all its frames.
    """
    vision = config.vision
    window_patches = (MERGE * vision.window_units) ** 2
    patches = MERGE**2 * tokens
    full = len(vision.fullatt_block_indexes)
    attention = 2 * vision.hidden_size * (full * patches + (vision.depth - full) * window_patches)
    embedding = (patch_inputs or vision.patch_dim) * vision.hidden_size
    per_patch = vision.depth * _vision_block_weights(config) + attention + embedding
    return 2.0 * patches * (per_patch + _merger_weights(config) / MERGE**2)


def _vision_block_weights(config: ModelConfig) -> int:
    vision = config.vision
    return 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size


def _merger_weights(config: ModelConfig) -> int:
    merged = MERGE**2 * config.vision.hidden_size
    return merged * (merged + config.vision.out_hidden_size)


def train_flops(
    config: ModelConfig, objective: str, train: Sequence[str], layout: Layout, rows: int, encodes: bool
) -> float:
    """Return the FLOPs of a train step: a backward pass costs two forward passes, one through frozen weights.

    The vision tower counts if the step `encodes` images; the teacher counts as one forward pass without logits.
    """
    # Every column counts as labelled: how many carry a loss depends on the records.
    forward = decoder_flops(config, layout.columns, labelled=layout.columns)
    total = forward * (3 if "decoder" in train else 2)
    if OBJECTIVES[objective].teacher:
        total += decoder_flops(config, layout.columns, labelled=0)
    if encodes:
        tokens = layout.images * layout.image_tokens + layout.segments * layout.helper_tokens
        total += vision_flops(config, tokens) * (3 if "vision" in train else 1)
    return float(rows * total)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The least arithmetic and memory traffic of a computation; activations are not counted."""

    flops: float
    reads: float  # numbers read from memory: weights, keys and values

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.reads + other.reads)


def decoder_cost(config: ModelConfig, start: int, count: int, rows: int, shared: int = 0) -> Cost:
    """Return the cost of appending `count` columns to `start` in each of `rows` rows, and of one token's logits.

    Weights are read once for all rows, as are the keys and values of the first `shared` columns.
    """
    attended = count * start + count * (count + 1) // 2
    weights = config.num_hidden_layers * layer_weights(config) + config.vocab_size * config.hidden_size
    per_column = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    reads = weights + per_column * (rows * (start - shared) + shared)
    return Cost(rows * decoder_flops(config, count, labelled=1, attended=attended), reads)


def vision_cost(config: ModelConfig, tokens: int, images: int) -> Cost:
    """Return the cost of encoding still images of this many vision tokens each, which fill their attention windows."""
    vision = config.vision
    flops = vision_flops(config, tokens, STILL_PATCH_DIM)
    blocks = vision.depth * _vision_block_weights(config)
    return Cost(images * flops, blocks + STILL_PATCH_DIM * vision.hidden_size + _merger_weights(config))
