"""Backbones and their parts."""

from collections.abc import Mapping
from typing import Any

from ilvr_jax.config.fields import choose
from ilvr_jax.config.schema import ModelSettings
from ilvr_jax.models.base import Backbone, Model
from ilvr_jax.models.qwen2_5_vl.config import model_config, model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL

BACKBONES = {
    "qwen2_5_vl": Backbone(Qwen2_5VL, model_config, model_config_from_hf),
}


def build_model(settings: ModelSettings, vocab_size: int, published: Mapping[str, Any] | None = None) -> Model:
    """Return the model of a run: of the shape in its `model` section, or of a published checkpoint's config.json.

    Raises BadConfig, listing the known ones, for another backbone, and InputError for a shape that cannot be built.
    """
    name = settings.backbone if published is None else published["model_type"]
    backbone = choose(BACKBONES, name, "model.backbone")
    return backbone.model(backbone.config(settings, vocab_size, published))
