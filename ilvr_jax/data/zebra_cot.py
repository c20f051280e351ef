"""Zebra-CoT's parquet format: one record a row, encoded images in columns of their own."""

import contextlib
import os
import re
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from ilvr_jax.data.records import IMAGE_MARKER, BadRecord, Fingerprint, ImageSource, Look, Record, Text

QUESTION, TRACE, ANSWER = "Question", "Text Reasoning Trace", "Final Answer"
TEXT_COLUMNS = (QUESTION, TRACE, ANSWER)
IMAGE_COLUMN = re.compile(r"(problem|reasoning)_image_\d+")
OPEN_GROUPS = 4  # row groups that a process keeps in memory
MARKER = re.compile(r"<image_start>\[(\w+)\]<image_end>")


class ZebraCotSource:
    """The records of a Zebra-CoT parquet file, or of all parquet files (*.parquet) in a folder and the folders in it.

    Columns: `Question` (text with markers such as `<image_start>[problem_image_1]<image_end>`), `Text Reasoning
    Trace` (text with markers of reasoning images, or of problem images), `Final Answer` (text or null), and a column
    for each image, named as in its marker: a struct of the encoded image file's `bytes` and its `path`, or null.

    A record's question has `<image>` in place of each marker; its steps are the trace, with a Look in place of each
    marker, and at the end a text "\\n\\nFinal Answer: " with the final answer, which is also the record's `answer`.

    The texts of every row are checked here, and that its markers and images pair up: a few columns of a row group
    at a time, none of them an image's bytes. Those are read with the record, the marked columns of its row group, and
    kept until OPEN_GROUPS other groups were read. `on_bad_record` says what a bad row does: "error" raises
    BadRecord, "skip" leaves the row out and adds the sentence to `skipped`. Rows are numbered from 0 in each file.

    Raises BadRecord, too, if there is no such file, one is no parquet file of these columns, or no row is usable.
    """

    def __init__(self, path: str | Path, on_bad_record: str = "error"):
        self.path = Path(path)
        self.skipped: list[str] = []
        if self.path.is_dir():
            self._names = [str(file.relative_to(self.path)) for file in sorted(self.path.rglob("*.parquet"))]
            self._files = [self.path / name for name in self._names]
        elif self.path.is_file():
            self._names, self._files = [self.path.name], [self.path]
        else:
            raise BadRecord(f"{self.path}: there is no such file; a parquet file or a folder of them is accepted")
        if not self._files:
            raise BadRecord(f"{self.path}: holds no parquet file (*.parquet); at least one is needed")
        # Where each usable row is: file, row group, row of the group, row of the file.
        self._rows = array("q"), array("q"), array("q"), array("q")
        self._open: tuple[RowGroup, ...] = ()  # the newest first
        fingerprint = Fingerprint()
        for number in range(len(self._files)):
            self._index(number, on_bad_record, fingerprint)
        if not len(self):
            first = f" ({self.skipped[0]})" if self.skipped else ""
            raise BadRecord(f"{self.path}: holds no usable record{first}; rows of Zebra-CoT's columns are accepted")

        self._fingerprint = fingerprint.text(len(self))

    def fingerprint(self) -> str:
        """Returns a digest of the texts of the usable rows in their order, and of the sizes of all row groups' columns.

        Those of images are too large to be read for it.
        """
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._rows[0])

    def __getitem__(self, index: int) -> Record:
        file, group, row, row_of_file = (numbers[index] for numbers in self._rows)
        name = f"{self._names[file]} row {row_of_file}"
        with reading(self._files[file]):
            values = self._row_group(file, group)
            try:
                texts = {column: as_text(values.read(column, row), column) for column in TEXT_COLUMNS}
                return parse_row(texts, lambda column: image_bytes(values.read(column, row), column), name)
            except BadRecord as error:
                raise BadRecord(f"{name}: {error}") from error

    def shuffled(self, random: np.random.Generator) -> Int[np.ndarray, "records"]:
        """Returns the numbers of all records in random order, a few row groups at a time.

        The row groups are shuffled, and then the rows of each OPEN_GROUPS of them together, so that a process that
        reads the records in this order, or every n-th of them, reads a row group once.
        """
        files, groups = np.array(self._rows[0]), np.array(self._rows[1])
        starts = np.flatnonzero((np.diff(files) != 0) | (np.diff(groups) != 0)) + 1
        blocks = np.split(np.arange(len(self)), starts)
        order = random.permutation(len(blocks))
        return np.concatenate(
            [
                random.permutation(np.concatenate([blocks[block] for block in order[first : first + OPEN_GROUPS]]))
                for first in range(0, len(order), OPEN_GROUPS)
            ]
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": ()}  # another process opens its files itself

    def _row_group(self, file: int, group: int) -> "RowGroup":
        # Never one that a thread, or the process that this one was forked from, opened for itself.
        key = (os.getpid(), threading.get_ident(), file, group)
        for values in self._open:
            if values.key == key:
                return values
        values = RowGroup(key, self._files[file], group)
        self._open = (values, *self._open)[:OPEN_GROUPS]
        return values

    def _index(self, file: int, on_bad_record: str, fingerprint: Fingerprint) -> None:
        """Checks the rows of a file, and notes where the usable ones are."""
        with reading(self._files[file]):
            opened = pq.ParquetFile(self._files[file])
            images = image_columns(opened.schema_arrow, self._names[file])
            paths = [f"{image}.path" for image in images]  # is enough to tell images from nulls
            row_of_file = 0
            for group in range(opened.num_row_groups):
                table = opened.read_row_group(group, columns=[*TEXT_COLUMNS, *paths], use_threads=False)
                sizes = opened.metadata.row_group(group)
                fingerprint.add(*(sizes.column(column).total_uncompressed_size for column in range(sizes.num_columns)))
                there = {image: table[image].is_valid().to_pylist() for image in images}
                for row in range(len(table)):
                    try:
                        texts = {column: as_text(table[column][row], column) for column in TEXT_COLUMNS}
                        check_row(texts, {image for image in images if there[image][row]})
                    except BadRecord as error:
                        sentence = f"{self._names[file]} row {row_of_file}: {error}"
                        if on_bad_record == "error":
                            raise BadRecord(sentence) from error
                        self.skipped.append(sentence)
                    else:
                        for numbers, number in zip(self._rows, (file, group, row, row_of_file), strict=True):
                            numbers.append(number)
                        fingerprint.add(*texts.values())
                    row_of_file += 1


class RowGroup:
    """A row group of a parquet file; a column is read when a value of it is first asked for."""

    def __init__(self, key: tuple[int, ...], path: Path, number: int):
        self.key = key
        self._file, self._number = pq.ParquetFile(path), number
        self._columns: dict[str, pa.ChunkedArray] = {}

    def read(self, column: str, row: int) -> pa.Scalar:
        """Returns a value, null if there is no such column."""
        if column not in self._file.schema_arrow.names:
            return pa.scalar(None)
        if column not in self._columns:
            # Arrow's threads would not outlive a fork.
            table = self._file.read_row_group(self._number, columns=[column], use_threads=False)
            self._columns[column] = table[column]
        return self._columns[column][row]


def parse_row(texts: Mapping[str, str | None], image: Callable[[str], ImageSource], name: str) -> Record:
    """Makes a record of a row's texts; `image(column)` returns the image that a marker names.

    Raises BadRecord saying what is wrong and accepted, not in which row.
    """
    for column in (QUESTION, TRACE):
        if not texts[column]:
            raise BadRecord(f'"{column}" is null or empty; text is accepted')
    answer = (texts[ANSWER] or "").strip() or None
    question = split_markers(texts[QUESTION], QUESTION)
    trace = split_markers(texts[TRACE] + ("" if answer is None else f"\n\nFinal Answer: {answer}"), TRACE)
    for column in question[1::2]:
        if not column.startswith("problem_image_"):
            raise BadRecord(f'"{QUESTION}" marks {column}; images named problem_image_1, ... are accepted there')
    if any(IMAGE_MARKER in text for text in question[::2]):
        raise BadRecord(f'"{QUESTION}" has {IMAGE_MARKER}; markers such as {marker("problem_image_1")} are accepted')
    steps = [Look(image(part)) if position % 2 else Text(part) for position, part in enumerate(trace)]
    return Record(
        question=IMAGE_MARKER.join(question[::2]),
        images=tuple(image(column) for column in question[1::2]),
        steps=tuple(step for step in steps if step != Text("")),
        answer=answer,
        name=name,
    )


def split_markers(text: str, column: str) -> list[str]:
    """Splits a text at its markers: text, image column, text, ..., text; raises BadRecord for a broken marker."""
    parts = MARKER.split(text)
    for half in ("<image_start>", "<image_end>"):
        if any(half in part for part in parts[::2]):
            raise BadRecord(f'"{column}" has {half} outside a marker; {marker("reasoning_image_1")} is one')
    return parts


def marker(column: str) -> str:
    """Returns the text that stands where an image belongs."""
    return f"<image_start>[{column}]<image_end>"


def check_row(texts: Mapping[str, str | None], images: set[str]) -> None:
    """Raises BadRecord if a row's texts make no record, or their markers and the row's `images` do not pair up."""
    marked = set()

    def mark(column: str) -> bytes:
        if column not in images:
            raise no_image(column)
        marked.add(column)
        return b""

    parse_row(texts, mark, "")
    for column in sorted(images - marked):
        raise BadRecord(f"holds {column}, which no marker names; {marker(column)} where it belongs is accepted")


def as_text(value: pa.Scalar, column: str) -> str | None:
    """Returns a value of a text column; raises BadRecord if it is not UTF-8, which parquet files do not check."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise BadRecord(f'"{column}" is not UTF-8 ({error}); Unicode text is accepted') from error


def image_bytes(value: pa.Scalar, column: str) -> bytes:
    """Returns the encoded image that a value of an image column holds; raises BadRecord if there is none."""
    fields = value.as_py()
    if fields is None:
        raise no_image(column)
    if not fields["bytes"]:
        raise BadRecord(f"{column} has no bytes, its path is {fields['path']}; the bytes of an image are accepted")
    return fields["bytes"]


def no_image(column: str) -> BadRecord:
    """Returns the error for a marker without an image."""
    return BadRecord(f"marks {column} and has no such image; an image for every marker is accepted")


def image_columns(schema: pa.Schema, name: str) -> list[str]:
    """Returns the columns that can hold images; raises BadRecord if the columns are not those of Zebra-CoT."""
    for column in TEXT_COLUMNS:
        if column not in schema.names:
            raise BadRecord(f'{name}: lacks the column "{column}"; {", ".join(TEXT_COLUMNS)} are needed')
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise BadRecord(f'{name}: the column "{column}" is of type {kind}; text is accepted')
    columns = []
    for field in schema:
        if IMAGE_COLUMN.fullmatch(field.name) and not pa.types.is_null(field.type):
            if not pa.types.is_struct(field.type) or not {"bytes", "path"} <= {part.name for part in field.type}:
                raise BadRecord(
                    f"{name}: the column {field.name} is of type {field.type}; a struct of bytes and path is accepted"
                )
            columns.append(field.name)
    return columns


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within it, errors of Arrow and the file system become BadRecord naming the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise BadRecord(f"{path}: cannot be read ({reason}); a whole parquet file is accepted") from error
