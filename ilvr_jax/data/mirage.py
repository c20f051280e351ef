"""Mirage's JSON-lines format: one record per line, with paths of image files."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_jax.data.image_files import ImageFolder
from ilvr_jax.data.json_lines import JsonLines, check_fields, check_text, read_question
from ilvr_jax.data.markers import NUMBERED, OUTPUT_MARKER, place_images
from ilvr_jax.data.records import IMAGE_MARKER, BadRecord, Look, Record, Text


class MirageSource(JsonLines):
    """The records of a Mirage JSON-lines file, read from disk one at a time.

    Fields of a line: `text_input` (text, with or without `<image>` in the place of each input image), `image_input`
    (a path or a list of paths, relative to `root`), `text_output` (text with `<output_image>` in the place of each
    helper image) and `image_output` (as `image_input`; null or missing without looks). Markers and images pair up in
    their order, or by the numbers in the markers. Other fields are ignored. With `for_evaluation` helper images are not
    needed, and the answer's text is read without its markers.

    Opening checks every line, and that its image files are in `root` (default: the file's folder); pixels are decoded
    only when an image is loaded. `on_bad_record` and `follow_links` are those of JsonLines.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        on_bad_record: str = "error",
        for_evaluation: bool = False,
        follow_links: bool = True,
    ):
        parse = functools.partial(parse_record, for_evaluation=for_evaluation)
        super().__init__(path, root, parse, on_bad_record, follow_links)


def parse_record(fields: Mapping[str, Any], root: ImageFolder, name: str, for_evaluation: bool = False) -> Record:
    """Make a record of a line's fields; raise BadRecord without the name of the line."""
    check_fields(fields, ("text_input", "image_input", "text_output"))
    question, images = read_question(fields, root)
    if question.count(IMAGE_MARKER) not in (0, len(images)):
        raise BadRecord(
            f'"text_input" must have one {IMAGE_MARKER} for each of the {len(images)} images of "image_input", or none '
            f"at all, got {question.count(IMAGE_MARKER)}"
        )
    output = check_text(fields["text_output"], '"text_output"')
    if not output:
        raise BadRecord('"text_output" must be text, got an empty one')
    if for_evaluation:
        text = NUMBERED[OUTPUT_MARKER].sub("", output).replace(OUTPUT_MARKER, "")
        return Record(question, images, (Text(text),) if text else (), name=name)
    helper_images = root.find_all(fields.get("image_output"), '"image_output"')
    output, helper_images = place_images(output, helper_images, OUTPUT_MARKER, '"text_output"')
    texts = output.split(OUTPUT_MARKER)
    if len(texts) - 1 != len(helper_images):
        raise BadRecord(
            f'"text_output" must have one {OUTPUT_MARKER} for each of the {len(helper_images)} images of '
            f'"image_output", got {len(texts) - 1}'
        )
    steps: list[Text | Look] = [Text(texts[0])]
    for helper_image, text in zip(helper_images, texts[1:], strict=True):
        steps += [Look(helper_image), Text(text)]
    return Record(question, images, tuple(step for step in steps if step != Text("")), name=name)
