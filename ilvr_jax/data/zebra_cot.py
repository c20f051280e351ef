"""Zebra-CoT's parquet format: one record per row, each image in a column of its own."""

import os
import re
import threading
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from ilvr_jax.data.image_files import MOST_IMAGES, ImageFolder
from ilvr_jax.data.json_lines import as_answer, check_text
from ilvr_jax.data.markers import UnreadMarkers
from ilvr_jax.data.parquet import (
    RowGroup,
    is_binary,
    is_text,
    item_type,
    open_parquet,
    parquet_files,
    reading,
    shown_type,
    value_type,
)
from ilvr_jax.data.records import IMAGE_MARKER, BadRecord, Fingerprint, ImageSource, Look, Record, Text, prefix_errors
from ilvr_jax.errors import quote

QUESTION, TRACE, ANSWER = "Question", "Text Reasoning Trace", "Final Answer"
TEXT_COLUMNS = (QUESTION, TRACE, ANSWER)
PROBLEM_IMAGE = "problem_image_"
IMAGE_COLUMN = re.compile(r"(problem|reasoning)_image_\d+")
OPEN_GROUPS = 4  # row groups that a process keeps in memory
MARKER = re.compile(r"<image_start>\[(\w+)\]<image_end>")


class ZebraCotSource:
    """The records of a Zebra-CoT parquet file, or of all parquet files (*.parquet) in a folder and below it.

    Columns: `Question` (text with markers such as `<image_start>[problem_image_1]<image_end>`), `Text Reasoning
    Trace` (text with markers of reasoning or problem images), `Final Answer` (read by `as_answer`), and a column for
    each image, named as in its marker: the bytes of an image file, a struct of `bytes` and `path`, as Hugging Face's
    `datasets` writes it, or a list of one of these; null for no image. Without bytes the path is read, relative to
    `root` (default: the folder of the parquet file), like that of any ImageFolder.

    A record's question has `<image>` in place of each marker. Its steps are the trace, with a Look in place of each
    marker, and a last text "\\n\\nFinal Answer: " with the final answer, which is also the record's `answer`. With
    `for_evaluation` the trace is read without its images and may be missing.

    Opening checks the texts of every row and that its markers and images pair up; it does not read the bytes of images
    that have paths as well. A record's images are read with it, as columns of its row group, which stay in memory until
    OPEN_GROUPS other groups have been read. With `on_bad_record="error"` a bad row raises BadRecord, with "skip" its
    sentence is added to `skipped`. Rows are numbered from 0 in each file. `remarks` has a sentence for each kind of
    marker that stays as text.

    Raises BadRecord as well for a file that is not a parquet file of these columns, without any usable row, and with a
    record of a file that has changed since it was opened.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        on_bad_record: str = "error",
        for_evaluation: bool = False,
        follow_links: bool = True,
    ):
        self.path = Path(path)
        self.skipped: list[str] = []
        if os.path.isdir(self.path):
            self._files = parquet_files(self.path, follow_links)
            self._names = [str(file.relative_to(self.path)) for file in self._files]
        else:
            self._files, self._names = [self.path], [self.path.name]
        if not self._files:
            raise BadRecord(f"{self.path} must be a parquet file or a folder with at least one (*.parquet), got none")
        self._folders = [ImageFolder(root or file.parent, follow_links) for file in self._files]
        self._for_evaluation = for_evaluation
        # By usable row: file, row group, row of the group, row of the file.
        self._rows = array("q"), array("q"), array("q"), array("q")
        self._open: tuple[RowGroup, ...] = ()  # newest first
        self._versions: list[tuple[int, int]] = []  # by file
        fingerprint, markers = Fingerprint(), UnreadMarkers()
        for number in range(len(self._files)):
            self._index(number, on_bad_record, fingerprint, markers)
        self.remarks = markers.remarks()
        if not len(self):
            first = f" ({self.skipped[0]})" if self.skipped else ""
            raise BadRecord(f"{self.path} must hold rows of Zebra-CoT's columns, got no usable one{first}")
        self._fingerprint = fingerprint.text(len(self))

    def fingerprint(self) -> str:
        """Return a digest of the texts of the usable rows, in order, and of the sizes of all row groups.

        It does not cover the images, which would take too long to read.
        """
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._rows[0])

    def __getitem__(self, index: int) -> Record:
        file, group, row, row_of_file = (numbers[index] for numbers in self._rows)
        name = f"{self._names[file]} row {row_of_file}"

        def image(column: str) -> ImageSource:
            return as_image(values.read(column, row), column, self._folders[file])

        with prefix_errors(name), reading("the file"):
            values = self._row_group(file, group)
            texts = {column: as_text(values.read(column, row), column) for column in TEXT_COLUMNS}
            return parse_row(texts, image, name, self._for_evaluation)

    def shuffled(self, random: np.random.Generator) -> Int[np.ndarray, " records"]:
        """Return the numbers of all records in random order, OPEN_GROUPS row groups at a time.

        The row groups are shuffled, then the rows within each OPEN_GROUPS of them, so that a process that reads all
        records in this order, or every n-th, reads each row group once.
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
        return self.__dict__ | {"_open": ()}  # another process opens the files itself

    def _row_group(self, file: int, group: int) -> "RowGroup":
        # Threads, and processes before and after a fork, must not share an open file.
        key = (os.getpid(), threading.get_ident(), file, group)
        for values in self._open:
            if values.key == key:
                return values
        opened, version = open_parquet(self._files[file])
        if version != self._versions[file]:
            raise BadRecord(f"{self._files[file]} has changed since it was opened; start again")
        values = RowGroup(key, opened, group)
        self._open = (values, *self._open)[:OPEN_GROUPS]
        return values

    def _index(self, file: int, on_bad_record: str, fingerprint: Fingerprint, markers: UnreadMarkers) -> None:
        """Check the rows of a file and note the places of the usable ones."""
        with reading(f"{self._files[file]}"):
            opened, version = open_parquet(self._files[file])
            schema = opened.schema_arrow
            images = image_columns(schema, self._names[file], self._for_evaluation)
        self._versions.append(version)
        text_columns = [column for column in TEXT_COLUMNS if column in schema.names]
        row_of_file = 0

        def skip(name: str, error: BadRecord) -> None:
            if on_bad_record == "error":
                raise BadRecord(f"{name}: {error}") from error
            self.skipped.append(f"{name}: {error}")

        for group in range(opened.num_row_groups):
            sizes = opened.metadata.row_group(group)
            # Not the sizes of columns: reading damaged ones ends the process in Arrow.
            fingerprint.add(sizes.num_rows, sizes.total_byte_size)
            try:
                with reading("the file"):
                    table = opened.read_row_group(group, columns=[*text_columns, *images.values()], use_threads=False)
                    table.validate()
                    has_image = {image: table[image].is_valid().to_pylist() for image in images}
            except BadRecord as error:
                skip(f"{self._names[file]} rows {row_of_file} to {row_of_file + sizes.num_rows - 1}", error)
                row_of_file += sizes.num_rows
                continue
            values = RowGroup((), opened, group)
            for row in range(len(table)):
                name = f"{self._names[file]} row {row_of_file}"
                try:
                    with reading("the file"):
                        texts = {column: as_text(table[column][row], column) for column in text_columns}
                        row_images = {image for image in images if has_image[image][row]}
                        record, unmarked = check_row(texts, row_images, name, self._for_evaluation)
                        for column in unmarked:
                            if content_of(values.read(column, row), column) is not None:
                                raise BadRecord(f"must have a marker {marker(column)} for its image, got none")
                except BadRecord as error:
                    skip(name, error)
                else:
                    markers.add(record)
                    fingerprint.add(*texts.values())
                    for numbers, number in zip(self._rows, (file, group, row, row_of_file), strict=True):
                        numbers.append(number)
                row_of_file += 1


