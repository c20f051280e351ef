"""The parts of a training run."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from ilvr_jax.data.pipeline import Source
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages of a run share."""

    config: ConfigDict
    workdir: Path
    source: Source
    evaluation_source: Source | None
    tokenizer: PreTrainedTokenizerFast
    special: SpecialTokens
    model: Qwen2_5VL
    mesh: Mesh
    steps: Mapping[str, tuple[optax.GradientTransformation, Callable]]  # each stage's optimizer and train step
    progress: Progress
