"""Ctrl-C ends a command at once with the status 130, whatever it is doing.

Python's default, an exception in the main thread, does not: inside a callback from compiled code the exception is lost
and the command continues; a compilation delays it by minutes; and the interpreter may crash if it ends while XLA
computes. Here a separate thread wakes up and ends the process. No exception handlers run, so functions that clean up
are registered.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

STOPPED = 130  # exit status
FLUSH_SECONDS = 3.0  # limit for writing the output, whose reader may have stopped

_sentences: list[Callable[[], str]] = []  # of nested blocks, the innermost last
_undone: list[Callable[[], None]] = []


@contextlib.contextmanager
def stop_sentence(sentence: Callable[[], str]) -> Iterator[None]:
    """Print this sentence in place of "stopped" at Ctrl-C during the block."""
    _sentences.append(sentence)
    try:
        yield
    except KeyboardInterrupt:  # raised in a process that is not ours alone
        raise KeyboardInterrupt(sentence()) from None
    finally:
        _sentences.remove(sentence)


@contextlib.contextmanager
def undone_when_stopped(undo: Callable[[], None]) -> Iterator[None]:
    """Call a function that removes unfinished files at Ctrl-C during the block."""
    _undone.append(undo)
    try:
        yield
    finally:
        _undone.remove(undo)


def stop_at_interrupts() -> None:
    """Make Ctrl-C end this process from now on, unless it is ignored or another handler is set."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # the C handler writes to it at any time
    signal.signal(signal.SIGINT, _do_nothing)
    threading.Thread(target=_wait, args=(reader,), name="interrupts", daemon=True).start()


def _do_nothing(number: int, frame: object) -> None:
    pass


def _wait(reader: int) -> None:
    while True:
        numbers = os.read(reader, 1)
        # Training sets another handler, which ends it after a step.
        if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is _do_nothing:
            _stop()


def _stop() -> None:
    """End the process and its children, after one sentence on stderr."""
    try:
        if processes := sys.modules.get("multiprocessing"):
            for child in processes.active_children():
                child.kill()
        for undo in reversed(_undone):
            with contextlib.suppress(OSError):
                undo()
        output = threading.Thread(target=_write, daemon=True)
        output.start()
        output.join(FLUSH_SECONDS)
    finally:
        os._exit(STOPPED)


def _write() -> None:
    message = f"{_sentences[-1]() if _sentences else 'stopped'}\n"
    if sys.stderr.isatty():
        message = "\n" + message  # below ^C and below a partly printed answer
    os.write(sys.stderr.fileno(), message.encode())
    sys.stdout.flush()
