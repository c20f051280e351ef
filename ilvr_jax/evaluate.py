"""python -m ilvr_jax.evaluate: how often a trained model reaches the goal on the maps of a file."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict
from rich.console import Console

from ilvr_jax.data.ilvr import IlvrSource
from ilvr_jax.data.records import BadRecord
from ilvr_jax.inference.evaluation import Evaluation, decode_settings, evaluate, prompt_settings, samples_path
from ilvr_jax.models.sharding import make_mesh, on_mesh
from ilvr_jax.reports.tables import success_table
from ilvr_jax.training.checkpoints import NoCheckpoint, restore_for_inference
from ilvr_jax.training.configuration import (
    BadConfig,
    blame,
    from_json,
    read_command,
    read_config,
    resolve_path,
    to_json,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 done, 1 not written, 2 bad input, 130 stopped."""
    logging.set_verbosity(logging.FATAL)  # libraries log the errors that they raise: each is to be said once
    parser = argparse.ArgumentParser(prog="python -m ilvr_jax.evaluate", description=__doc__)
    parser.add_argument("--data", type=Path, help="JSON lines with a map_desc each (default: eval.data of the config)")
    parser.add_argument("--json", type=Path, help="where to write the figures; each answer goes into a file beside it")
    parser.add_argument("--stage", help="the stage whose checkpoint is used (default: the last that has one)")
    try:
        options = read_command(parser, arguments)
        data = options.data or (resolve_path(options.config.eval.data) if options.config.eval.data else None)
        if data is None:
            raise BadConfig("there are no maps to evaluate on; --data or eval.data takes a JSON-lines file")
        with blame("data"):
            prompt_settings(options.config)
        with blame("eval"):
            decode_settings(options.config)
        check_same_run(options.config, options.workdir)
        source = IlvrSource(data, plan_required=False)
        if options.json:
            check_writable(options.json)
        with blame("mesh"):
            mesh = make_mesh(options.config.mesh)
        restored = restore_for_inference(options.workdir, options.config, options.stage, mesh)
        console = Console()
        with on_mesh(mesh):
            evaluation = evaluate(options.config, source, *restored, console=console, mesh=mesh)
    except (BadConfig, BadRecord, NoCheckpoint) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    show(evaluation, options.stage or options.workdir.name, console)
    if options.json:
        try:
            evaluation.write(options.json)
        except OSError as error:
            print(f"{options.json} could not be written: {error.strerror}", file=sys.stderr)
            return 1
        console.print(f"Written: {options.json} and {samples_path(options.json)}", highlight=False, soft_wrap=True)
    return 0


def check_same_run(config: ConfigDict, workdir: Path) -> None:
    """Raises BadConfig if the workdir is no run, or one with another model or other prompts than the config's."""

    def shown(of: ConfigDict) -> dict:
        sections = {"model": of.model, "tokenizer": of.tokenizer, "latents.latent_size": of.latents.latent_size}
        return sections | {f"data.{key}": of.data[key] for key in ("image_scale", "min_pixels", "max_pixels", "system")}

    theirs, ours = shown(read_config(workdir)), shown(from_json(to_json(config)))
    differing = [key for key, value in ours.items() if theirs[key] != value]
    if differing:
        raise BadConfig(
            f"{workdir} was made with another config: {', '.join(differing)} differ from what is in its config.json; "
            "give the config of the run"
        )


def show(evaluation: Evaluation, name: str, console: Console) -> None:
    """Prints the table of an evaluation and its counts."""
    summary = evaluation.summary()
    console.print(success_table({name: summary}))
    console.print(
        f"{summary['samples']} maps: {summary['unparsed']} answers unparsed, {summary['latent_segments']} latent "
        f"segments with {summary['latent_slots']} slots decoded, {summary['seconds']:.1f} seconds",
        highlight=False,
    )


def check_writable(path: Path) -> None:
    """Raises BadConfig if a file cannot be written, before the work is done that it is for."""
    if path.is_dir():
        raise BadConfig(f"--json {path} is a folder; a path for a file is accepted")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadConfig(f"--json {path} cannot be written: {error.strerror}; a path for a file is accepted") from error


if __name__ == "__main__":
    sys.exit(main())
