"""JSON-lines files of records: lines found again by their place in the file, and checks that formats share."""

import json
import os
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ilvr_jax.data.records import BadRecord, Fingerprint, ImageSource, Look, Record, image_bytes_count


class JsonLines:
    """The records of a JSON-lines file, read from disk one at a time.

    `parse(fields, root, name)` makes a Record of a line's object, or raises BadRecord saying what is wrong, not in
    which line; paths of images are relative to `root` (default: the file's folder), as `check_image_path`
    reads them. Every line is parsed here once. `on_bad_record` says what a bad line does: "error" raises BadRecord,
    "skip" leaves the line out and adds the sentence to `skipped`.

    Raises BadRecord, too, if there is no such file or no usable line in it.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None,
        parse: Callable[[Mapping[str, Any], Path, str], Record],
        on_bad_record: str,
    ):
        self.path = Path(path)
        self.root = Path(os.path.realpath(root or self.path.parent))
        self.skipped: list[str] = []
        self._parse_fields = parse
        self._offsets, self._lines = array("q"), array("q")
        if not self.path.is_file():
            raise BadRecord(f"{self.path}: there is no such file; a JSON-lines file is accepted")
        offset, fingerprint = 0, Fingerprint()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        record = self._parse(line, number)
                        fingerprint.add(line.strip(), *map(image_bytes_count, all_images(record)))
                    except BadRecord as error:
                        if on_bad_record == "error":
                            raise
                        self.skipped.append(str(error))
                    else:
                        self._offsets.append(offset)
                        self._lines.append(number)
                offset += len(line)
        if not self._offsets:
            first = f" ({self.skipped[0]})" if self.skipped else ""
            raise BadRecord(f"{self.path}: holds no usable record{first}; one JSON object a line is accepted")
        self._fingerprint = fingerprint.text(len(self))

    def fingerprint(self) -> str:
        """Returns a digest of the usable lines in their order, and of the sizes of their image files."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline(), self._lines[index])

    def _parse(self, line: bytes, number: int) -> Record:
        name = f"{self.path.name} line {number}"
        try:
            return self._parse_fields(read_object(line), self.root, name)
        except BadRecord as error:
            raise BadRecord(f"{name}: {error}") from error


def all_images(record: Record) -> list[ImageSource]:
    """Returns the images of a record, helper images last."""
    return [*record.images, *(step.helper_image for step in record.steps if isinstance(step, Look))]


def read_object(line: bytes) -> dict[str, Any]:
    """Returns the fields of a line; raises BadRecord if it is not one JSON object in UTF-8."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is not JSON in UTF-8 ({error}); one JSON object is accepted") from error
    if not isinstance(fields, dict):
        raise BadRecord(f"is {kind(fields)}; one JSON object is accepted")
    return fields


def check_fields(fields: Mapping[str, Any], required: tuple[str, ...]) -> None:
    """Raises BadRecord if a required field is not there."""
    for field in required:
        if field not in fields:
            raise BadRecord(f'lacks the field "{field}"; {", ".join(required)} are needed')


def check_text(value: Any, where: str) -> str:
    """Returns the value if it is Unicode text; raises BadRecord, which begins with `where`, if not."""
    if not isinstance(value, str):
        raise BadRecord(f"{where} is {kind(value)}; text is accepted")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRecord(f"{where} holds half of a surrogate pair; Unicode text is accepted")
    return value


def check_image_path(value: Any, root: Path, where: str) -> Path:
    """Returns the file that a path relative to `root` names; raises BadRecord if it is none or outside `root`."""
    if not isinstance(value, str) or not value or "\0" in check_text(value, where):
        raise BadRecord(f"{where} holds {json.dumps(value)[:60]}; a path of an image file is accepted")
    path = Path(os.path.realpath(root / value))  # links are followed, so that none leads out of the folder
    if not path.is_relative_to(root):
        raise BadRecord(f"{where} is {value}, which leaves the data folder {root}; a path inside it is accepted")
    if not os.path.isfile(path):
        raise BadRecord(f"{where} is {value}, and {path} is no file; a path of an image file is accepted")
    return path


def check_image_paths(value: Any, root: Path, where: str) -> tuple[Path, ...]:
    """Returns the files that a path or a list of paths names; raises BadRecord as `check_image_path` does."""
    return tuple(check_image_path(path, root, where) for path in (value if isinstance(value, list) else [value]))


def kind(value: Any) -> str:
    """Says in words what type a JSON value has."""
    if value is None:
        return "null or missing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names[type(value)]
