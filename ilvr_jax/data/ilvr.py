"""ILVR's JSON-lines format: one record a line, image files beside it."""

import json
import os
from array import array
from pathlib import Path
from typing import Any

from ilvr_jax.data.records import BadRecord, Look, Record, Text

MAP_CELLS = {1: "start", 2: "goal", -1: "hole", 0: "ice"}


class IlvrSource:
    """The records of an ILVR JSON-lines file, read from disk one at a time.

    Fields of a line: `text_input` (text), `image_input` (a path or a list of paths, relative to `root`) and
    `sequence_plan` (steps `{"type": "text", "content": ...}` and `{"type": "latent", "helper_image": path}`);
    optional `original_final_answer` (text) and `map_desc` (rows of 1 start, 2 goal, -1 hole, 0 ice). Other
    fields are left alone. Texts that follow each other are joined. With `plan_required=False`, for evaluation
    files, a line may do without steps.

    Every line is checked here, and that its image files exist inside `root` (default: the file's folder);
    pixels are looked at only when an image is loaded. `on_bad_record` says what a bad line does: "error" raises
    BadRecord, "skip" leaves the line out and adds the sentence to `skipped`.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        plan_required: bool = True,
        on_bad_record: str = "error",
    ):
        self.path = Path(path)
        self.root = Path(os.path.realpath(root or self.path.parent))
        self.plan_required = plan_required
        self.skipped: list[str] = []
        self._offsets, self._lines = array("q"), array("q")
        if not self.path.is_file():
            raise BadRecord(f"{self.path}: there is no such file; a JSON-lines file is accepted")
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        self._parse(line, number)
                    except BadRecord as error:
                        if on_bad_record == "error":
                            raise
                        self.skipped.append(str(error))
                    else:
                        self._offsets.append(offset)
                        self._lines.append(number)
                offset += len(line)
        if not self._offsets:
            raise BadRecord(f"{self.path}: holds no usable record; one JSON object a line is accepted")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline(), self._lines[index])

    def _parse(self, line: bytes, number: int) -> Record:
        name = f"{self.path.name} line {number}"
        try:
            return parse_record(line, self.root, self.plan_required, name)
        except BadRecord as error:
            raise BadRecord(f"{name}: {error}") from error


def parse_record(line: bytes, root: Path, plan_required: bool, name: str) -> Record:
    """Reads one line. Raises BadRecord saying what is wrong and what is accepted, without the line's name."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is not JSON in UTF-8 ({error}); one JSON object is accepted") from error
    if not isinstance(fields, dict):
        raise BadRecord(f"is {_kind(fields)}; one JSON object is accepted")
    required = ("text_input", "image_input", *(("sequence_plan",) if plan_required else ()))
    for field in required:
        if field not in fields:
            raise BadRecord(f'lacks the field "{field}"; {", ".join(required)} are needed')
    images = fields["image_input"]
    return Record(
        question=_text(fields["text_input"], '"text_input"'),
        images=tuple(
            _image_path(image, root, '"image_input"') for image in (images if isinstance(images, list) else [images])
        ),
        steps=_steps(fields.get("sequence_plan", []), root, plan_required),
        answer=_text(fields["original_final_answer"], '"original_final_answer"')
        if fields.get("original_final_answer") is not None
        else None,
        map_desc=check_map(fields["map_desc"]) if fields.get("map_desc") is not None else None,
        name=name,
    )


def check_map(rows: Any) -> tuple[tuple[int, ...], ...]:
    """Returns a map as tuples of 1 start, 2 goal, -1 hole and 0 ice.

    Raises BadRecord if it is not rows of equal length of these, with one start and one goal.
    """
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, list | tuple) for row in rows):
        raise BadRecord('"map_desc" is not a list of rows; rows of 1 start, 2 goal, -1 hole, 0 ice are accepted')
    if not rows[0] or len({len(row) for row in rows}) > 1:
        raise BadRecord(f'"map_desc" has rows of {[len(row) for row in rows]} cells; rows of equal length are accepted')
    cells = [cell for row in rows for cell in row]
    for cell in cells:
        if type(cell) is not int or cell not in MAP_CELLS:
            raise BadRecord(f'"map_desc" has a cell {cell!r}; 1 start, 2 goal, -1 hole and 0 ice are accepted')
    for value in (1, 2):
        if cells.count(value) != 1:
            found = cells.count(value) or "no"
            raise BadRecord(f'"map_desc" has {found} {MAP_CELLS[value]} ({value}); a map has exactly one')
    return tuple(map(tuple, rows))


def _steps(plan: Any, root: Path, required: bool) -> tuple[Text | Look, ...]:
    if not isinstance(plan, list):
        raise BadRecord(f'"sequence_plan" is {_kind(plan)}; a list of steps is accepted')
    if required and not plan:
        raise BadRecord('"sequence_plan" has zero steps; at least one step is needed')
    steps: list[Text | Look] = []
    for number, step in enumerate(plan, start=1):
        where = f'step {number} of "sequence_plan"'
        if not isinstance(step, dict):
            raise BadRecord(f'{where} is {_kind(step)}; an object with "type" is accepted')
        if step.get("type") == "text":
            content = _text(step.get("content"), f'"content" of {where}')
            if steps and isinstance(steps[-1], Text):
                content = steps.pop().content + content
            steps.append(Text(content))
        elif step.get("type") == "latent":
            if not step.get("helper_image"):
                raise BadRecord(f'{where} is latent and has no image; a path in "helper_image" is needed')
            steps.append(Look(_image_path(step["helper_image"], root, f'"helper_image" of {where}')))
        else:
            raise BadRecord(f'{where} has the type {json.dumps(step.get("type"))}; "text" and "latent" are accepted')
    return tuple(steps)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{where} is {_kind(value)}; text is accepted")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRecord(f"{where} holds half of a surrogate pair; Unicode text is accepted")
    return value


def _image_path(value: Any, root: Path, where: str) -> Path:
    if not isinstance(value, str) or not value or "\0" in _text(value, where):
        raise BadRecord(f"{where} holds {json.dumps(value)[:60]}; a path of an image file is accepted")
    path = Path(os.path.realpath(root / value))  # links are followed, so that none leads out of the folder
    if not path.is_relative_to(root):
        raise BadRecord(f"{where} is {value}, which leaves the data folder {root}; a path inside it is accepted")
    if not os.path.isfile(path):
        raise BadRecord(f"{where} is {value}, and {path} is no file; a path of an image file is accepted")
    return path


def _kind(value: Any) -> str:
    if value is None:
        return "null or missing"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names[type(value)]