def parse_row(
    texts: Mapping[str, str | None], image: Callable[[str], ImageSource], name: str, for_evaluation: bool = False
) -> Record:
    """Make a record of a row's texts; `image(column)` returns the image for a marker.

    Raises BadRecord without the name of the row.
    """
    for column in (QUESTION,) if for_evaluation else (QUESTION, TRACE):
        if not texts[column]:
            raise BadRecord(f'"{column}" must be text, got null or an empty one')
    answer = (texts.get(ANSWER) or "").strip() or None
    question = split_markers(texts[QUESTION], QUESTION)
    for column in question[1::2]:
        if not column.startswith(PROBLEM_IMAGE):
            raise BadRecord(f'"{QUESTION}" must mark images named {PROBLEM_IMAGE}1, ..., got {quote(column)}')
    if any(IMAGE_MARKER in text for text in question[::2]):
        raise BadRecord(f'"{QUESTION}" must mark images by {marker("problem_image_1")}, got {IMAGE_MARKER}')
    trace = (texts.get(TRACE) or "") + ("" if answer is None else f"\n\nFinal Answer: {answer}")
    if for_evaluation:
        steps = [Text(MARKER.sub("", trace))]
    else:
        parts = split_markers(trace, TRACE)
        steps = [Look(image(part)) if position % 2 else Text(part) for position, part in enumerate(parts)]
    return Record(
        question=IMAGE_MARKER.join(question[::2]),
        images=tuple(image(column) for column in question[1::2]),
        steps=tuple(step for step in steps if step != Text("")),
        answer=answer,
        name=name,
    )


