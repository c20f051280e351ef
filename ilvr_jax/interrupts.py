"""Ctrl-C ends a command at once and with 130, whatever it is doing.

Python's own way, an exception in the main thread, does neither: inside a callback from compiled code it is lost, and
the command runs to its end; a compilation delays it by minutes; and an interpreter may crash that ends while XLA
computes. Here a thread of its own is woken, which ends the process. No handler of an exception runs: what must be left
in order is registered.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

STOPPED = 130  # exit status
FLUSH_SECONDS = 3.0  # that output may take to be written; its reader may have stopped reading

_sentences: list[Callable[[], str]] = []  # on what was reached, the innermost last
_undone: list[Callable[[], None]] = []


@contextlib.contextmanager
def stop_sentence(sentence: Callable[[], str]) -> Iterator[None]:
    """Within it Ctrl-C prints this sentence in place of "stopped"."""
    _sentences.append(sentence)
    try:
        yield
    except KeyboardInterrupt:  # in a process that is not ours alone
        raise KeyboardInterrupt(sentence()) from None
    finally:
        _sentences.remove(sentence)


@contextlib.contextmanager
def undone_when_stopped(undo: Callable[[], None]) -> Iterator[None]:
    """Within it Ctrl-C calls a function that removes what is unfinished."""
    _undone.append(undo)
    try:
        yield
    finally:
        _undone.remove(undo)


def stop_at_interrupts() -> None:
    """Makes Ctrl-C end this process from here on; where it is ignored, or another handler is set, that is kept."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to by the C handler, at any moment
    signal.signal(signal.SIGINT, _do_nothing)
    threading.Thread(target=_wait, args=(reader,), name="interrupts", daemon=True).start()


def _do_nothing(number: int, frame: object) -> None:
    pass


def _wait(reader: int) -> None:
    while True:
        numbers = os.read(reader, 1)
        # Training sets a handler of its own, which ends it after a step.
        if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is _do_nothing:
            _stop()


def _stop() -> None:
    """Ends the process and those that it started, after one sentence on stderr."""
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
        message = "\n" + message  # below ^C, and below an answer that is being printed
    os.write(sys.stderr.fileno(), message.encode())
    sys.stdout.flush()
