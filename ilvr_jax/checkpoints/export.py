"""Export of runs as folders in the Hugging Face layout: whole models for transformers and vLLM, adapters for PEFT."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

from ilvr_jax.checkpoints.converted import SOURCE, is_converted, read_nested
from ilvr_jax.checkpoints.pretrained import COPIED, IMAGE_PROCESSOR, names_adapter, open_pretrained, read_published
from ilvr_jax.checkpoints.runs import PRETRAINED, RestoredRun, restore_run, restore_teacher
from ilvr_jax.checkpoints.stop_tokens import GENERATION, generation_config, read_generation_config, set_stop_tokens
from ilvr_jax.checkpoints.weights import load_params
from ilvr_jax.config.experiments import resolve_path
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import LoraConfig, RunConfig
from ilvr_jax.config.workdir import read_config
from ilvr_jax.data.examples import chat_template
from ilvr_jax.data.tokenizer import special_tokens
from ilvr_jax.files import check_new_folder, copy, new_folder, read_object, write_json
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.lora import SUFFIX, merge_adapters
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig
from ilvr_jax.models.qwen2_5_vl.published import described_scaling, published_dtype
from ilvr_jax.models.qwen2_5_vl.weights import state_dict_from_params
from ilvr_jax.models.tensor_files import BadCheckpoint, write_tensors


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A whole model to be written in the Hugging Face layout."""

    params: PyTree
    config: ModelConfig
    tokenizer: PreTrainedTokenizerFast
    special: SpecialTokens
    ends: Sequence[int]  # ids that end an answer
    description: Path  # the folder of the files that are copied
    hf_config: Mapping[str, Any]  # the config.json that is adapted
    nested: bool  # whether tensors get nested names
    latent_size: int | None = None  # slots per look, written into config.json


def export(
    source: Path, destination: Path, stage: str | None, dtype: str | None, teacher: bool, lora: str | None
) -> None:
    """Write the model of a run, a converted folder or an adapter on its base as a published checkpoint.

    `stage` is by default the last with a checkpoint, `dtype` that of the checkpoint that the run began from. `lora` is
    what to do with adapters: "merge" them into the weights, or write an "adapter", a PEFT folder of them alone.

    Raises BadConfig and NoCheckpoint if the run or its stage does not fit the arguments, and InputError and OSError as
    `new_folder` does.
    """
    check_new_folder(destination)
    if is_converted(source) or names_adapter(source):
        if teacher or lora or stage:
            raise BadConfig(
                f"--teacher, --stage, --adapter and --merge-lora must not be given for {source}, which is not a run"
            )
        write_model(from_pretrained(source, dtype), destination, dtype)
        return
    config = read_config(source)
    if (slot_input := config.model.slot_input) != "hidden":
        raise BadConfig(
            f"`model.slot_input` of {source} must be hidden for an export, since the published layout has no other "
            f"rule, got {slot_input}"
        )
    run = restore_run(source, config, stage)
    if teacher:
        run = run._replace(params={**run.params, **restore_teacher(source, config, stage)})
    run.tokenizer.eos_token = "<|im_end|>"  # with which answers end in training
    if not config.model.init_from:
        run.tokenizer.chat_template = chat_template(config.data.system)
    has_adapters = "adapters" in run.params
    if has_adapters and lora is None:
        raise BadConfig(f"{source} trained LoRA adapters; give --merge-lora or --adapter")
    if lora and not has_adapters:
        raise BadConfig(f"{source} has no LoRA adapters; export it without --merge-lora and --adapter")
    if lora == "adapter":
        base = adapter_base(source, config)
        with new_folder(destination):
            write_adapter(run.params["adapters"], run.model.config.lora, base, destination)
            run.tokenizer.save_pretrained(destination)
        return
    if has_adapters:
        run = run._replace(params=merge_adapters(run.params, run.model.config.lora))
    write_model(from_run(source, config, run), destination, dtype)


def from_pretrained(source: Path, dtype: str | None) -> ExportedModel:
    """Load a converted folder or an adapter on its base for export."""
    pretrained = open_pretrained(source)
    config = pretrained.model_config()
    special = special_tokens(pretrained.tokenizer, pretrained.stop)
    return ExportedModel(
        params=load_params(pretrained, config, dtype or pretrained.dtype, jax.random.key(0)),
        config=config,
        tokenizer=pretrained.tokenizer,
        special=special,
        ends=pretrained.stop or special.ends,
        description=pretrained.folder,
        hf_config=pretrained.hf_config,
        nested=pretrained.nested,
    )


def from_run(source: Path, config: RunConfig, run: RestoredRun) -> ExportedModel:
    """Return the model of a run, without adapters, for export."""
    description = source / PRETRAINED
    return ExportedModel(
        params=run.params,
        config=run.model.config,
        tokenizer=run.tokenizer,
        special=run.special,
        ends=run.special.ends,
        description=description,
        hf_config=read_published(description) if config.model.init_from else published_config(run.model.config),
        nested=(description / SOURCE).is_file() and read_nested(description),
        latent_size=config.latents.latent_size,
    )


