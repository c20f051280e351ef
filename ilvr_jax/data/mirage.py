"""Mirage's JSON-lines format: one record a line, image files beside it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_jax.data.image_files import ImageFolder, check_image_paths
from ilvr_jax.data.json_lines import JsonLines, check_fields, check_text
from ilvr_jax.data.markers import NUMBERED, OUTPUT_MARKER, place_images
from ilvr_jax.data.records import IMAGE_MARKER, BadRecord, Look, Record, Text


class MirageSource(JsonLines):
    """The records of a Mirage JSON-lines file, read from disk one at a time.

    Fields of a line: `text_input` (text, with `<image>` where an input image belongs, or without it), `image_input`
    (a path or a list of paths, relative to `root`), `text_output` (text, with `<output_image>` where a helper image
    belongs) and `image_output` (as `image_input`; null or absent without a look). Markers and images pair up in their
    order, or by their numbers. Other fields are ignored. With `for_evaluation` no helper image is needed, and the
    answer's text is read without its markers.

    Every line is checked here, and that its image files are in `root` (default: the file's folder); pixels are
    decoded only when an image is loaded. `on_bad_record` and `follow_links` are as in JsonLines.
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
    """Makes a record of a line's fields; raises BadRecord, which states what is wrong, not in which line."""
    check_fields(fields, ("text_input", "image_input", "text_output"))
    question, images = place_images(
        check_text(fields["text_input"], '"text_input"'),
        check_image_paths(fields["image_input"], root, '"image_input"'),
        IMAGE_MARKER,
        '"text_input"',
    )
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
    helper_images = check_image_paths(fields.get("image_output"), root, '"image_output"')
    output, helper_images = place_images(output, helper_images, OUTPUT_MARKER, '"text_output"')
    texts = output.split(OUTPUT_MARKER)
    if len(texts) - 1 != len(helper_images):
        raise BadRecord(
            f'"text_output" must have one {OUTPUT_MARKER} where each of the {len(helper_images)} images of '
            f'"image_output" belongs, got {len(texts) - 1}'
        )
    steps: list[Text | Look] = [Text(texts[0])]
    for helper_image, text in zip(helper_images, texts[1:], strict=True):
        steps += [Look(helper_image), Text(text)]
    return Record(question, images, tuple(step for step in steps if step != Text("")), name=name)
