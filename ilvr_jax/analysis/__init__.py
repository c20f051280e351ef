"""Ahead-of-time compilation for a topology: memory, operations and bytes per chip."""