def adapter_base(source: Path, config: RunConfig) -> str:
    """Return the name of the model that a run's adapters are for, empty for a run from fresh parameters."""
    base, facts = config.model.init_from, source / PRETRAINED / SOURCE
    if base and facts.is_file():
        base = read_object(facts, BadCheckpoint).get("base", base)
    if config.model.init_from and not base:
        raise BadConfig(
            f"--merge-lora must be given for {source}, not --adapter: it began from an adapter merged into its base, "
            "which no folder holds as a model that an adapter could be for"
        )
    return base


def write_model(model: ExportedModel, destination: Path, dtype: str | None) -> None:
    """Write a model as a new folder in the Hugging Face layout, by default in the dtype of its config.json."""
    config, special = model.config, model.special
    dtype = dtype or published_dtype(model.hf_config) or "float32"
    with new_folder(destination):
        write_tensors(state_dict_from_params(model.params, config, dtype, model.nested), destination)
        model.tokenizer.save_pretrained(destination)
        for name in COPIED:
            if (model.description / name).is_file():
                copy(model.description / name, destination / name)
        if not any((destination / name).is_file() for name in IMAGE_PROCESSOR):
            write_json(destination / "preprocessor_config.json", image_processor(config))
        published = read_generation_config(model.description)
        write_json(destination / GENERATION, generation_config(published, model.ends, special.pad, config.vocab_size))
        hf_config = with_tokens(model.hf_config, config.vocab_size, special, model.ends, dtype, model.latent_size)
        write_json(destination / "config.json", hf_config)


def with_tokens(
    published: Mapping[str, Any],
    vocabulary: int,
    special: SpecialTokens,
    ends: Sequence[int],
    dtype: str,
    latent_size: int | None,
) -> dict[str, Any]:
    """Return a config.json with the sizes and token ids of a run; latent fields have the names of Mirage and ILVR."""
    described = json.loads(json.dumps(published))
    for section in (described, described.get("text_config") or {}):
        for key in ("vocab_size", "dtype", "torch_dtype"):
            if key in section:
                section[key] = vocabulary if key == "vocab_size" else dtype
    set_stop_tokens(described, ends, special.pad, vocabulary)
    described |= {
        "image_token_id": special.image_pad,
        "vision_start_token_id": special.vision_start,
        "vision_end_token_id": special.vision_end,
        "latent_start_id": special.latent_start,
        "latent_token_id": special.latent_pad,
        "latent_end_id": special.latent_end,
    }
    return described | ({"latent_size": latent_size} if latent_size else {})


def published_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model with fresh parameters."""
    vision = dataclasses.asdict(config.vision)
    for name in ("image_mean", "image_std", "patch_init_std"):
        del vision[name]
    text = {
        name: getattr(config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
        )
    }
    rope = {"rope_theta": config.rope_theta, "mrope_section": list(config.mrope_section)}
    rope |= described_scaling(config.rope_scaling)
    described = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": config.tie_word_embeddings},
        vision_config=vision,
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    return {**described.to_dict(), "dtype": "float32"}


def image_processor(config: ModelConfig) -> dict[str, Any]:
    """Return the preprocessor_config.json of a model with fresh parameters, in practice without a bound on sizes."""
    vision = config.vision
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": 2,
        "min_pixels": (2 * vision.patch_size) ** 2,
        "max_pixels": 2**24,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def write_adapter(adapters: PyTree, lora: LoraConfig, base: str, destination: Path) -> None:
    """Write adapters as PEFT does, with the module names of transformers from version 4.52 on."""
    tensors = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(adapters)[0]:
        *modules, matrix = [key.key.removesuffix(SUFFIX) for key in keys]
        inside = ["self_attn", *modules[1:]] if modules[-1] in ("q_proj", "k_proj", "v_proj", "o_proj") else modules[1:]
        for layer in range(leaf.shape[0]):
            module = ".".join(["base_model.model.model.language_model.layers", str(layer), *inside])
            tensors[f"{module}.lora_{matrix.upper()}.weight"] = np.ascontiguousarray(np.asarray(leaf[layer]).T)
    save_file(tensors, destination / "adapter_model.safetensors", metadata={"format": "pt"})
    folder = resolve_path(base) if base else Path()
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder.absolute()) if base and folder.is_dir() else base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        # The vision tower has layers of the same names, so the decoder's are spelt out.
        "target_modules": rf".*language_model\.layers\.\d+\..*\.({'|'.join(lora.targets)})",
        "bias": "none",
        "inference_mode": True,
    }
    write_json(destination / "adapter_config.json", described)
