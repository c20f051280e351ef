"""Qwen2.5-VL 72B published settings in full, stage 1, alignment."""

from ml_collections import ConfigDict

from configs import qwen2_5_vl


def get_config() -> ConfigDict:
    """Returns the configuration of the run."""
    return qwen2_5_vl.get_config("Qwen/Qwen2.5-VL-72B-Instruct", ("stage1",), lora=False)
