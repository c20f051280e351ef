"""Rows of Zebra-CoT's parquet format for tests."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS = ("problem_image_1", "problem_image_2", "reasoning_image_1", "reasoning_image_2", "reasoning_image_3")
TEXTS = ["Question", "Text Reasoning Trace", "Final Answer"]


def mark(column: str) -> str:
    return f"<image_start>[{column}]<image_end>"


def row(question: str, trace: str, answer: str | None = "42", **images: bytes | None) -> dict:
    return {
        "Question": question,
        "Text Reasoning Trace": trace,
        "Final Answer": answer,
        **{name: None if content is None else {"bytes": content, "path": None} for name, content in images.items()},
    }


def write(path: Path, rows: list[dict], group: int = 100, columns: tuple[str, ...] = COLUMNS) -> Path:
    schema = pa.schema([(name, pa.string()) for name in TEXTS] + [(name, IMAGE) for name in columns])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return path
