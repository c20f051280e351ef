"""Trains a model through the stages of a config: python -m ilvr_jax.train --config=configs/base.py"""

import argparse
import errno
import sys
from collections.abc import Sequence

from absl import logging

from ilvr_jax.data.records import BadRecord
from ilvr_jax.interrupts import STOPPED, stop_sentence
from ilvr_jax.training.checkpoints import DiskFull, NoCheckpoint
from ilvr_jax.training.configuration import BadConfig, read_command
from ilvr_jax.training.divergence import Diverged
from ilvr_jax.training.interruption import Interrupted
from ilvr_jax.training.loop import train
from ilvr_jax.training.processes import add_flags, is_main, join

STOPPED_OUTSIDE = "stopped outside a training step; the same command resumes from the newest checkpoint"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 done, 2 bad input, 1 failed, 128 + n stopped by signal n."""
    logging.set_verbosity(logging.FATAL)  # libraries log the errors that they raise: each is to be said once
    parser = argparse.ArgumentParser(prog="python -m ilvr_jax.train", description="Trains through a config's stages.")
    add_flags(parser)
    try:
        options = read_command(parser, arguments)
        join(options)
        with stop_sentence(lambda: STOPPED_OUTSIDE):
            summary = train(options.config, options.workdir)
    except (BadConfig, BadRecord) as error:
        return fail(2, error)
    except (DiskFull, Diverged, NoCheckpoint) as error:
        return fail(1, error)
    except Interrupted as error:
        return fail(error.exit_status, error)
    except KeyboardInterrupt as error:
        return fail(STOPPED, str(error) or "stopped")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return fail(1, f"no disk space to write {error.filename or options.workdir}; free some and repeat the command")
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
        print(f"left out: {summary['skipped_records']} records, {len(summary['skipped_lines'])} lines of the data file")
    evaluated = any("evaluation" in stage for stage in summary["stages"].values())
    results = ", evaluations, solutions.png" if evaluated else ""
    print(f"everything is in {summary['workdir']}: checkpoints, metrics.jsonl, tensorboard{results}")
    return 0


def fail(status: int, sentence: object) -> int:
    """Prints why the command ends and returns its exit status."""
    print(sentence, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
