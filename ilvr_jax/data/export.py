"""Writing records as a data set of the ILVR format."""

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from ilvr_jax.data.json_lines import all_images
from ilvr_jax.data.records import Record, Text
from ilvr_jax.errors import InputError
from ilvr_jax.files import locked_folder


def write_records(records: Iterable[Record], folder: Path) -> int:
    """Write records to train.jsonl in a folder, with PNG files beside it, and return their number.

    train.jsonl appears when it is complete. Raises InputError if it exists already, InUse if another process writes to
    the folder.
    """
    path, count = folder / "train.jsonl", 0
    with locked_folder(folder):
        if path.exists():
            raise InputError(f"{folder} must be a folder without a train.jsonl, but has one")
        (folder / "images").mkdir(exist_ok=True)
        unfinished = path.with_suffix(".jsonl.partial")
        with unfinished.open("w", encoding="utf-8") as file:
            for count, record in enumerate(records, start=1):
                file.write(json.dumps(_fields(record, folder, count - 1)) + "\n")
        unfinished.replace(path)
    return count


def _fields(record: Record, folder: Path, number: int) -> dict:
    """Write the images of a record and return the fields of its line."""
    images = all_images(record)
    names = [f"images/{number:06d}_{index}.png" for index in range(len(images))]
    for name, pixels in zip(names, images, strict=True):
        Image.fromarray(pixels).save(folder / name)
    helper_names = iter(names[len(record.images) :])
    return {
        "text_input": record.question,
        "image_input": names[: len(record.images)],
        "sequence_plan": [
            {"type": "text", "content": step.content}
            if isinstance(step, Text)
            else {"type": "latent", "helper_image": next(helper_names)}
            for step in record.steps
        ],
        "original_final_answer": record.answer,
        "map_desc": record.map_desc,
    }
