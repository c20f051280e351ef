"""ILVR-JAX: interleaved latent visual reasoning in JAX and Flax (arXiv 2512.05665)."""

import os

# transformers serves tokenizers, image processors and configs here: that it finds no PyTorch is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
