"""JSON files of records: records found again by their place in the file, and checks that formats share."""

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
from ilvr_jax.data.markers import UnreadMarkers
from ilvr_jax.data.records import BadRecord, Fingerprint, ImageSource, Look, Record, image_bytes_count
from ilvr_jax.errors import quote
from ilvr_jax.files import POINTER, open_regular

LONGEST_RECORD = 2**27  # bytes: images may be inside, as data URIs
LARGEST_ARRAY = 2**30  # bytes of a file that has no lines, and is read at once
MOST_VALUES = 2**20  # of a record: Python takes some hundred bytes for each
LONGEST_TEXT = 10**6  # characters of a record's question or answer: far above what a context holds
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]', re.DOTALL)  # possessive: no state is kept for each character


class JsonLines:
    """The records of a JSON-lines file, or of one JSON array, read from disk one at a time.

    `parse(fields, root, name)` makes a Record of an object's fields, or raises BadRecord, which states what is wrong,
    not in which line; paths of images are relative to `root` (default: the file's folder), as `check_image_path`
    reads them. Every record is parsed here once. `on_bad_record`, "error" or "skip", is what a bad one does: raise
    BadRecord, or add its sentence to `skipped`. `remarks` has a sentence for each marker that stays as text.

    Raises BadRecord, too, if the file cannot be read or holds no usable record, and with a record that has changed
    since.
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
            raise BadRecord(f"{self.path} must hold a JSON object a line, or an array of them, got none{first}")
        self._fingerprint = fingerprint.text(len(self))

    def fingerprint(self) -> str:
        """Returns a digest of the usable records in their order, and of the sizes of their image files."""
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
            raise BadRecord(f"{name}: the file cannot be read any more: {error.strerror}") from error
        if zlib.crc32(content) != self._checksums[index]:
            raise BadRecord(f"{name}: has changed since the file was opened; start again")
        return self._parse(content, self._numbers[index])

    def _name(self, number: int) -> str:
        return f"{self.path.name} {self._word} {number}"

    def _parse(self, content: bytes | None, number: int) -> Record:
        name = self._name(number)
        try:
            return self._parse_fields(read_object(content), self.root, name)
        except BadRecord as error:
            raise BadRecord(f"{name}: {error}") from error


def all_images(record: Record) -> list[ImageSource]:
    """Returns the images of a record, helper images last."""
    return [*record.images, *(step.helper_image for step in record.steps if isinstance(step, Look))]


class Piece(NamedTuple):
    """A record's place in a file."""

    offset: int
    number: int  # of the line, or of the record where there are no lines; from 1
    content: bytes | None  # None: longer than LONGEST_RECORD


def open_records(path: Path) -> BinaryIO:
    """Opens a file of records for reading; raises BadRecord, which names it, if it is no regular file."""
    try:
        return open_regular(path)
    except OSError as error:
        raise BadRecord(f"{path} must be a file of records, but cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadRecord(f"{quote(str(path))} must be a file of records, but is no name of one ({error})") from error


def has_no_lines(file: BinaryIO) -> bool:
    """Returns whether a file is one JSON array, or has its objects indented over several lines, not one a line.

    The file is read from its beginning, and then set there again.
    """
    file.seek(0)
    lines = iter(lambda: file.readline(LONGEST_RECORD), b"")
    line = next((line for line in lines if _filled(line)), b"")
    first = _filled(line)
    # A list that is whole on a line with others after it is a bad line.
    is_line = line.endswith(b"\n") and first.endswith(b"]") and any(map(_filled, lines))
    file.seek(0)
    return first == b"{" or (first.startswith(b"[") and not is_line)


def _filled(line: bytes) -> bytes:
    return line.removeprefix(BYTE_ORDER_MARK).strip()


def read_pieces(file: BinaryIO, path: Path) -> Iterator[Piece]:
    """Yields the records of a file from its beginning: its lines that are not blank, or all objects of its array.

    Raises BadRecord if the file is too large to be read without lines, or a pointer of Git's large-file storage.
    """
    if not has_no_lines(file):
        yield from _lines(file, path)
        return
    content = file.read(LARGEST_ARRAY + 1)
    if len(content) > LARGEST_ARRAY:
        raise BadRecord(f"{path} must have one JSON object a line to be larger than {LARGEST_ARRAY // 2**20} MB")
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
            raise BadRecord(f"{path} is a pointer of Git's large-file storage; fetch the file itself (git lfs pull)")
        if not whole:
            yield Piece(offset, number, None)
        elif _filled(line):
            yield Piece(offset, number, line)
        offset += length


def split_objects(content: bytes) -> Iterator[tuple[int, int]]:
    """Yields where the items of a JSON array begin and end, or objects that follow each other without one.

    Brackets alone are looked at: what is wrong inside an item, or left after the last one, is for its reader to find.
    """
    begin = len(content) - len(content.removeprefix(BYTE_ORDER_MARK).lstrip())
    is_array = content[begin : begin + 1] == b"["
    inside = int(is_array)  # the depth that items are at
    start, depth, some = begin, 0, False
    for token in TOKEN.finditer(content, begin):
        letter = content[token.start() : token.start() + 1]
        if letter in b"[{":
            depth += 1
            start = token.end() if is_array and depth == 1 else start
        elif letter in b"]}":
            depth -= 1
        if is_array and (depth, letter) in ((1, b","), (0, b"]")):
            if letter == b"," or some or content[start : token.start()].strip():
                yield start, token.start()
            start, some = token.end(), True
            if letter == b"]":
                break
        elif depth == inside == 0 and letter == b"}":
            yield start, token.end()
            start = token.end()
    if depth or content[start:].strip():
        yield start, len(content)


def read_object(content: bytes | None) -> dict[str, Any]:
    """Returns the fields of a record; raises BadRecord if it is not one JSON object in UTF-8, or too large."""
    if content is None:
        raise BadRecord(f"must be at most {LONGEST_RECORD // 2**20} MB long, got more")
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
        raise BadRecord(f"must name each field once, got {quote(next(x for x in names if names.count(x) > 1))} again")
    return fields


def check_fields(fields: Mapping[str, Any], required: tuple[str, ...]) -> None:
    """Raises BadRecord if a required field is not there."""
    for field in required:
        if field not in fields:
            raise BadRecord(f'lacks the field "{field}"; {", ".join(required)} are needed')


def check_text(value: Any, where: str) -> str:
    """Returns the value if it is Unicode text; raises BadRecord, which begins with `where`, if not."""
    if not isinstance(value, str):
        raise BadRecord(f"{where} must be text, got {kind(value)}")
    if len(value) > LONGEST_TEXT:
        raise BadRecord(f"{where} must have at most {LONGEST_TEXT} characters, got {len(value)}")
    if not is_unicode(value):
        raise BadRecord(f"{where} must be Unicode text, got half of a surrogate pair")
    return value


def as_answer(value: Any, where: str) -> str | None:
    """Returns a final answer as a person writes it: text, a number, true or false, or a list of one of these.

    Null is None. Raises BadRecord, which begins with `where`, for anything else.
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
        # Tables turn whole numbers into floats where one of a column is missing.
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)
    raise BadRecord(f"{where} must be text, a number, true, false or a list of one of these, got {quote(value)}")


def kind(value: Any) -> str:
    """Returns in words what type a JSON value has."""
    if value is None:
        return "null or missing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names[type(value)]
