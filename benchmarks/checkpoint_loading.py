"""Host memory and time to load, convert and export published checkpoints. Linux only (/proc).

python -m benchmarks.checkpoint_loading [--gigabytes=4] [--dtype=bfloat16]

A random checkpoint with the widths of Qwen2.5-VL-3B and as many layers as fit is written to a temporary folder. Each
row of the table is a separate process. The device is the CPU, so that the parameters are in host memory.
"""

import argparse
import functools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import machine
from ilvr_jax.checkpoints.export import export
from ilvr_jax.checkpoints.pretrained import open_pretrained
from ilvr_jax.checkpoints.weights import load_params, save_converted
from ilvr_jax.data.tokenizer import LATENT_TOKENS, SPECIAL_TOKENS
from ilvr_jax.models.qwen2_5_vl.config import model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.qwen2_5_vl.weights import published_shapes
from ilvr_jax.models.tensor_files import TensorToWrite, write_tensors

SHARD_BYTES = 10**9
SAMPLING_INTERVAL = 0.002  # seconds
TABLE_BYTES = 2 * 151936 * 2048 * 2  # the embedding and the output head
LAYER_BYTES = 195_000_000  # a decoder layer and a block of the vision tower


def published_config(layers: int) -> dict:
    """Return the config.json of a Qwen2.5-VL-3B with `layers` layers in each tower and a separate output head."""
    return {
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": layers,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [0],
        },
    }


def write_checkpoint(folder: Path, gigabytes: float) -> dict[str, int]:
    """Write a random bfloat16 checkpoint without latent tokens, and return the bytes of its tensors."""
    published = published_config(max(1, round((gigabytes * 1e9 - TABLE_BYTES) / LAYER_BYTES)))
    (folder / "config.json").write_text(json.dumps(published))
    words = ["assistant", *(token for token in SPECIAL_TOKENS if token not in LATENT_TOKENS)]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="assistant")
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model)).save_pretrained(folder)
    config, random = model_config_from_hf(published), np.random.default_rng(0)

    def make(shape: tuple[int, ...]) -> np.ndarray:
        bits = random.integers(0, 2**16, shape, np.uint16) & 0xBFFF  # numbers between -2 and 2
        return bits.view(ml_dtypes.bfloat16)

    shapes = published_shapes(jax.eval_shape(Qwen2_5VL(config).init, jax.random.key(0)), config)
    tensors = [TensorToWrite(name, "bfloat16", shape, functools.partial(make, shape)) for name, shape in shapes.items()]
    write_tensors(tensors, folder, SHARD_BYTES)
    return {tensor.name: tensor.bytes for tensor in tensors}


def load(folder: Path, dtype: str) -> int:
    """Load a checkpoint as a run does, and return the bytes of the parameters."""
    pretrained = open_pretrained(folder)
    config = model_config_from_hf(pretrained.hf_config)
    params = jax.block_until_ready(load_params(pretrained, config, dtype, jax.random.key(0)))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def convert(folder: Path, destination: Path) -> None:
    """Convert a checkpoint as `python -m ilvr_jax.convert from-hf` does."""
    save_converted(open_pretrained(folder), destination)


def measure(task: Callable[..., int | None], *arguments: object) -> dict[str, float]:
    """Run a task in a fresh process, and return its seconds, its result and its memory in bytes.

    `before` and `peak` are the process's own memory, before the task and at its maximum (sampled). `resident` is the
    maximum that the system recorded, including pages of libraries and mapped files, which it can reclaim.
    """
    parent, child = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(child, task, arguments))
    process.start()
    child.close()
    before, peak = parent.recv(), 0
    while not parent.poll(SAMPLING_INTERVAL):
        peak = max(peak, memory(process.pid, "RssAnon"))
    result = parent.recv()
    process.join()
    return {**before, **result, "peak": peak}


def _run(connection: Connection, task: Callable[..., int | None], arguments: tuple) -> None:
    jax.block_until_ready(jax.numpy.zeros(1))  # starts the runtime
    connection.send({"before": memory(os.getpid(), "RssAnon")})
    start = time.perf_counter()
    result = task(*arguments)
    seconds = time.perf_counter() - start
    connection.send({"seconds": seconds, "result": result, "resident": memory(os.getpid(), "VmHWM")})


def memory(process: int, field: str) -> int:
    """Return a field of a process's /proc status, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def main() -> None:
    """Write the checkpoint, measure loading, conversion and export, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the checkpoint in bfloat16, from 1.5")
    parser.add_argument("--dtype", default="bfloat16", help="of the loaded parameters")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    columns = ("before", "peak", "above parameters", "peak with file pages", "seconds", "GB/s")
    table = Table("", *columns, title="host memory in GB")
    with tempfile.TemporaryDirectory() as folder:
        published, converted, exported = (Path(folder, part) for part in ("published", "converted", "exported"))
        published.mkdir()
        sizes = write_checkpoint(published, arguments.gigabytes)
        stored = sum(sizes.values())
        for name, task, *task_arguments in (
            (f"load published files as {arguments.dtype}", load, published, arguments.dtype),
            ("convert them (from-hf)", convert, published, converted),
            (f"load the converted folder as {arguments.dtype}", load, converted, arguments.dtype),
            ("export it (to-hf)", export, converted, exported, None, None, False, None),
        ):
            result = measure(task, *task_arguments)
            above = result["peak"] - result["before"] - (result["result"] or stored)
            sizes_shown = (result["before"], result["peak"], above, result["resident"])
            speed = (f"{result['seconds']:.1f}", f"{stored / result['seconds'] / 1e9:.2f}")
            table.add_row(name, *(f"{size / 1e9:.2f}" for size in sizes_shown), *speed)
    console = Console(width=120)
    console.print(table)
    largest = max(sizes, key=sizes.get)
    console.print(
        f"{stored / 1e9:.2f} GB of bfloat16 in {len(sizes)} tensors, the largest {sizes[largest] / 1e9:.2f} GB "
        f"({largest}); files were read from the system's cache",
        highlight=False,
    )
    console.print(machine(["jax", "numpy", "safetensors", "orbax-checkpoint"]))


if __name__ == "__main__":
    main()
