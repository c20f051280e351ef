"""Parquet files: finding, opening and reading them, and the kinds of their columns."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ilvr_jax.data.image_files import leaves
from ilvr_jax.data.records import BadRecord
from ilvr_jax.errors import quote
from ilvr_jax.files import IS_POINTER, POINTER, open_regular


class RowGroup:
    """A row group of a parquet file; a column is read with the first value that is taken from it."""

    def __init__(self, key: tuple[int, ...], file: pq.ParquetFile, number: int):
        self.key = key
        self._file, self._number = file, number
        self._columns: dict[str, pa.ChunkedArray] = {}

    def read(self, column: str, row: int) -> pa.Scalar:
        """Return a value, null if the file has no such column."""
        if column not in self._file.schema_arrow.names:
            return pa.scalar(None)
        if column not in self._columns:
            # Arrow's threads do not survive a fork.
            table = self._file.read_row_group(self._number, columns=[column], use_threads=False)
            self._columns[column] = table[column]
        values = self._columns[column]
        if row >= len(values):  # a damaged column may be shorter than its row group
            raise BadRecord(f"{quote(column)} must have a value for each row, got {len(values)}")
        return values[row]


def parquet_files(folder: Path, follow_links: bool) -> list[Path]:
    """Return the files *.parquet in a folder and all folders below it, sorted.

    Links to folders are followed, except to a folder above. Raises BadRecord if a folder cannot be read or, without
    `follow_links`, if a link leads out of `folder`.
    """
    paths, real = [], Path(os.path.realpath(folder))

    def refuse(error: OSError) -> None:
        raise BadRecord(f"{error.filename} must be a readable folder: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=follow_links):
        names = [name for name in files if name.endswith(".parquet")]
        for name in () if follow_links else names + folders:
            if leaves(Path(parent, name), real):
                raise BadRecord(
                    f"{Path(parent, name)} must stay inside the data folder {folder}, since data.follow_links is "
                    "false, but is a link out of it"
                )
        above = {os.path.realpath(path) for path in (Path(parent), *Path(parent).parents)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(parent, name)) not in above]
        paths += [Path(parent, name) for name in names]
    return sorted(paths)


def open_parquet(path: Path) -> tuple[pq.ParquetFile, tuple[int, int]]:
    """Open a parquet file, and return it with its size in bytes and the time of its last change in nanoseconds.

    Raises BadRecord for a pointer of Git's large-file storage, OSError for anything but a regular file, and Arrow's
    errors.
    """
    file = open_regular(path)
    status = os.fstat(file.fileno())
    if file.read(len(POINTER)) == POINTER:
        raise BadRecord(f"{path} {IS_POINTER}")
    return pq.ParquetFile(file), (status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise errors of Arrow and the file system in the block again as BadRecord about `what`."""
    try:
        yield
    except BadRecord:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition("\n")[0][:150]
        raise BadRecord(f"{what} must be a whole parquet file, but cannot be read: {reason}") from error


def shown_type(kind: pa.DataType) -> str:
    """Return the name of a type for messages."""
    return quote(str(kind)).strip("'")


def item_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a list's items; any other type unchanged."""
    types = pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list else kind


def value_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a dictionary's values; any other type unchanged."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Return whether values of a type are text or null."""
    kind, types = value_type(kind), pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Return whether values of a type are bytes or null."""
    kind, types = value_type(kind), pa.types
    is_large = types.is_large_binary(kind) or types.is_binary_view(kind)
    return types.is_binary(kind) or is_large or types.is_fixed_size_binary(kind) or types.is_null(kind)
