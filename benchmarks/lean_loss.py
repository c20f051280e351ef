"""Temporary memory of the loss and its gradient, in chunks and with all logits at once.

python -m benchmarks.lean_loss [--vocabulary=152064] [--hidden-size=2048] [--columns 1024 4096]

Nothing is run: the figures are those of the compiler, for its device.
"""

import argparse

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.machine import processor
from ilvr_jax.method.objectives import CHUNK_LOGITS, cross_entropy
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig, VisionConfig
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL


def temporary_bytes(model: Qwen2_5VL, columns: int, head_trained: bool, chunk_logits: int | None) -> int:
    """Return the temporary memory of the loss's gradient; without `chunk_logits` all logits are computed at once."""

    def loss(decoder, hidden, targets):
        if chunk_logits:
            return cross_entropy(model, decoder, hidden, targets, chunk_logits).sum()
        log_probabilities = jax.nn.log_softmax(model.logits(decoder, hidden), axis=-1)
        picked = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return -jnp.where(targets >= 0, picked, 0.0).sum()

    decoder = jax.eval_shape(model.init, jax.random.key(0))["decoder"]
    hidden = jax.ShapeDtypeStruct((1, columns, model.config.hidden_size), model.config.dtype)
    targets = jax.ShapeDtypeStruct((1, columns), jnp.int32)
    gradient = jax.grad(loss, (0, 1) if head_trained else 1)
    compiled = jax.jit(gradient).lower(decoder, hidden, targets).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Compile both for each number of columns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--columns", type=int, nargs="+", default=[1024, 4096, 16384])
    arguments = parser.parse_args()
    heads = arguments.hidden_size // 128
    vision = VisionConfig(1, 16, 16, 1, arguments.hidden_size, 56, (0,))
    config = ModelConfig(
        arguments.vocabulary, arguments.hidden_size, 128, 1, heads, heads, 1e6, (16, 24, 24), vision, dtype="bfloat16"
    )
    model = Qwen2_5VL(config)
    title = "temporary memory of the loss's gradient"
    table = Table("output head", "columns", "all logits at once, GB", "in chunks, GB", title=title)
    for head_trained in (True, False):
        for columns in arguments.columns:
            sizes = [temporary_bytes(model, columns, head_trained, chunk) for chunk in (None, CHUNK_LOGITS)]
            name = "trained" if head_trained else "frozen, as with LoRA"
            table.add_row(name, str(columns), *(f"{size / 1e9:.2f}" for size in sizes))
    console = Console()
    console.print(table)
    console.print(
        f"vocabulary {arguments.vocabulary}, hidden size {arguments.hidden_size}, bfloat16 activations, float32 "
        f"weights; compiled for {jax.devices()[0].device_kind} ({processor()}) by jax {jax.__version__}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
