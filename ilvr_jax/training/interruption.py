"""Ctrl-C and SIGTERM during training: the current step ends and is saved first."""

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(Exception):
    """Raised when a signal has stopped training after a save; its message names the step and how to resume."""

    def __init__(self, sentence: str, signal_number: int):
        super().__init__(sentence)
        self.exit_status = 128 + signal_number


class StopRequest:
    """The signal that asked training to stop, None before it."""

    signal_number: int | None = None


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Record SIGINT and SIGTERM in the block instead of ending the process; a second one acts as usual."""
    request = StopRequest()
    before = {}

    def note(number, frame):
        del frame
        request.signal_number = number
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
