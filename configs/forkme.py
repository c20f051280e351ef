"""An experiment to copy: the run of configs/plain_maps.py with one idea changed, `--config=configs/forkme.py:VARIANT`.

Copy this file, change its changes, and name the variants that you compare. Each run has a workdir of its own,
runs/forkme_VARIANT. Any key of ilvr_jax/config/schema.py can be set; docs/fork.md shows how to add rules of your own.
"""

from ml_collections import ConfigDict

from configs import plain_maps

VARIANTS = ("paper", "dense", "pause")


def get_config(variant: str = "paper") -> ConfigDict:
    """Return the configuration of a variant; raise ValueError, listing them, for an unknown one."""
    if variant not in VARIANTS:
        raise ValueError(f"the variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    config = plain_maps.get_config()
    if variant == "dense":  # targets: the whole helper image, pooled
        config.latents.selection = "dense"
    if variant == "pause":  # slots: a learned constant
        config.model.slot_input = "pause"
    config.stage1.steps = 300
    return config
