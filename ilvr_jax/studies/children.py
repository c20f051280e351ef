"""Child processes of a study, one at a time, which get the signals that stop it."""

import collections
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from ilvr_jax.errors import one_line

PIPE_SECONDS = 5.0  # for a child's stderr to close after its end; its own children may keep it open


class Stopped(Exception):
    """Raised when a signal has stopped the study."""


class Children:
    """The child processes; `stop` is for signals.

    Each has a process group of its own. A signal is thus passed on exactly once, even Ctrl-C, which a terminal sends to
    its whole foreground group: at a second one training would end without saving.
    """

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._signal_number: int | None = None

    def stop(self, number: int, frame: object) -> None:
        """Pass a signal on to the child, and start no other one."""
        del frame
        self._signal_number = number
        if self._process:
            self._process.send_signal(number)

    def run(self, command: Sequence[str]) -> str | None:
        """Run a command to its end; return None if its status is 0, else the last line that it wrote on stderr.

        Its output appears on that of this process. Raises Stopped after a signal.
        """
        if self._signal_number:
            raise Stopped
        last: collections.deque[str] = collections.deque(maxlen=1)
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, errors="backslashreplace", process_group=0
        ) as process:
            self._process = process
            if self._signal_number:  # it came before the line above
                process.send_signal(self._signal_number)
            reader = threading.Thread(target=_copy, args=(process.stderr, last), daemon=True)
            reader.start()
            status = process.wait()
            self._process = None
            reader.join(PIPE_SECONDS)
        if status and self._signal_number:
            raise Stopped
        return (last[0] if last else f"ended with status {status}") if status else None


def _copy(lines: Iterator[str], last: collections.deque[str]) -> None:
    """Print lines on stderr as they come, and keep the last one that is not empty."""
    for line in lines:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.strip():
            last.append(one_line(line))


@contextlib.contextmanager
def child_processes() -> Iterator[Children]:
    """Yield the means to run child processes; SIGINT and SIGTERM in the block are passed on to them."""
    children = Children()
    before = {number: signal.signal(number, children.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
