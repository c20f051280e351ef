"""Qwen2.5-VL: the vision tower, the decoder, and the names and shapes of its published files."""
