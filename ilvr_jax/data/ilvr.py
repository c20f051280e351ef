"""ILVR's JSON-lines format: one record per line, with paths of image files."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_jax.data.image_files import ImageFolder
from ilvr_jax.data.json_lines import JsonLines, as_answer, check_fields, check_text, kind, read_question
from ilvr_jax.data.records import BadRecord, Look, Record, Text
from ilvr_jax.errors import listed, quote

MAP_CELLS = {1: "start", 2: "goal", -1: "hole", 0: "ice"}


class IlvrSource(JsonLines):
    """The records of an ILVR JSON-lines file, read from disk one at a time.

    Fields of a line: `text_input` (text), `image_input` (a path or a list of paths, relative to `root`) and
    `sequence_plan` (steps `{"type": "text", "content": ...}` and `{"type": "latent", "helper_image": path}`);
    optional `original_final_answer` (read by `as_answer`) and `map_desc` (rows of 1 start, 2 goal, -1 hole, 0 ice).
    Other fields are ignored. Consecutive texts are joined. With `plan_required=False` a line may have no steps; with
    `for_evaluation` as well, and only the texts of its steps are read, since no look is shown.

    Opening checks every line, and that its image files are in `root` (default: the file's folder); pixels are decoded
    only when an image is loaded. `on_bad_record` and `follow_links` are those of JsonLines.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        plan_required: bool = True,
        on_bad_record: str = "error",
        for_evaluation: bool = False,
        follow_links: bool = True,
    ):
        parse = functools.partial(parse_record, plan_required=plan_required, for_evaluation=for_evaluation)
        super().__init__(path, root, parse, on_bad_record, follow_links)


def parse_record(
    fields: Mapping[str, Any], root: ImageFolder, name: str, plan_required: bool, for_evaluation: bool = False
) -> Record:
    """Make a record of a line's fields; raise BadRecord without the name of the line."""
    plan_required = plan_required and not for_evaluation
    check_fields(fields, ("text_input", "image_input", *(("sequence_plan",) if plan_required else ())))
    question, images = read_question(fields, root)
    plan, rows = fields.get("sequence_plan"), fields.get("map_desc")
    return Record(
        question=question,
        images=images,
        steps=_texts(plan) if for_evaluation else _steps(plan, root, plan_required),
        answer=as_answer(fields.get("original_final_answer"), '"original_final_answer"'),
        map_desc=None if rows is None else check_map(rows),
        name=name,
    )


def check_map(rows: Any) -> tuple[tuple[int, ...], ...]:
    """Return a map as tuples of 1 start, 2 goal, -1 hole and 0 ice.

    Raises BadRecord unless its rows have equal length and hold only these, with one start and one goal.
    """
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, list | tuple) for row in rows):
        raise BadRecord(f'"map_desc" must be rows of 1 start, 2 goal, -1 hole and 0 ice, got {quote(rows)}')
    if not rows[0] or len({len(row) for row in rows}) > 1:
        raise BadRecord(f'"map_desc" must have rows of equal length, got {listed(str(len(row)) for row in rows)} cells')
    cells = [cell for row in rows for cell in row]
    for cell in cells:
        if type(cell) is not int or cell not in MAP_CELLS:
            raise BadRecord(f'"map_desc" must have cells of 1 start, 2 goal, -1 hole and 0 ice, got {quote(cell)}')
    for value in (1, 2):
        if cells.count(value) != 1:
            raise BadRecord(f'"map_desc" must have one {MAP_CELLS[value]} ({value}), got {cells.count(value)}')
    return tuple(map(tuple, rows))


def _steps(plan: Any, root: ImageFolder, required: bool) -> tuple[Text | Look, ...]:
    if plan is None and not required:
        return ()
    if not isinstance(plan, list):
        raise BadRecord(f'"sequence_plan" must be a list of steps, got {kind(plan)}')
    if required and not plan:
        raise BadRecord('"sequence_plan" must have at least one step, got none')
    steps: list[Text | Look] = []
    texts: list[str] = []  # since the last look
    for number, step in enumerate(plan, start=1):
        where = f'step {number} of "sequence_plan"'
        if not isinstance(step, dict):
            raise BadRecord(f'{where} must be an object with "type", got {kind(step)}')
        if step.get("type") == "text":
            texts.append(check_text(step.get("content"), f'"content" of {where}'))
        elif step.get("type") == "latent":
            if not step.get("helper_image"):
                raise BadRecord(f'{where} is latent and must have the path of an image in "helper_image", got none')
            if texts:
                steps.append(Text("".join(texts)))
                texts = []
            steps.append(Look(root.find(step["helper_image"], f'"helper_image" of {where}')))
        else:
            raise BadRecord(f'{where} must have the type "text" or "latent", got {quote(step.get("type"))}')
    if texts:
        steps.append(Text("".join(texts)))
    check_text("".join(step.content for step in steps if isinstance(step, Text)), 'the text of "sequence_plan"')
    return tuple(steps)


def _texts(plan: Any) -> tuple[Text, ...]:
    """Return the joined texts of a plan, ignoring all its other steps."""
    steps = [step for step in plan if isinstance(step, dict)] if isinstance(plan, list) else []
    texts = [step["content"] for step in steps if step.get("type") == "text" and isinstance(step.get("content"), str)]
    text = check_text("".join(texts), 'the text of "sequence_plan"')
    return (Text(text),) if text else ()
