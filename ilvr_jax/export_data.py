"""python -m ilvr_jax.export_data --config=configs/base.py: generated FrozenLake records as a data set."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import rich.console
import rich.progress

from ilvr_jax.command import ArgumentParser, command, path_flag
from ilvr_jax.config.experiments import resolve_path
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.config.flags import read_config_flags
from ilvr_jax.data.export import write_records
from ilvr_jax.data.frozen_lake.drawing import CELL_PIXELS
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.errors import InputError
from ilvr_jax.interrupts import stop_sentence


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 not written, 2 bad input, 130 stopped."""
    parser = ArgumentParser(
        prog="python -m ilvr_jax.export_data", description="Write generated FrozenLake records and their images."
    )
    parser.add_argument("--count", required=True, type=int, help="number of records")
    parser.add_argument("--out", required=True, type=path_flag, help="the folder to write to")
    parser.add_argument("--seed", type=int, help="of the generator (default: the config's)")
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
    """Write the records of the config to the folder and print how to read them."""
    config, seed = options.config, options.config.seed if options.seed is None else options.seed
    settings = config.data.frozen_lake
    settings = dataclasses.replace(
        settings, cell_pixels=CELL_PIXELS, exclude=tuple(str(resolve_path(path)) for path in settings.exclude)
    )
    source = FrozenLakeSource(settings, seed, options.count)
    console = rich.console.Console(stderr=True)
    records = (source[index] for index in range(len(source)))
    count = write_records(rich.progress.track(records, "Exporting", total=len(source), console=console), options.out)
    print(
        f"{count} records written to {options.out / 'train.jsonl'}, {CELL_PIXELS} pixels per cell; "
        f"data.image_scale={28 / CELL_PIXELS} makes each cell one vision token"
    )


if __name__ == "__main__":
    sys.exit(main())
