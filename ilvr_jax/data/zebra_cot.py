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

from ilvr_jax.data.image_files import MOST_IMAGES, ImageFolder, leaves
from ilvr_jax.data.json_lines import as_answer, check_text
from ilvr_jax.data.markers import UnreadMarkers
from ilvr_jax.data.records import IMAGE_MARKER, BadRecord, Fingerprint, ImageSource, Look, Record, Text
from ilvr_jax.errors import quote
from ilvr_jax.files import POINTER, open_regular

QUESTION, TRACE, ANSWER = "Question", "Text Reasoning Trace", "Final Answer"
TEXT_COLUMNS = (QUESTION, TRACE, ANSWER)
PROBLEM_IMAGE = "problem_image_"
IMAGE_COLUMN = re.compile(r"(problem|reasoning)_image_\d+")
OPEN_GROUPS = 4  # row groups that a process keeps in memory
MARKER = re.compile(r"<image_start>\[(\w+)\]<image_end>")


class ZebraCotSource:
    """The records of a Zebra-CoT parquet file, or of all parquet files (*.parquet) in a folder and the folders in it.

    Columns: `Question` (text with markers such as `<image_start>[problem_image_1]<image_end>`), `Text Reasoning
    Trace` (text with markers of reasoning images, or of problem images), `Final Answer` (as `as_answer` reads it), and
    a column for each image, named as in its marker: the bytes of an image file, a struct of `bytes` and `path`, as
    Hugging Face's `datasets` writes it, or a list of one of these; null for no image. Where there are no bytes, the
    path is read: relative to `root` (default: the folder of the parquet file), as `check_image_path` reads it.

    A record's question has `<image>` in place of each marker; its steps are the trace, with a Look in place of each
    marker, and at the end a text "\\n\\nFinal Answer: " with the final answer, which is also the record's `answer`.
    With `for_evaluation` the trace is read without its images, and may be absent.

    The texts of every row are checked here, and that its markers and images pair up: a few columns of a row group
    at a time, none of them an image's bytes where there are paths too. Those are read with the record, the marked
    columns of its row group, and kept until OPEN_GROUPS other groups were read. `on_bad_record`, "error" or "skip", is
    what a bad row does: raise BadRecord, or add its sentence to `skipped`. Rows are numbered from 0 in each file.
    `remarks` has a sentence for each marker that stays as text. Links are followed as in ImageFolder.

    Raises BadRecord, too, if a file is no regular one or no parquet file of these columns, or no row is usable, and
    with a record of a file that has changed since.
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
        # Where each usable row is: file, row group, row of the group, row of the file.
        self._rows = array("q"), array("q"), array("q"), array("q")
        self._open: tuple[RowGroup, ...] = ()  # the newest first
        self._versions: list[tuple[int, int]] = []  # of each file
        fingerprint, markers = Fingerprint(), UnreadMarkers()
        for number in range(len(self._files)):
            self._index(number, on_bad_record, fingerprint, markers)
        self.remarks = markers.remarks()
        if not len(self):
            first = f" ({self.skipped[0]})" if self.skipped else ""
            raise BadRecord(f"{self.path} must hold rows of Zebra-CoT's columns, got no usable one{first}")
        self._fingerprint = fingerprint.text(len(self))

    def fingerprint(self) -> str:
        """Returns a digest of the texts of the usable rows in their order, and of the sizes of all row groups.

        Images are too large to be read for it.
        """
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._rows[0])

    def __getitem__(self, index: int) -> Record:
        file, group, row, row_of_file = (numbers[index] for numbers in self._rows)
        name = f"{self._names[file]} row {row_of_file}"

        def image(column: str) -> ImageSource:
            return as_image(values.read(column, row), column, self._folders[file])

        try:
            with reading("the file"):
                values = self._row_group(file, group)
                texts = {column: as_text(values.read(column, row), column) for column in TEXT_COLUMNS}
                return parse_row(texts, image, name, self._for_evaluation)
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
        opened, version = open_parquet(self._files[file])
        if version != self._versions[file]:
            raise BadRecord(f"{self._files[file]} has changed since it was opened; start again")
        values = RowGroup(key, opened, group)
        self._open = (values, *self._open)[:OPEN_GROUPS]
        return values

    def _index(self, file: int, on_bad_record: str, fingerprint: Fingerprint, markers: UnreadMarkers) -> None:
        """Checks the rows of a file, and notes where the usable ones are."""
        with reading(f"{self._files[file]}"):
            opened, version = open_parquet(self._files[file])
            schema = opened.schema_arrow
            images = image_columns(schema, self._names[file], self._for_evaluation)
        self._versions.append(version)
        texts = [column for column in TEXT_COLUMNS if column in schema.names]
        row_of_file = 0

        def skip(name: str, error: BadRecord) -> None:
            if on_bad_record == "error":
                raise BadRecord(f"{name}: {error}") from error
            self.skipped.append(f"{name}: {error}")

        for group in range(opened.num_row_groups):
            sizes = opened.metadata.row_group(group)
            # No sizes of single columns: where these are damaged Arrow ends the process.
            fingerprint.add(sizes.num_rows, sizes.total_byte_size)
            try:
                with reading("the file"):
                    table = opened.read_row_group(group, columns=[*texts, *images.values()], use_threads=False)
                    table.validate()
                    there = {image: table[image].is_valid().to_pylist() for image in images}
            except BadRecord as error:
                skip(f"{self._names[file]} rows {row_of_file} to {row_of_file + sizes.num_rows - 1}", error)
                row_of_file += sizes.num_rows
                continue
            values = RowGroup((), opened, group)
            for row in range(len(table)):
                name = f"{self._names[file]} row {row_of_file}"
                try:
                    with reading("the file"):
                        found = {column: as_text(table[column][row], column) for column in texts}
                        record, unmarked = check_row(
                            found, {image for image in images if there[image][row]}, name, self._for_evaluation
                        )
                        for column in unmarked:
                            if content_of(values.read(column, row), column) is not None:
                                raise BadRecord(f"has {column}, which no marker names; add {marker(column)}")
                except BadRecord as error:
                    skip(name, error)
                else:
                    markers.add(record)
                    fingerprint.add(*found.values())
                    for numbers, number in zip(self._rows, (file, group, row, row_of_file), strict=True):
                        numbers.append(number)
                row_of_file += 1


class RowGroup:
    """A row group of a parquet file; a column is read when a value of it is first asked for."""

    def __init__(self, key: tuple[int, ...], file: pq.ParquetFile, number: int):
        self.key = key
        self._file, self._number = file, number
        self._columns: dict[str, pa.ChunkedArray] = {}

    def read(self, column: str, row: int) -> pa.Scalar:
        """Returns a value, null if there is no such column."""
        if column not in self._file.schema_arrow.names:
            return pa.scalar(None)
        if column not in self._columns:
            # Arrow's threads would not outlive a fork.
            table = self._file.read_row_group(self._number, columns=[column], use_threads=False)
            self._columns[column] = table[column]
        values = self._columns[column]
        if row >= len(values):  # a damaged column may be shorter than its row group
            raise BadRecord(f"{quote(column)} must have a value for each row, got {len(values)}")
        return values[row]


def parse_row(
    texts: Mapping[str, str | None], image: Callable[[str], ImageSource], name: str, for_evaluation: bool = False
) -> Record:
    """Makes a record of a row's texts; `image(column)` returns the image that a marker names.

    Raises BadRecord, which states what is wrong, not in which row.
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
    """Splits a text at its markers: text, image column, text, ..., text; raises BadRecord for a broken marker."""
    parts = MARKER.split(text)
    if len(parts) // 2 > MOST_IMAGES:
        raise BadRecord(f'"{column}" must mark at most {MOST_IMAGES} images, got {len(parts) // 2}')
    for half in ("<image_start>", "<image_end>"):
        if any(half in part for part in parts[::2]):
            raise BadRecord(f'"{column}" must have markers such as {marker("reasoning_image_1")}, got a lone {half}')
    return parts


