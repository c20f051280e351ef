"""The shell that all commands share: errors of users become one sentence and an exit status."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import logging

from ilvr_jax.errors import InputError, one_line, quote
from ilvr_jax.files import FULL
from ilvr_jax.interrupts import STOPPED

DONE, FAILED, BAD_INPUT = 0, 1, 2


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser without abbreviations, whose errors are one line of bounded length, without the usage."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        self.exit(BAD_INPUT, one_line(f"{self.prog}: error: {message}") + "\n")


def path_flag(text: str) -> Path:
    """Returns the path that a flag holds; for an empty one, which would be the current folder, argparse names it."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, got {quote(text)}")
    return Path(text)


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Wraps a command's main function, which takes the arguments (None: the process's own) and returns its exit status.

    Bad input (InputError, a file that cannot be read or written) ends it with 2, a full disk with 1, Ctrl-C with 130,
    each after one sentence on stderr. Errors of other kinds are faults of this package: their traceback is wanted.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        logging.set_verbosity(logging.FATAL)  # avoid printing library errors twice
        try:
            check_encoding(sys.argv[1:] if arguments is None else arguments)
            status = main(arguments)
            if sys.stdout is not None:  # none where the caller closed it
                sys.stdout.flush()
            return status
        except InputError as error:
            return fail(BAD_INPUT, error)
        except BrokenPipeError:  # who read the output has ended
            _discard_output()
            return FAILED
        except OSError as error:
            if error.filename is None:
                _discard_output()
            return fail(FAILED if error.errno in FULL else BAD_INPUT, describe(error))
        except KeyboardInterrupt as error:  # where `interrupts` does not end the process: it is not ours alone
            return fail(STOPPED, str(error) or "stopped")
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA's name of it
                raise
            return fail(FAILED, f"the memory is full; ask for smaller batches, images or answers ({error})")

    return run


def check_encoding(arguments: Sequence[str]) -> None:
    """Raises InputError for an argument that is no UTF-8 text: no file, prompt or message could hold it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"each argument must be text in UTF-8, got {quote(os.fsencode(argument))}") from error


def _discard_output() -> None:
    """Lets the interpreter write the rest of its output to nowhere as it ends, where it would fail once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
