"""python -m ilvr_jax.data export | check: writes generated FrozenLake records as a data set, or checks a data set."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import rich.console
import rich.progress
from PIL import Image

from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.data.drawing import CELL_PIXELS
from ilvr_jax.data.frozen_lake import FrozenLakeSource, frozen_lake_settings
from ilvr_jax.data.records import Record, Text
from ilvr_jax.errors import InputError
from ilvr_jax.files import locked_folder
from ilvr_jax.interrupts import stop_sentence
from ilvr_jax.training.configuration import BadConfig, read_config_flags, resolve_path


def export(records: Iterable[Record], folder: Path) -> int:
    """Writes records as `folder`/train.jsonl and PNG files beside it, and returns how many.

    train.jsonl appears when all are written. Raises InputError if there is one already, InUse if another process writes
    into the folder.
    """
    path, count = folder / "train.jsonl", 0
    with locked_folder(folder):
        if path.exists():
            raise InputError(f"{path} exists: give a folder without a train.jsonl")
        (folder / "images").mkdir(exist_ok=True)
        unfinished = path.with_suffix(".jsonl.partial")
        with unfinished.open("w", encoding="utf-8") as file:
            for count, record in enumerate(records, start=1):
                file.write(json.dumps(_fields(record, folder, count - 1)) + "\n")
        unfinished.replace(path)
    return count


def _fields(record: Record, folder: Path, number: int) -> dict:
    looks = [step for step in record.steps if not isinstance(step, Text)]
    pictures = [*record.images, *(look.helper_image for look in looks)]
    names = [f"images/{number:06d}_{index}.png" for index in range(len(pictures))]
    for name, pixels in zip(names, pictures, strict=True):
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


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 130 stopped, others as `export_command` and `check.main` say."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = ArgumentParser(prog="python -m ilvr_jax.data", description=__doc__)
    parser.add_argument("command", choices=["export", "check"], help="its flags: export --help, check --help")
    if parser.parse_args(arguments[:1]).command == "export":
        return export_command(arguments[1:])
    with stop_sentence(lambda: "stopped; no page was written"):
        from ilvr_jax.data import check  # all that training imports takes seconds

        return check.main(arguments[1:])


def export_command(arguments: Sequence[str]) -> int:
    """Writes generated FrozenLake records and their images; returns 0 done, 1 not written, 2 bad input, 130 stopped."""
    parser = ArgumentParser(prog="python -m ilvr_jax.data export", description=export_command.__doc__)
    parser.add_argument("--count", required=True, type=int, help="how many records")
    parser.add_argument("--out", required=True, type=path_flag, help="the folder to write to")
    parser.add_argument("--seed", type=int, help="of the generator (default: the config's seed)")
    options = read_config_flags(parser, arguments)
    if options.count < 1:
        raise BadConfig(f"--count must be at least 1, got {options.count}")
    if options.seed is not None and options.seed < 0:
        raise BadConfig(f"--seed must be at least 0, got {options.seed}")
    try:
        with stop_sentence(lambda: f"stopped; {options.out} is incomplete and has no train.jsonl"):
            _export_config(options)
    except ValueError as error:
        raise InputError(error) from error
    return 0


def _export_config(options: argparse.Namespace) -> None:
    config, seed = options.config, options.config.seed if options.seed is None else options.seed
    settings = frozen_lake_settings(config.data.frozen_lake)
    settings = dataclasses.replace(
        settings, cell_pixels=CELL_PIXELS, exclude=tuple(str(resolve_path(path)) for path in settings.exclude)
    )
    source = FrozenLakeSource(settings, seed, options.count)
    console = rich.console.Console(stderr=True)
    records = (source[index] for index in range(len(source)))
    count = export(rich.progress.track(records, "Exporting", total=len(source), console=console), options.out)
    print(
        f"{count} records in {options.out / 'train.jsonl'}: {CELL_PIXELS} pixels a cell, "
        f"read with data.image_scale={28 / CELL_PIXELS} for one vision token a cell"
    )


if __name__ == "__main__":
    sys.exit(main())