def marker(column: str) -> str:
    """Returns the text that stands where an image belongs."""
    return f"<image_start>[{column}]<image_end>"


def check_row(
    texts: Mapping[str, str | None], images: set[str], name: str, for_evaluation: bool
) -> tuple[Record, list[str]]:
    """Returns a row's record, its images empty, and those of the row's `images` that no marker names.

    Raises BadRecord if the texts make no record, or a marker has no image.
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
    """Returns a value of a text column, or a final answer as text; raises BadRecord if it is neither.

    Parquet files may hold texts that are not UTF-8.
    """
    try:
        content = value.as_py()
    except UnicodeDecodeError as error:
        raise BadRecord(f'"{column}" must be UTF-8, but is not ({error})') from error
    if column == ANSWER:
        return as_answer(content, f'"{column}"')
    return None if content is None else check_text(content, f'"{column}"')


def as_image(value: pa.Scalar, column: str, folder: ImageFolder) -> ImageSource:
    """Returns the image that a value of an image column holds or names; raises BadRecord if there is none."""
    content = content_of(value, column)
    if content is None:
        raise no_image(column)
    return folder.find(content, f"the path of {column}") if isinstance(content, str) else content


def content_of(value: pa.Scalar, column: str) -> bytes | str | None:
    """Returns the encoded image that a value of an image column holds, its path if there are no bytes, or None."""
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
    """Returns the error for a marker without an image."""
    return BadRecord(f"must have an image for every marker, got none in {quote(column)}")


def image_columns(schema: pa.Schema, name: str, for_evaluation: bool) -> dict[str, str]:
    """Returns the columns that can hold images, each with what is read of it to find which rows have one.

    Raises BadRecord if the columns are not those of Zebra-CoT.
    """
    for column in (QUESTION, ANSWER) if for_evaluation else TEXT_COLUMNS:
        if column not in schema.names:
            raise BadRecord(f'{name}: lacks the column "{column}"; {", ".join(TEXT_COLUMNS)} are needed')
    columns = {}
    for field in schema:
        is_image = IMAGE_COLUMN.fullmatch(field.name) and not pa.types.is_null(field.type)
        if (field.name in TEXT_COLUMNS or is_image) and schema.names.count(field.name) > 1:
            raise BadRecord(f"{name}: must have one column {quote(field.name)}, got {schema.names.count(field.name)}")
        if field.name in TEXT_COLUMNS and not (
            is_text(field.type) or (field.name == ANSWER and is_answer(item_type(field.type)))
        ):
            wanted = "text or numbers" if field.name == ANSWER else "text"
            raise BadRecord(f'{name}: the column "{field.name}" must be {wanted}, got {shown_type(field.type)}')
        if is_image and (field.name.startswith(PROBLEM_IMAGE) or not for_evaluation):
            if not is_image_type(item_type(field.type)):
                raise BadRecord(
                    f"{name}: the column {quote(field.name)} must be binary or a struct of binary bytes and a text "
                    f"path, got {shown_type(field.type)}"
                )
            has_path = pa.types.is_struct(field.type) and field.type.get_field_index("path") >= 0
            columns[field.name] = f"{field.name}.path" if has_path else field.name
    return columns


def shown_type(kind: pa.DataType) -> str:
    """Returns a type as a message shows it."""
    return quote(str(kind)).strip("'")


def item_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type of a list's items, or of what is no list."""
    types = pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list else kind


