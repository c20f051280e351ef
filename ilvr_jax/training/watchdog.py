"""Logs steps that take much longer than usual, while they run and when they have ended."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

WINDOW = 50  # recent steps whose median is the typical time
MIN_STEPS = 5  # steps before there is a typical time
FACTOR = 10.0  # of the typical time, above which a step is long
MIN_SECONDS = 5.0  # a shorter step is never long


def time_limit(durations: Sequence[float]) -> float | None:
    """Return the seconds above which a step is long, given those of recent steps; None if these are too few."""
    if len(durations) < MIN_STEPS:
        return None
    return max(FACTOR * statistics.median(durations), MIN_SECONDS)


class Watchdog:
    """Timer of the steps of a stage; a thread logs a step that hangs, again each time its duration doubles.

    The time between `end_step` and the next `start_step`, such as that of saving, is not watched, nor a compilation.
    """

    def __init__(self, stage: str, log: Callable[[str], None]):
        self._stage, self._log = stage, log
        self._durations: deque[float] = deque(maxlen=WINDOW)
        self._programs: set[Hashable] = set()
        self._step, self._began, self._compiles = 0, 0.0, False
        self._next: float | None = None  # when to log; None while nothing is watched
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start_step(self, step: int) -> None:
        """Start the timer of a step, before the wait for its data."""
        with self._changed:
            limit = time_limit(self._durations)
            self._step, self._began, self._compiles = step, time.monotonic(), False
            self._next = None if limit is None else self._began + limit
            self._changed.notify()

    def start_program(self, program: Hashable) -> None:
        """Take the program that the step runs; a new one is compiled first, so that step is no longer watched."""
        with self._changed:
            if program not in self._programs:
                self._programs.add(program)
                self._compiles, self._next = True, None

    def end_step(self) -> None:
        """Stop the timer of the step, and log the step if it was long."""
        with self._changed:
            taken, limit = time.monotonic() - self._began, time_limit(self._durations)
            self._next = None
            if self._compiles:
                return
            typical = self._typical()
            self._durations.append(taken)
        if limit is not None and taken > limit:
            self._log(f"{self._stage}, step {self._step} took {taken:.1f} s (typical: {typical:.3g} s)")

    def _typical(self) -> float:
        return statistics.median(self._durations) if self._durations else 0.0

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if self._next is None or now < self._next:
                    self._changed.wait(None if self._next is None else self._next - now)
                    continue
                taken = now - self._began
                self._next = self._began + 2 * taken
                self._log(
                    f"{self._stage}, step {self._step}: still running after {taken:.1f} s (typical: "
                    f"{self._typical():.3g} s)"
                )

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
