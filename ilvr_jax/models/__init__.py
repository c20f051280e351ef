"""Qwen2.5-VL as Flax Linen modules, and how published checkpoints name its weights."""
