"""The shell that all commands share: flags, and errors of users as one sentence and an exit status."""

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
    """argparse's parser without abbreviated flags; its errors are one line of bounded length, without the usage."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        self.exit(BAD_INPUT, one_line(f"{self.prog}: error: {message}") + "\n")


def path_flag(text: str) -> Path:
    """Return the path of a flag; raise ArgumentTypeError for an empty one, which would be the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, got {quote(text)}")
    return Path(text)


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Wrap a command's main function, which takes the arguments (None: the process's own) and returns the exit status.

    Bad input (InputError, a file that cannot be read or written) gives the status 2, a full disk or memory 1, Ctrl-C
    130, each after one sentence on stderr. Other errors are bugs of this package and end with a traceback.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        logging.set_verbosity(logging.FATAL)  # avoid printing library errors twice
        try:
            check_encoding(sys.argv[1:] if arguments is None else arguments)
            status = main(arguments)
            if sys.stdout is not None:  # the caller may have closed it
                sys.stdout.flush()
            return status
        except InputError as error:
            return fail(BAD_INPUT, error)
        except BrokenPipeError:  # the reader of the output has ended
            _discard_output()
            return FAILED
        except OSError as error:
            if error.filename is None:
                _discard_output()
            return fail(FAILED if error.errno in FULL else BAD_INPUT, describe(error))
        except KeyboardInterrupt as error:  # where `interrupts` does not end the process
            return fail(STOPPED, str(error) or "stopped")
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA: out of memory
                raise
            return fail(FAILED, f"the memory is full; use smaller batches, images or answers ({error})")

    return run


def check_encoding(arguments: Sequence[str]) -> None:
    """Raise InputError for an argument that is not UTF-8 text, which no prompt or message can hold."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"each argument must be text in UTF-8, got {quote(os.fsencode(argument))}") from error


def _discard_output() -> None:
    """Send unwritten output to /dev/null, since the interpreter would fail again to write it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(status: int, sentence: object) -> int:
    """Print an error on stderr and return the exit status."""
    print(one_line(str(sentence)), file=sys.stderr)
    return status


def describe(error: OSError) -> str:
    """Return one sentence for an error of the file system, naming the file if it is known."""
    problem = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL:
        return f"no disk space to write {error.filename or 'the output'} ({problem}); free some and repeat the command"
    return f"{error.filename} cannot be read or written: {problem}" if error.filename else problem
