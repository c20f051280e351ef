"""The published settings for Qwen2.5-VL, which the files qwen2_5_vl_*.py fill in; by itself 7B, both stages, in full.

Needs the data: `--config.data.path=train.jsonl`, in the format that `--config.data.source` names. `python -m
ilvr_jax.check_data` says whether it fits the buckets.
"""

from ml_collections import ConfigDict

from configs import base

MAX_PIXELS = 784 * 784  # as much as the 49 windows of the largest bucket hold


def bucket(prefix: int, segments: int, text: int, tail: int, images: int, windows: int) -> ConfigDict:
    """Returns the columns of a batch; an image of 112 x 112 pixels takes one attention window."""
    return ConfigDict(
        {
            "prefix": prefix,
            "segments": segments,
            "text": text,
            "tail": tail,
            "images": images,
            "image_windows": windows,
            "helper_windows": windows if segments else 0,
        }
    )


def get_config(
    checkpoint: str = "Qwen/Qwen2.5-VL-7B-Instruct", stages: tuple[str, ...] = ("stage1", "stage2"), lora: bool = False
) -> ConfigDict:
    """Returns the published settings for a checkpoint: full fine-tuning of the decoder, or LoRA."""
    config = base.get_config()
    with config.unlocked():
        del config.warm_up
        config.stages = stages
        config.model = ConfigDict(
            {
                "init_from": checkpoint,
                "dtype": "bfloat16",
                "remat_policy": "full",
                "attention": "auto",
                "slot_input": "hidden",
                "frozen_dtype": "bfloat16",
                "lora": {"rank": 32 if lora else 0, "alpha": 64.0, "dropout": 0.05, "targets": base.TARGETS},
            }
        )
        config.mesh.update(data=1, fsdp=-1)
        config.data.source = "ilvr"
        config.data.image_scale = 1.0
        config.data.min_pixels = 56 * 56
        config.data.max_pixels = MAX_PIXELS
        config.data.feature_cache = "runs/features"
        config.data.system = "You are a helpful assistant."
        config.data.workers = 4
        config.data.buckets = ConfigDict(
            {
                "plain": bucket(1536, segments=0, text=0, tail=0, images=1, windows=49),
                "one_look": bucket(832, segments=1, text=0, tail=192, images=1, windows=16),
                "few_looks": bucket(1280, segments=4, text=128, tail=256, images=2, windows=49),
                "many_looks": bucket(2560, segments=8, text=256, tail=512, images=4, windows=49),
            }
        )
        config.latents.latent_size = 8
        published = {
            "train": ("adapters",) if lora else ("decoder",),
            "epochs": 15,
            "batch_size": 8,  # one sample a device and 8 parts, as published
            "accumulation": 8,  # parts on one device; on n, each has as many rows at a time as the one would
            "optimizer": "adamw",
            "learning_rate": 1e-5,
            "schedule": "linear",
            "warmup_steps": 10,
            "weight_decay": 0.01,
            "beta2": 0.999,
            "clip": 1.0,
        }
        config.stage1 = base.stage(objective="alignment", **published)
        config.stage2 = base.stage(objective="autonomy", helper_images="slots", **published)
        config.eval.data = ""
        config.eval.question = ""
        config.eval.max_new_tokens = 1024
        config.eval.batch_size = 8
    return config.lock()
