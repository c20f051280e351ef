"""JSON files of records, read by their offsets in the file, and the checks that formats share."""

import json
import math
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ilvr_jax.data.image_files import ImageFolder, is_unicode
from ilvr_jax.data.markers import UnreadMarkers, place_images
from ilvr_jax.data.records import (
    IMAGE_MARKER,
    BadRecord,
    Fingerprint,
    ImageSource,
    Look,
    Record,
    image_bytes_count,
    prefix_errors,
)
from ilvr_jax.errors import quote
from ilvr_jax.files import IS_POINTER, POINTER, open_regular

LONGEST_RECORD = 2**27  # bytes: images may be inside, as data URIs
LARGEST_ARRAY = 2**30  # bytes of a file without lines, which is read as a whole
MOST_VALUES = 2**20  # of a record: each takes some hundred bytes of memory in Python
LONGEST_TEXT = 10**6  # characters of a record's question or answer, far more than fit a context
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]', re.DOTALL)  # possessive: no backtracking states


class JsonLines:
    """The records of a JSON-lines file, or of one JSON array, read from disk one at a time.

    `parse(fields, root, name)` makes a Record of an object's fields or raises BadRecord without the record's name.
    Image paths are relative to `root` (default: the file's folder). Opening parses every record once. With
    `on_bad_record="error"` a bad record raises BadRecord, with "skip" its sentence is added to `skipped`. `remarks` has
    a sentence for each kind of marker that stays as text.

    Raises BadRecord as well for a file that cannot be read, without any usable record, and with a record that has
    changed since it was opened.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None,
        parse: Callable[[Mapping[str, Any], ImageFolder, str], Record],
        on_bad_record: str,
        follow_links: bool = True,
    ):
        self.path = Path(path)
        self.root = ImageFolder(root or self.path.parent, follow_links)
        self.skipped: list[str] = []
        self._parse_fields = parse
        self._offsets, self._lengths, self._numbers, self._checksums = array("q"), array("q"), array("q"), array("L")
        fingerprint, markers = Fingerprint(), UnreadMarkers()
        with open_records(self.path) as file:
            self._word = "record" if has_no_lines(file) else "line"
            for piece in read_pieces(file, self.path):
                try:
                    record = self._parse(piece.content, piece.number)
                    fingerprint.add(piece.content.strip(), *map(image_bytes_count, all_images(record)))
                except BadRecord as error:
                    if on_bad_record == "error":
                        raise
                    self.skipped.append(str(error))
                else:
                    markers.add(record)
                    self._offsets.append(piece.offset)
                    self._lengths.append(len(piece.content))
                    self._numbers.append(piece.number)
                    self._checksums.append(zlib.crc32(piece.content))
        self.remarks = markers.remarks()
        if not self._offsets:
            first = f" ({self.skipped[0]})" if self.skipped else ""
            raise BadRecord(f"{self.path} must hold a JSON object per line, or an array of objects, got none{first}")
        self._fingerprint = fingerprint.text(len(self))

    def fingerprint(self) -> str:
        """Return a digest of the usable records, in order, and of the sizes of their images."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        name = self._name(self._numbers[index])
        try:
            with open_regular(self.path) as file:
                file.seek(self._offsets[index])
                content = file.read(self._lengths[index])
        except OSError as error:
            raise BadRecord(f"{name}: the file cannot be read again: {error.strerror}") from error
        if zlib.crc32(content) != self._checksums[index]:
            raise BadRecord(f"{name}: has changed since the file was opened; start again")
        return self._parse(content, self._numbers[index])

    def _name(self, number: int) -> str:
        return f"{self.path.name} {self._word} {number}"

    def _parse(self, content: bytes | None, number: int) -> Record:
        name = self._name(number)
        with prefix_errors(name):
            return self._parse_fields(read_object(content), self.root, name)


def all_images(record: Record) -> list[ImageSource]:
    """Return the images of a record's question, then its helper images."""
    return [*record.images, *(step.helper_image for step in record.steps if isinstance(step, Look))]


class Piece(NamedTuple):
    """A record in a file, not parsed."""

    offset: int  # bytes
    number: int  # of the line, or of the record in a file without lines; from 1
    content: bytes | None  # None if it is longer than LONGEST_RECORD


