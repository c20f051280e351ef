"""Checkpoints: those of a run, published ones in and out, and models opened for use."""