def is_text(kind: pa.DataType) -> bool:
    """Returns whether values of a type are text or null."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def is_answer(kind: pa.DataType) -> bool:
    """Returns whether values of a type can be final answers."""
    if pa.types.is_dictionary(kind):
        return is_answer(kind.value_type)
    types = pa.types
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return is_text(kind) or is_number or types.is_boolean(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Returns whether values of a type are bytes or null."""
    if pa.types.is_dictionary(kind):
        return is_binary(kind.value_type)
    types = pa.types
    is_large = types.is_large_binary(kind) or types.is_binary_view(kind)
    return types.is_binary(kind) or is_large or types.is_fixed_size_binary(kind) or types.is_null(kind)


def is_image_type(kind: pa.DataType) -> bool:
    """Returns whether values of a type can be images: bytes, or a struct of bytes, a path or both."""
    if not pa.types.is_struct(kind):
        return is_binary(kind)
    parts = {part.name: part.type for part in kind}
    return (
        len(parts) == kind.num_fields
        and bool(parts.keys() & {"bytes", "path"})
        and is_binary(parts.get("bytes", pa.null()))
        and is_text(parts.get("path", pa.null()))
    )


def parquet_files(folder: Path, follow_links: bool) -> list[Path]:
    """Returns the files *.parquet in a folder and the folders in it, sorted.

    Folders that are links are read, too, but for one that holds itself. Raises BadRecord if a folder cannot be read,
    or, without `follow_links`, if a link leads out of `folder`.
    """
    found, real = [], Path(os.path.realpath(folder))

    def refuse(error: OSError) -> None:
        raise BadRecord(f"{error.filename} must be a readable folder: {error.strerror}") from error

    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=follow_links):
        names = [name for name in files if name.endswith(".parquet")]
        if not follow_links:
            for name in names + folders:
                if leaves(Path(here, name), real):
                    raise BadRecord(
                        f"{Path(here, name)} must stay inside the data folder {folder}, since data.follow_links is "
                        "false, but is a link out of it"
                    )
        above = {os.path.realpath(parent) for parent in (Path(here), *Path(here).parents)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(here, name)) not in above]
        found += [Path(here, name) for name in names]
    return sorted(found)


def open_parquet(path: Path) -> tuple[pq.ParquetFile, tuple[int, int]]:
    """Opens a parquet file, and returns it with its size and the time of its last change.

    Raises BadRecord for a pointer of Git's large-file storage, OSError if it is no regular file, and what Arrow raises.
    """
    file = open_regular(path)
    status = os.fstat(file.fileno())
    if file.read(len(POINTER)) == POINTER:
        raise BadRecord(f"{path} is a pointer of Git's large-file storage; fetch the file itself (git lfs pull)")
    return pq.ParquetFile(file), (status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Within it, errors of Arrow and the file system become BadRecord about `what`."""
    try:
        yield
    except BadRecord:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition("\n")[0][:150]
        raise BadRecord(f"{what} must be a whole parquet file, but cannot be read: {reason}") from error
