"""Qwen2.5-VL 32B published settings with LoRA, stage 2, autonomy; in the workdir of stage 1 it goes on from there."""

from ml_collections import ConfigDict

from configs import qwen2_5_vl


def get_config() -> ConfigDict:
    """Returns the configuration of the run."""
    return qwen2_5_vl.get_config("Qwen/Qwen2.5-VL-32B-Instruct", ("stage1", "stage2"), lora=True)
