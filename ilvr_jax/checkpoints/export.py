"""Runs as folders in the Hugging Face layout: whole models for transformers and vLLM, adapters for PEFT."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import save_file
from transformers import Qwen2_5_VLConfig

from ilvr_jax.checkpoints.manager import PRETRAINED, restore_run, restore_teacher
from ilvr_jax.checkpoints.pretrained import (
    CONVERTED,
    IMAGE_PROCESSOR,
    KEPT,
    SOURCE,
    load_params,
    names_adapter,
    open_pretrained,
    read_nested,
    read_published,
)
from ilvr_jax.checkpoints.stop_tokens import GENERATION, generation_config, read_generation_config, set_stop_tokens
from ilvr_jax.config.experiments import resolve_path
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.schema import LoraConfig
from ilvr_jax.config.workdir import read_config
from ilvr_jax.data.examples import chat_template
from ilvr_jax.data.tokenizer import special_tokens
from ilvr_jax.files import check_new_folder, copy, new_folder, read_object, write_json
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.lora import SUFFIX, merge_adapters
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig, model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.published import described_scaling, published_dtype
from ilvr_jax.models.qwen2_5_vl.weights import state_dict_from_params
from ilvr_jax.models.tensor_files import BadCheckpoint, write_tensors


def export(
    source: Path, destination: Path, stage: str | None, dtype: str | None, teacher: bool, lora: str | None
) -> None:
    """Writes the model of a run, a folder made by `from-hf` or an adapter on its base as a published checkpoint.

    `stage` is by default the last with a checkpoint, `dtype` that of the checkpoint that the run began from. `lora`
    says what becomes of adapters: "merge" into the weights or "adapter", a PEFT folder of them alone.

    Raises BadConfig and NoCheckpoint if the run or its stage does not fit what is asked for, and InputError and OSError
    as `new_folder` does.
    """
    check_new_folder(destination)
    if (source / CONVERTED).is_dir() or names_adapter(source):
        if teacher or lora or stage:
            raise BadConfig(
                f"--teacher, --stage, --adapter and --merge-lora must not be given for {source}: it is no run"
            )
        pretrained = open_pretrained(source)
        config, tokenizer = model_config_from_hf(pretrained.published), pretrained.tokenizer
        config = dataclasses.replace(config, vocab_size=max(config.vocab_size, len(tokenizer)))
        params = load_params(pretrained, config, dtype or pretrained.dtype, jax.random.key(0))
        published, nested = pretrained.folder, pretrained.nested
        settings, latent_size = pretrained.published, None
        special = special_tokens(tokenizer, pretrained.stop)
        ends = pretrained.stop or special.ends
    else:
        run = read_config(source)
        if (slot_input := run.model.slot_input) != "hidden":
            raise BadConfig(
                f"`model.slot_input` of {source} must be hidden for an export, since the published layout has no other "
                f"rule, got {slot_input}"
            )
        model, params, tokenizer, special = restore_run(source, run, stage)
        if teacher:
            params = {**params, **restore_teacher(source, run, stage)}
        config, published, latent_size = model.config, source / PRETRAINED, run.latents.latent_size
        nested = (published / SOURCE).is_file() and read_nested(published)
        settings = read_published(published) if run.model.init_from else published_config(config)
        ends, tokenizer.eos_token = special.ends, "<|im_end|>"  # with which answers end in training
        if not run.model.init_from:
            tokenizer.chat_template = chat_template(run.data.system)
        if "adapters" in params:
            if lora is None:
                raise BadConfig(f"{source} trained LoRA adapters; give --merge-lora or --adapter")
            if lora == "adapter":
                base = run.model.init_from
                if base and (published / SOURCE).is_file():
                    base = read_object(published / SOURCE, BadCheckpoint).get("base", base)
                if run.model.init_from and not base:
                    raise BadConfig(
                        f"--merge-lora must be given for {source}, not --adapter: it began from an adapter merged into "
                        "its base, and of that model there is no folder that an adapter could be for"
                    )
                with new_folder(destination):
                    write_adapter(params["adapters"], config.lora, base, destination)
                    tokenizer.save_pretrained(destination)
                return
            params = merge_adapters(params, config.lora)
        elif lora:
            raise BadConfig(f"{source} has no LoRA adapters; without --merge-lora and --adapter it can be exported")
    dtype = dtype or published_dtype(settings) or "float32"
    with new_folder(destination):
        write_tensors(state_dict_from_params(params, config, dtype, nested), destination)
        tokenizer.save_pretrained(destination)
        for name in KEPT:
            if (published / name).is_file():
                copy(published / name, destination / name)
        if not any((destination / name).is_file() for name in IMAGE_PROCESSOR):
            write_json(destination / "preprocessor_config.json", image_processor(config))
        generation = generation_config(read_generation_config(published), ends, special.pad, config.vocab_size)
        write_json(destination / GENERATION, generation)
        described = with_tokens(settings, config.vocab_size, special, ends, dtype, latent_size)
        write_json(destination / "config.json", described)


def with_tokens(
    published: dict[str, Any],
    vocabulary: int,
    special: SpecialTokens,
    ends: Sequence[int],
    dtype: str,
    latent_size: int | None,
) -> dict[str, Any]:
    """Returns a config.json with the sizes and token ids of a run; latent fields are named as Mirage and ILVR do."""
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
    """Returns the config.json of a model that began from nothing."""
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
    """Returns the preprocessor_config.json of a model that began from nothing: its pixels, and no bound on sizes."""
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
    """Writes adapters as PEFT does, for the module names that transformers has had since version 4.52."""
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
