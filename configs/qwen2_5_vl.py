"""The published settings for Qwen2.5-VL: `--config=configs/qwen2_5_vl.py:7b-lora-stage2`.

A variant is a size (3b, 7b, 32b, 72b), then `lora` for adapters in place of full fine-tuning, then `stage1` to stop
after that stage; `stage2`, the default, runs both, and resumes from stage 1 in its workdir. Needs the data:
`--config.data.path=train.jsonl`, in the format that `--config.data.source` names. `python -m ilvr_jax.check_data` shows
whether it fits the buckets.
"""

import itertools

from ml_collections import ConfigDict

from ilvr_jax.config.experiments import default_config, stage_config

MAX_PIXELS = 784 * 784  # 784 vision tokens, as in the largest buckets
SIZES = ("3b", "7b", "32b", "72b")
VARIANTS = ["-".join(filter(None, parts)) for parts in itertools.product(SIZES, ("", "lora"), ("", "stage1", "stage2"))]


def bucket(prefix: int, segments: int, text: int, tail: int, images: int, tokens: int) -> ConfigDict:
    """Return the sizes of a batch; an image of 112 x 112 pixels takes 16 vision tokens."""
    return ConfigDict(
        {
            "prefix": prefix,
            "segments": segments,
            "text": text,
            "tail": tail,
            "images": images,
            "image_tokens": tokens,
            "helper_tokens": tokens if segments else 0,
        }
    )


def get_config(variant: str = "7b") -> ConfigDict:
    """Return the published settings of a variant; raises ValueError, listing them, for an unknown one."""
    if variant not in VARIANTS:
        raise ValueError(f"the variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    lora = "lora" in variant
    config = default_config()
    config.stages = ("stage1",) if variant.endswith("stage1") else ("stage1", "stage2")
    config.model.update(
        init_from=f"Qwen/Qwen2.5-VL-{variant.split('-')[0].upper()}-Instruct",
        dtype="bfloat16",
        remat_policy="full",
        frozen_dtype="bfloat16",
    )
    config.model.lora.update(rank=32 if lora else 0, dropout=0.05)
    config.mesh.update(data=1, fsdp=-1)
    config.data.update(source="ilvr", min_pixels=56 * 56, max_pixels=MAX_PIXELS, feature_cache="runs/features")
    config.data.update(system="You are a helpful assistant.", workers=4)
    config.data.buckets = ConfigDict(
        {
            "plain": bucket(1536, segments=0, text=0, tail=0, images=1, tokens=784),
            "one_look": bucket(832, segments=1, text=0, tail=192, images=1, tokens=256),
            "few_looks": bucket(1280, segments=4, text=128, tail=256, images=2, tokens=784),
            "many_looks": bucket(2560, segments=8, text=256, tail=512, images=4, tokens=784),
        }
    )
    published = {
        "train": ("adapters",) if lora else ("decoder",),
        "epochs": 15,
        "batch_size": 8,  # one sample per device and 8 parts, as published
        "accumulation": 8,  # parts on one device; on n, each processes as many rows at a time
        "optimizer": "adamw",
        "learning_rate": 1e-5,
        "warmup_steps": 10,
        "beta2": 0.999,
    }
    config.stage1 = stage_config("alignment", **published)
    config.stage2 = stage_config("autonomy", helper_images="slots", **published)
    # On every 50th record, which is not trained on; `--config.eval.data=FILE --config.eval.fraction=0` for a file.
    config.eval.update(task="comt", data="", fraction=0.02, limit=200)
    config.eval.update(question="", max_new_tokens=1024, batch_size=8)
    return config
