"""The parts of a training run."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from ilvr_jax.config.fields import BadConfig, choose
from ilvr_jax.config.schema import RunConfig
from ilvr_jax.data.pipeline import Source
from ilvr_jax.errors import quote
from ilvr_jax.evaluation.records import EvaluationRecords
from ilvr_jax.method.objectives import OBJECTIVES
from ilvr_jax.method.selection import SELECTORS
from ilvr_jax.method.slots import SLOT_INPUTS
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models import BACKBONES
from ilvr_jax.models.base import Model
from ilvr_jax.progress import Progress
from ilvr_jax.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts that the stages of a run share."""

    config: RunConfig
    workdir: Path
    source: Source
    evaluation_records: EvaluationRecords | None
    tokenizer: PreTrainedTokenizerFast
    special: SpecialTokens
    model: Model
    mesh: Mesh
    steps: Mapping[str, tuple[optax.GradientTransformation, Callable]]  # each stage's optimizer and train step
    progress: Progress


def check_choices(config: RunConfig) -> None:
    """Raise BadConfig for a name that no table has, listing those it has, and a stage that its objective refuses."""
    choose(SELECTORS, config.latents.selection, "latents.selection")
    choose(SLOT_INPUTS, config.model.slot_input, "model.slot_input")
    if config.model.slot_input == "placed" and config.latents.slot_positions == "text":
        raise BadConfig("`latents.slot_positions` must be grid or turning_grid with model.slot_input placed, got text")
    choose(BACKBONES, config.model.backbone, "model.backbone")
    choose(TASKS, config.eval.task, "eval.task")
    for name, stage in config.stages.items():
        objective = choose(OBJECTIVES, stage.objective, f"{name}.objective")
        accepted, given = objective.helper_images, f"objective {stage.objective}, got {quote(stage.helper_images)}"
        if stage.helper_images not in accepted:
            raise BadConfig(f"`{name}.helper_images` must be one of {', '.join(accepted)} with {given}")
        parts = (config.decoder_part,) if objective.teacher else ("vision", config.decoder_part)  # it shares the tower
        if not set(stage.train) <= set(parts):
            of = f" with objective {stage.objective}" * objective.teacher
            raise BadConfig(f"`{name}.train` must name only {', '.join(parts)}{of}, got {', '.join(stage.train)}")
