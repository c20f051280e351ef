"""ILVR-JAX: interleaved latent visual reasoning in JAX and Flax (arXiv 2512.05665)."""

import os
import sys

from ilvr_jax.interrupts import stop_at_interrupts

# transformers is only used for tokenizers, image processors and configs, so its warning about PyTorch is silenced.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# One of our commands is starting (python -m ilvr_jax.train): Ctrl-C ends it from the first import on.
if sys.argv[:1] == ["-m"] and any(argument.startswith("ilvr_jax.") for argument in sys.orig_argv):
    stop_at_interrupts()
