"""ILVR's JSON-lines format: one record a line, image files beside it."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_jax.data.json_lines import JsonLines, check_fields, check_image_path, check_image_paths, check_text, kind
from ilvr_jax.data.records import BadRecord, Look, Record, Text

MAP_CELLS = {1: "start", 2: "goal", -1: "hole", 0: "ice"}


class IlvrSource(JsonLines):
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
        super().__init__(path, root, functools.partial(parse_record, plan_required=plan_required), on_bad_record)


def parse_record(fields: Mapping[str, Any], root: Path, name: str, plan_required: bool) -> Record:
    """Makes a record of a line's fields; raises BadRecord saying what is wrong and accepted, not in which line."""
    check_fields(fields, ("text_input", "image_input", *(("sequence_plan",) if plan_required else ())))
    answer, rows = fields.get("original_final_answer"), fields.get("map_desc")
    return Record(
        question=check_text(fields["text_input"], '"text_input"'),
        images=check_image_paths(fields["image_input"], root, '"image_input"'),
        steps=_steps(fields.get("sequence_plan", []), root, plan_required),
        answer=None if answer is None else check_text(answer, '"original_final_answer"'),
        map_desc=None if rows is None else check_map(rows),
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
        raise BadRecord(f'"sequence_plan" is {kind(plan)}; a list of steps is accepted')
    if required and not plan:
        raise BadRecord('"sequence_plan" has zero steps; at least one step is needed')
    steps: list[Text | Look] = []
    for number, step in enumerate(plan, start=1):
        where = f'step {number} of "sequence_plan"'
        if not isinstance(step, dict):
            raise BadRecord(f'{where} is {kind(step)}; an object with "type" is accepted')
        if step.get("type") == "text":
            content = check_text(step.get("content"), f'"content" of {where}')
            if steps and isinstance(steps[-1], Text):
                content = steps.pop().content + content
            steps.append(Text(content))
        elif step.get("type") == "latent":
            if not step.get("helper_image"):
                raise BadRecord(f'{where} is latent and has no image; a path in "helper_image" is needed')
            steps.append(Look(check_image_path(step["helper_image"], root, f'"helper_image" of {where}')))
        else:
            raise BadRecord(f'{where} has the type {json.dumps(step.get("type"))}; "text" and "latent" are accepted')
    return tuple(steps)