def split_markers(text: str, column: str) -> list[str]:
    """Split a text at its markers: text, image column, text, ..., text; raise BadRecord for a broken marker."""
    parts = MARKER.split(text)
    if len(parts) // 2 > MOST_IMAGES:
        raise BadRecord(f'"{column}" must mark at most {MOST_IMAGES} images, got {len(parts) // 2}')
    for half in ("<image_start>", "<image_end>"):
        if any(half in part for part in parts[::2]):
            raise BadRecord(f'"{column}" must have markers such as {marker("reasoning_image_1")}, got a lone {half}')
    return parts


def marker(column: str) -> str:
    """Return the marker of an image column."""
    return f"<image_start>[{column}]<image_end>"


def check_row(
    texts: Mapping[str, str | None], images: set[str], name: str, for_evaluation: bool
) -> tuple[Record, list[str]]:
    """Return a row's record with empty images, and those of its image columns in `images` that have no marker.

    Raises BadRecord for texts that make no record or a marker without an image.
    """
    marked = set()

    def mark(column: str) -> bytes:
        if column not in images:
            raise no_image(column)
        marked.add(column)
        return b""

    record = parse_row(texts, mark, name, for_evaluation)
    return record, sorted(images - marked)


def as_text(value: pa.Scalar, column: str) -> str | None:
    """Return a value of a text column or a final answer as text; raise BadRecord if it is neither."""
    try:
        content = value.as_py()
    except UnicodeDecodeError as error:  # parquet files may hold any bytes as text
        raise BadRecord(f'"{column}" must be UTF-8, but is not ({error})') from error
    if column == ANSWER:
        return as_answer(content, f'"{column}"')
    return None if content is None else check_text(content, f'"{column}"')


def as_image(value: pa.Scalar, column: str, folder: ImageFolder) -> ImageSource:
    """Return the image in a value of an image column, or the file it names; raise BadRecord if there is none."""
    content = content_of(value, column)
    if content is None:
        raise no_image(column)
    return folder.find(content, f"the path of {column}") if isinstance(content, str) else content


def content_of(value: pa.Scalar, column: str) -> bytes | str | None:
    """Return the bytes in a value of an image column, else its path, else None."""
    try:
        content = value.as_py()
    except UnicodeDecodeError as error:
        raise BadRecord(f"the path of {column} must be UTF-8, but is not ({error})") from error
    if isinstance(content, list):
        if len(content) > 1:
            raise BadRecord(f"{column} must be one image, got {len(content)}")
        content = content[0] if content else None
    if isinstance(content, dict):
        content = content.get("bytes") or content.get("path")
    return content or None


def no_image(column: str) -> BadRecord:
    """Return the error of a marker without an image."""
    return BadRecord(f"must have an image for every marker, got none in {quote(column)}")


def image_columns(schema: pa.Schema, name: str, for_evaluation: bool) -> dict[str, str]:
    """Return the columns of images, each with the column or field that is null in rows without an image.

    Raises BadRecord if the columns are not those of Zebra-CoT.
    """
    for column in (QUESTION, ANSWER) if for_evaluation else TEXT_COLUMNS:
        if column not in schema.names:
            raise BadRecord(f'{name}: must have the columns {", ".join(TEXT_COLUMNS)}, but lacks "{column}"')
    columns = {}
    for field in schema:
        is_image = IMAGE_COLUMN.fullmatch(field.name) and not pa.types.is_null(field.type)
        if (field.name in TEXT_COLUMNS or is_image) and schema.names.count(field.name) > 1:
            raise BadRecord(f"{name}: must have one column {quote(field.name)}, got {schema.names.count(field.name)}")
        if field.name in TEXT_COLUMNS and not (
            is_text(field.type) or (field.name == ANSWER and is_answer(item_type(field.type)))
        ):
            kinds = "text or numbers" if field.name == ANSWER else "text"
            raise BadRecord(f'{name}: the column "{field.name}" must be {kinds}, got {shown_type(field.type)}')
        if is_image and (field.name.startswith(PROBLEM_IMAGE) or not for_evaluation):
            if not is_image_type(item_type(field.type)):
                raise BadRecord(
                    f"{name}: the column {quote(field.name)} must be binary or a struct of binary bytes and a text "
                    f"path, got {shown_type(field.type)}"
                )
            has_path = pa.types.is_struct(field.type) and field.type.get_field_index("path") >= 0
            columns[field.name] = f"{field.name}.path" if has_path else field.name
    return columns


def is_answer(kind: pa.DataType) -> bool:
    """Return whether values of a type can be final answers."""
    kind, types = value_type(kind), pa.types
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return is_text(kind) or is_number or types.is_boolean(kind)


def is_image_type(kind: pa.DataType) -> bool:
    """Return whether values of a type can be images: bytes, or a struct of bytes, a path or both."""
    if not pa.types.is_struct(kind):
        return is_binary(kind)
    parts = {part.name: part.type for part in kind}
    return (
        len(parts) == kind.num_fields
        and bool(parts.keys() & {"bytes", "path"})
        and is_binary(parts.get("bytes", pa.null()))
        and is_text(parts.get("path", pa.null()))
    )
