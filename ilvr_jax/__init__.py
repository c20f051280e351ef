"""ILVR-JAX: interleaved latent visual reasoning in JAX and Flax (arXiv 2512.05665)."""
