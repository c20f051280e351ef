"""Samples per second of a train step alone, and of the input pipeline alone.

python -m benchmarks.train_step --config=configs/base.py [--seconds=20]
"""

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from ilvr_jax.checkpoints.runs import build_run_model
from ilvr_jax.config.flags import read_config_flags
from ilvr_jax.data.sources import make_tokenizer, open_source
from ilvr_jax.data.tokenizer import special_tokens
from ilvr_jax.models.sharding import on_mesh, one_device, place_rows
from ilvr_jax.progress import Progress
from ilvr_jax.training.batches import open_iterator
from ilvr_jax.training.run import Run
from ilvr_jax.training.setup import init_params, make_step
from ilvr_jax.training.state import init_train_state

BATCHES = 32  # held in memory and reused in turn, so that the step never waits


def samples_per_second(consume: Callable[[], int], seconds: float) -> float:
    """Return the rate over some seconds of calls of `consume`, each of which returns its number of samples."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += consume()
    return count / (time.perf_counter() - start)


def rates(run: Run, stage: str, seconds: float) -> tuple[float, float]:
    """Return the samples per second of the pipeline without a step, and of the step without the pipeline."""
    optimizer, step = run.steps[stage]
    params = init_params(run.config, run.workdir, run.model, None, run.mesh)
    state = init_train_state(params, optimizer, run.config.stages[stage], jax.random.key(0), run.mesh)
    with contextlib.closing(open_iterator(run, stage, 0, state.params["vision"])) as iterator:
        batches = [place_rows(batch, run.mesh) for batch in itertools.islice(iterator, BATCHES)]
        made = samples_per_second(lambda: len(next(iterator).record), seconds)
    for batch in {batch.layout: batch for batch in batches}.values():  # compiles each bucket's step
        state, _ = step(state, batch)
    turns = itertools.cycle(batches)

    def take_step() -> int:
        nonlocal state
        batch = next(turns)
        state, values = step(state, batch)
        jax.block_until_ready(values)
        return len(batch.record)

    return made, samples_per_second(take_step, seconds)


def main() -> None:
    """Time each stage of a config, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    options = read_config_flags(parser)
    config = options.config
    table = Table("stage", "batch", "pipeline alone, samples/s", "step alone, samples/s", "ratio")
    with tempfile.TemporaryDirectory() as folder, Progress(Path(folder) / "log") as progress:
        source = open_source(config.data, config.seed)
        tokenizer = make_tokenizer(config, source)
        model = build_run_model(config, Path(folder), tokenizer)
        mesh = one_device()
        special = special_tokens(tokenizer)
        for name in config.stages:
            steps = {name: make_step(config, name, model, mesh)}
            run = Run(config, Path(folder), source, None, tokenizer, special, model, mesh, steps, progress)
            with on_mesh(mesh):
                made, taken = rates(run, name, options.seconds)
            table.add_row(
                name, str(config.stages[name].batch_size), f"{made:.0f}", f"{taken:.1f}", f"{made / taken:.1f}"
            )
    console = Console(width=120)
    console.print(table)
    console.print(machine(["jax", "grain", "numpy"]))


if __name__ == "__main__":
    main()
