"""A model loaded for use: from a run, or a Qwen2.5-VL from the Hugging Face hub or a folder."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, UInt32
from transformers import PreTrainedTokenizerFast

from ilvr_jax.checkpoints.adapters import is_adapter
from ilvr_jax.checkpoints.pretrained import IMAGE_PROCESSOR, open_pretrained
from ilvr_jax.checkpoints.runs import choose_stage, restore_run
from ilvr_jax.checkpoints.weights import load_params
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import LatentsConfig, RunConfig
from ilvr_jax.config.workdir import read_config
from ilvr_jax.data.examples import ExampleSettings
from ilvr_jax.data.images import image_processor_settings
from ilvr_jax.data.sources import prompt_settings
from ilvr_jax.data.tokenizer import special_tokens
from ilvr_jax.files import read_json
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import Model
from ilvr_jax.models.tensor_files import BadCheckpoint

SYSTEM = "You are a helpful assistant."  # the system message of Qwen2.5-VL's chat template
HASH_FACTORS = (np.uint32(0x9E3779B1), np.uint32(0x85EBCA77))  # odd, with bits that are spread (xxHash's primes)


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its parameters, tokenizer and prompt settings; a published one is of no run."""

    model: Model
    params: PyTree
    tokenizer: PreTrainedTokenizerFast
    special: SpecialTokens
    prompts: ExampleSettings  # of prompts, latent_size included
    looks: bool  # False for a checkpoint without latent tokens, which has not been trained to look
    config: RunConfig | None = None
    stage: str | None = None
    step: int | None = None

    @property
    def look_fields(self) -> dict[str, Any]:
        """The fields of a Request with which the model looks as it was trained to."""
        latents = self.config.latents if self.config else LatentsConfig()
        shared = {name: getattr(latents, name) for name in ("image_visibility", "slot_positions")}
        return {"latent_size": self.prompts.latent_size, **shared}

    def digest(self) -> str:
        """Return a digest of everything that answers depend on: parameters, tokenizer, shape and prompt settings.

        Of several processes that hold the parameters together, all must call it.
        """
        digest = hashlib.sha256(repr((self.model.config, self.special, self.prompts)).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        for (path, leaf), values in zip(leaves, weighted_sums([leaf for _, leaf in leaves]), strict=True):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {values}".encode())
        return digest.hexdigest()[:16]


def weighted_sums(arrays: Sequence[Array]) -> list[list[int]]:
    """Return two sums of each array's bits, as whole numbers with odd weights modulo 2**32.

    They are computed where the arrays are, and are the same for every sharding and in every process.
    """
    sharding = getattr(arrays[0], "sharding", None) if arrays else None
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return np.asarray(jax.jit(_all_sums, out_shardings=everywhere)(arrays)).tolist()


def _all_sums(arrays: Sequence[Array]) -> UInt32[Array, "arrays 2"]:
    return jnp.array([_sums(array) for array in arrays], jnp.uint32)


def _sums(array: Array) -> UInt32[Array, " 2"]:
    """Return the two sums of an array; the weight of a place is a hash of its indices."""
    bits = array if array.dtype == bool else jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    bits, sums = bits.astype(jnp.uint32), []
    for factor in HASH_FACTORS:
        place = jnp.full(bits.shape, factor, jnp.uint32)
        for axis in range(bits.ndim):
            place = (place ^ jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)) * factor
            place ^= place >> 15
        sums.append((bits * (place | 1)).sum(dtype=jnp.uint32))
    return jnp.stack(sums)


def load_model(
    checkpoint: str, stage: str | None = None, dtype: str | None = None, mesh: Mesh | None = None
) -> TrainedModel:
    """Load the model of a workdir, by default after its last stage, or of a published checkpoint.

    `dtype` is that of parameters and activations, by default the run's or the checkpoint's own; the mesh is by default
    one device. Raises BadConfig, NoCheckpoint or BadCheckpoint if it cannot be loaded.
    """
    if not checkpoint:  # as a path it would be the current folder
        raise BadConfig("the checkpoint must be a folder or a name on the hub, got ''")
    folder = Path(checkpoint)
    if folder.is_dir() and not is_adapter(folder) and not is_published(folder):
        config = read_config(folder)
        if dtype:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
        stage = choose_stage(folder, config, stage)
        step, model, *parts = restore_run(folder, config, stage, mesh)
        prompts = prompt_settings(config, model.geometry)
        return TrainedModel(model, *parts, prompts, True, config, stage, step)
    if stage is not None:
        raise BadConfig(f"--stage must not be given for {checkpoint}, which is not a run, got {stage!r}")
    pretrained = open_pretrained(checkpoint)
    config = pretrained.model_config(dtype=dtype or pretrained.dtype)
    bounds = {}
    if any((pretrained.folder / name).is_file() for name in IMAGE_PROCESSOR):
        processor = image_processor_settings(pretrained.folder)
        bounds = {key: processor[key] for key in ("min_pixels", "max_pixels")}
    model = pretrained.backbone.model(config)
    params = load_params(pretrained, config, config.dtype, jax.random.key(0), mesh)
    return TrainedModel(
        model,
        params,
        pretrained.tokenizer,
        special_tokens(pretrained.tokenizer, pretrained.stop),
        ExampleSettings(
            latent_size=LatentsConfig().latent_size,
            system=SYSTEM,
            position_ids=model.geometry.position_ids,
            **bounds,
        ),
        not pretrained.missing,
    )


def is_published(folder: Path) -> bool:
    """Return whether a folder is a published checkpoint; raises BadCheckpoint if its config.json cannot be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadCheckpoint(f"{folder} must be the workdir of a run or a published checkpoint, but has no config.json")
    fields = read_json(path, BadCheckpoint)
    return isinstance(fields, dict) and "model_type" in fields
