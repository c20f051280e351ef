"""Records per second read from a parquet file, in random order and in the order of training.

python -m benchmarks.row_groups [--rows=2000] [--group=100] [--image-bytes=200000] [--seconds=20]

The file is generated in a temporary folder, with three images of random bytes per row. Only reading is timed.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from ilvr_jax.data.pipeline import shuffled_numbers
from ilvr_jax.data.zebra_cot import TEXT_COLUMNS, ZebraCotSource, marker

COLUMNS = ("problem_image_1", "reasoning_image_1", "reasoning_image_2")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_file(path: Path, rows: int, group: int, image_bytes: int) -> None:
    """Write a file in Zebra-CoT's format, a row group at a time."""
    random = np.random.default_rng(0)
    schema = pa.schema([(name, pa.string()) for name in TEXT_COLUMNS] + [(name, IMAGE) for name in COLUMNS])
    texts = dict(zip(TEXT_COLUMNS, (marker(COLUMNS[0]), "".join(map(marker, COLUMNS[1:])), "42"), strict=True))
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, group):
            table = [
                texts | {column: {"bytes": random.bytes(image_bytes), "path": None} for column in COLUMNS}
                for _ in range(min(group, rows - first))
            ]
            writer.write_table(pa.Table.from_pylist(table, schema), row_group_size=group)


def records_a_second(path: Path, order: Sequence[int], seconds: float) -> float:
    """Return the rate of reading records in this order, to its end or until the time is up."""
    source = ZebraCotSource(path)
    start, count = time.perf_counter(), 0
    for number in order:
        source[number]
        count += 1
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


def main() -> None:
    """Write the file, read it in both orders, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--group", type=int, default=100, help="rows per row group")
    parser.add_argument("--image-bytes", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="at most, for each row of the table")
    arguments = parser.parse_args()
    table = Table("order", "reads", "records/s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.parquet")
        write_file(path, arguments.rows, arguments.group, arguments.image_bytes)
        numbers = shuffled_numbers(ZebraCotSource(path), seed=0)
        random = np.random.default_rng(0).permutation(arguments.rows).tolist()
        training = [numbers[position] for position in range(arguments.rows)]
        for name, order in (("random", random), ("training", training)):
            for reads, stride in (("every record", 1), ("every second, as one of two workers", 2)):
                table.add_row(name, reads, f"{records_a_second(path, order[::stride], arguments.seconds):.0f}")
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{arguments.rows} rows in groups of {arguments.group}, three images of {arguments.image_bytes} bytes each; "
        f"{machine(['pyarrow'])}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
