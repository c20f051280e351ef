"""Mirage's JSON-lines format: one record a line, image files beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_jax.data.json_lines import JsonLines, check_fields, check_image_paths, check_text
from ilvr_jax.data.records import IMAGE_MARKER, BadRecord, Look, Record, Text

OUTPUT_MARKER = "<output_image>"


class MirageSource(JsonLines):
    """The records of a Mirage JSON-lines file, read from disk one at a time.

    Fields of a line: `text_input` (text, with `<image>` where an input image belongs, or without it), `image_input`
    and `image_output` (a path or a list of paths, relative to `root`) and `text_output` (text, with `<output_image>`
    where a helper image belongs). Markers and images pair up in their order. Other fields are left alone.

    Every line is checked here, and that its image files exist inside `root` (default: the file's folder);
    pixels are looked at only when an image is loaded. `on_bad_record` says what a bad line does: "error" raises
    BadRecord, "skip" leaves the line out and adds the sentence to `skipped`.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None, on_bad_record: str = "error"):
        super().__init__(path, root, parse_record, on_bad_record)


def parse_record(fields: Mapping[str, Any], root: Path, name: str) -> Record:
    """Makes a record of a line's fields; raises BadRecord saying what is wrong and accepted, not in which line."""
    check_fields(fields, ("text_input", "image_input", "image_output", "text_output"))
    question = check_text(fields["text_input"], '"text_input"')
    output = check_text(fields["text_output"], '"text_output"')
    images = check_image_paths(fields["image_input"], root, '"image_input"')
    helper_images = check_image_paths(fields["image_output"], root, '"image_output"')
    if question.count(IMAGE_MARKER) not in (0, len(images)):
        raise BadRecord(
            f'"text_input" has {question.count(IMAGE_MARKER)} {IMAGE_MARKER} and "image_input" lists {len(images)}; '
            f"one {IMAGE_MARKER} for each input image, or none at all, is accepted"
        )
    texts = output.split(OUTPUT_MARKER)
    if len(texts) - 1 != len(helper_images):
        raise BadRecord(
            f'"text_output" has {len(texts) - 1 or "no"} {OUTPUT_MARKER} and "image_output" lists '
            f"{len(helper_images)}; one {OUTPUT_MARKER} for each output image, where it belongs, is accepted"
        )
    if not output:
        raise BadRecord('"text_output" is empty; text is accepted')
    steps: list[Text | Look] = [Text(texts[0])]
    for helper_image, text in zip(helper_images, texts[1:], strict=True):
        steps += [Look(helper_image), Text(text)]
    return Record(question, images, tuple(step for step in steps if step != Text("")), name=name)