def open_records(path: Path) -> BinaryIO:
    """Open a file of records for reading; raise BadRecord, naming it, if it is not a regular file."""
    try:
        return open_regular(path)
    except OSError as error:
        raise BadRecord(f"{path} must be a file of records, but cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadRecord(f"{quote(str(path))} must be a file of records, but is not a valid path ({error})") from error


def has_no_lines(file: BinaryIO) -> bool:
    """Return whether a file is one JSON array or objects over several lines each, instead of one object per line.

    Reads from the beginning of the file and returns to it.
    """
    file.seek(0)
    lines = iter(lambda: file.readline(LONGEST_RECORD), b"")
    line = next((line for line in lines if _filled(line)), b"")
    first = _filled(line)
    # A whole list on a line that others follow is a bad line, not the array.
    is_line = line.endswith(b"\n") and first.endswith(b"]") and any(map(_filled, lines))
    file.seek(0)
    return first == b"{" or (first.startswith(b"[") and not is_line)


def _filled(line: bytes) -> bytes:
    return line.removeprefix(BYTE_ORDER_MARK).strip()


def read_pieces(file: BinaryIO, path: Path) -> Iterator[Piece]:
    """Yield the records of a file from its beginning: its lines that are not blank, or the objects of its array.

    Raises BadRecord for a file without lines that is too large, and for a pointer of Git's large-file storage.
    """
    if not has_no_lines(file):
        yield from _lines(file, path)
        return
    content = file.read(LARGEST_ARRAY + 1)
    if len(content) > LARGEST_ARRAY:
        raise BadRecord(f"{path} must have one JSON object per line, since it has over {LARGEST_ARRAY // 2**20} MB")
    for number, (start, end) in enumerate(split_objects(content), start=1):
        yield Piece(start, number, content[start:end] if end - start <= LONGEST_RECORD else None)


def _lines(file: BinaryIO, path: Path) -> Iterator[Piece]:
    offset, number = 0, 0
    while line := file.readline(LONGEST_RECORD):
        length, whole, number = len(line), True, number + 1
        while len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
            whole, line = False, file.readline(LONGEST_RECORD)
            length += len(line)
        if offset == 0 and line.startswith(POINTER):
            raise BadRecord(f"{path} {IS_POINTER}")
        if not whole:
            yield Piece(offset, number, None)
        elif _filled(line):
            yield Piece(offset, number, line)
        offset += length


def split_objects(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of the items of a JSON array, or of objects that follow each other without an array.

    Only brackets and commas are read. Errors inside an item, or text behind the last one, are left to its parser.
    """
    begin = len(content) - len(content.removeprefix(BYTE_ORDER_MARK).lstrip())
    is_array = content[begin : begin + 1] == b"["
    inside = int(is_array)  # the depth of items
    start, depth, has_items = begin, 0, False
    for token in TOKEN.finditer(content, begin):
        letter = content[token.start() : token.start() + 1]
        if letter in b"[{":
            depth += 1
            start = token.end() if is_array and depth == 1 else start
        elif letter in b"]}":
            depth -= 1
        if is_array and (depth, letter) in ((1, b","), (0, b"]")):
            if letter == b"," or has_items or content[start : token.start()].strip():
                yield start, token.start()
            start, has_items = token.end(), True
            if letter == b"]":
                break
        elif depth == inside == 0 and letter == b"}":
            yield start, token.end()
            start = token.end()
    if depth or content[start:].strip():
        yield start, len(content)


def read_object(content: bytes | None) -> dict[str, Any]:
    """Return the fields of a record; raise BadRecord unless it is one JSON object in UTF-8 and not too large."""
    if content is None:
        raise BadRecord(f"must have at most {LONGEST_RECORD // 2**20} MB, got more")
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MOST_VALUES:
        raise BadRecord(f"must hold at most {MOST_VALUES} values, got more")
    try:
        fields = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_fields)
    except BadRecord:
        raise
    except (ValueError, RecursionError) as error:
        problem = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise BadRecord(f"must be one JSON object in UTF-8, but is not JSON ({problem})") from error
    if not isinstance(fields, dict):
        raise BadRecord(f"must be one JSON object, got {kind(fields)}")
    return fields


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadRecord(f"must have each field once, got {quote(next(x for x in names if names.count(x) > 1))} again")
    return fields


def check_fields(fields: Mapping[str, Any], required: tuple[str, ...]) -> None:
    """Raise BadRecord if a required field is missing."""
    for field in required:
        if field not in fields:
            raise BadRecord(f'must have the fields {", ".join(required)}, but lacks "{field}"')


def read_question(fields: Mapping[str, Any], root: ImageFolder) -> tuple[str, tuple[ImageSource, ...]]:
    """Return the question in `text_input` and its images in `image_input`, in the order of its markers."""
    text = check_text(fields["text_input"], '"text_input"')
    images = root.find_all(fields["image_input"], '"image_input"')
    return place_images(text, images, IMAGE_MARKER, '"text_input"')


def check_text(value: Any, where: str) -> str:
    """Return a value that is Unicode text; raise BadRecord, beginning with `where`, for any other."""
    if not isinstance(value, str):
        raise BadRecord(f"{where} must be text, got {kind(value)}")
    if len(value) > LONGEST_TEXT:
        raise BadRecord(f"{where} must have at most {LONGEST_TEXT} characters, got {len(value)}")
    if not is_unicode(value):
        raise BadRecord(f"{where} must be Unicode text, got half of a surrogate pair")
    return value


def as_answer(value: Any, where: str) -> str | None:
    """Return a final answer as text, from text, a number, true or false, or a list of one of these; None for null.

    Raises BadRecord, beginning with `where`, for any other value.
    """
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list):
        value = value[0]
    if value is None or isinstance(value, str):
        return None if value is None else check_text(value, where)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() < 1000:
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        # Tables turn a column of whole numbers into floats if one is missing.
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)
    raise BadRecord(f"{where} must be text, a number, true, false or a list of one of these, got {quote(value)}")


def kind(value: Any) -> str:
    """Return the type of a JSON value in words."""
    if value is None:
        return "null or missing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names[type(value)]
