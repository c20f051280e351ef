"""Train a model through the stages of a config: python -m ilvr_jax.train --config=configs/base.py"""

import sys
from collections.abc import Sequence

from ilvr_jax.checkpoints.manager import DiskFull, NoCheckpoint
from ilvr_jax.command import FAILED, ArgumentParser, command, fail
from ilvr_jax.config.flags import read_command
from ilvr_jax.distributed import add_flags, initialize_distributed, is_main
from ilvr_jax.files import named_errors
from ilvr_jax.interrupts import stop_sentence
from ilvr_jax.training.divergence import Diverged
from ilvr_jax.training.interruption import Interrupted
from ilvr_jax.training.loop import train
from ilvr_jax.training.summary import MAPS

STOPPED = "stopped outside a training step; the same command resumes from the newest checkpoint"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 bad input, 1 failed, 128 + n stopped by signal n."""
    parser = ArgumentParser(prog="python -m ilvr_jax.train", description="Train the stages of a config.")
    add_flags(parser)
    try:
        options = read_command(parser, arguments)
        initialize_distributed(options)
        with stop_sentence(lambda: STOPPED), named_errors(options.workdir):
            summary = train(options.config, options.workdir)
    except (DiskFull, Diverged, NoCheckpoint) as error:
        return fail(FAILED, error)
    except Interrupted as error:
        return fail(error.exit_status, error)
    if not is_main():
        return 0
    for name, stage in summary["stages"].items():
        if "goodput" in stage:
            skipped = f" ({stage['skipped_updates']} skipped)" if stage["skipped_updates"] else ""
            print(
                f"{name}: {stage['steps']} steps{skipped}, {stage['seconds']:.0f} s, {stage['goodput']:.0%} of them in "
                f"steps, {stage['compilations']} compilations"
            )
    if summary["skipped_records"] or summary["skipped_lines"]:
        print(f"skipped: {summary['skipped_records']} records, {len(summary['skipped_lines'])} lines of the data file")
    tasks = {stage["evaluation"]["task"] for stage in summary["stages"].values() if "evaluation" in stage}
    results = ", evaluations" * bool(tasks) + ", solutions.png" * (MAPS in tasks)
    print(f"Results written to {summary['workdir']}: checkpoints, metrics.jsonl, tensorboard{results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
