"""Samples per second of the input pipeline alone, on generated FrozenLake maps.

python -m benchmarks.input_pipeline [--batch-size=64] [--seconds=10] [--workers 0 2]
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.data.examples import ExampleSettings, build_example
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.pipeline import make_iterator
from ilvr_jax.data.tokenizer import record_texts, special_tokens, train_tokenizer
from ilvr_jax.method.layout import collate, merge_layouts, required_layout
from ilvr_jax.models.qwen2_5_vl.images import WindowGeometry

MEASURED = 256  # records, for which each step of the pipeline is timed, and which set the bucket's shape
GEOMETRY = WindowGeometry(2)  # that of configs/base.py


def milliseconds(make: Callable[[int], object], count: int) -> tuple[float, list]:
    """Return the mean time of `make(i)` for i < count, and the results."""
    start = time.perf_counter()
    made = [make(index) for index in range(count)]
    return (time.perf_counter() - start) / count * 1e3, made


def main() -> None:
    """Time each step for one sample, then the whole pipeline, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    arguments = parser.parse_args()

    source = FrozenLakeSource(FrozenLakeConfig(), seed=0, count=1_000_000)
    source[0]  # reads the sprites
    record_time, records = milliseconds(source.__getitem__, MEASURED)
    tokenizer = train_tokenizer(record_texts(records))
    special = special_tokens(tokenizer)
    table = Table(
        "helper images", "step", "workers", "ms per sample", "samples/s", f"ms per batch of {arguments.batch_size}"
    )

    def row(kind: str, step: str, workers: str, sample_time: float) -> None:
        batch_time = sample_time * arguments.batch_size
        table.add_row(kind, step, workers, f"{sample_time:.2f}", f"{1e3 / sample_time:.0f}", f"{batch_time:.1f}")

    row("", "make the map and draw it", "", record_time)
    for kind in ("omit", "latent"):
        to_sample = functools.partial(
            build_example, tokenizer=tokenizer, special=special, settings=ExampleSettings(1.0, None, 4, kind)
        )
        build_time, samples = milliseconds(lambda index, make=to_sample: make(records[index]), MEASURED)
        layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in samples])
        # Samples that do not occur in 256 records are rare, and have their own bucket.
        longest = dataclasses.replace(
            layout, prefix=layout.prefix + 64, segments=2 * layout.segments, text=2 * layout.text
        )
        row(kind, "tokens and patches", "", build_time)
        size = arguments.batch_size
        batches = [samples[start : start + size] for start in range(0, MEASURED - size + 1, size)] or [samples]
        collate_time, _ = milliseconds(
            lambda index, rows=batches, shape=layout: collate(rows[index], shape, special, GEOMETRY) and None,
            len(batches),
        )
        row(kind, f"collate ({layout.columns} columns)", "", collate_time / len(batches[0]))
        for workers in arguments.workers:
            iterator = make_iterator(source, to_sample, [layout, longest], size, 0, special, GEOMETRY, workers)
            for _ in range(4):  # excludes the start of the workers, and prefetched batches
                next(iterator)
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < arguments.seconds:
                count += len(next(iterator).record)
            row(kind, "whole pipeline", str(workers), (time.perf_counter() - start) * 1e3 / count)
            iterator.close()

    console = Console(width=120)
    console.print(table)
    console.print(machine(["grain", "tokenizers", "numpy", "pillow"]))


if __name__ == "__main__":
    main()
