"""Batched decoding with latent slots, and evaluation on top of it."""
