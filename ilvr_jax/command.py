"""The shell that all commands share: errors of users become one sentence and an exit status."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence

from absl import logging

from ilvr_jax.errors import InputError, one_line
from ilvr_jax.files import FULL

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser without abbreviations, whose errors are one line of bounded length."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        super().error(one_line(message))


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Wraps a command's main function, which takes the arguments (None: the process's own) and returns its exit status.

    Bad input (InputError, a file that cannot be read or written) ends it with 2, a full disk with 1, Ctrl-C with 130,
    each after one sentence on stderr. Errors of other kinds are faults of this package: their traceback is wanted.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        logging.set_verbosity(logging.FATAL)  # avoid printing library errors twice
        try:
            return main(arguments)
        except InputError as error:
            return fail(BAD_INPUT, error)
        except BrokenPipeError:  # who read the output has ended: nothing is left to write, at exit either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except OSError as error:
            return fail(FAILED if error.errno in FULL else BAD_INPUT, describe(error))
        except KeyboardInterrupt:
            return fail(STOPPED, "stopped")

    return run


def fail(status: int, sentence: object) -> int:
    """Prints why a command ends and returns its exit status."""
    print(one_line(str(sentence)), file=sys.stderr)
    return status


def describe(error: OSError) -> str:
    """Returns one sentence for an error of the file system, which names the file where that is known."""
    problem = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL:
        return f"no disk space to write {error.filename or 'the output'} ({problem}); free some and repeat the command"
    return f"{error.filename} cannot be read or written: {problem}" if error.filename else problem
