"""The time that the steps of a stage take, and the rest of its time."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax


class Clock:
    """Timer of a stage: its rate, and the time in which the device was idle because no batch was ready."""

    def __init__(self, batch_size: int, first: int, seconds: float, seconds_in_steps: float, began: float):
        """Resume the times of a stage after step `first`, and start its first lap.

        `seconds` were spent on the stage before, `seconds_in_steps` of them in steps. The stage `began` at that
        monotonic time; what was done since, such as restoring, does not count in its rate.
        """
        self.seconds, self.compilation_seconds = seconds, 0.0
        self._seconds_in_steps = seconds_in_steps
        self._batch_size, self._step = batch_size, first
        self._steps_here, self._seconds_here = 0, 0.0  # without compilation
        self._since, self._waited, self._saved, self._apart = began, 0.0, 0.0, time.monotonic() - began

    @property
    def goodput(self) -> float:
        """The share of the stage's time, up to the last lap, in steps: not compiling, saving, evaluating or waiting."""
        return self._seconds_in_steps / self.seconds if self.seconds else 0.0

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time of the block as saving."""
        began = time.monotonic()
        yield
        self._saved += time.monotonic() - began

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Exclude the time of the block from the rate and from goodput."""
        began = time.monotonic()
        yield
        self._apart += time.monotonic() - began

    @contextlib.contextmanager
    def waiting_for_data(self, running: Mapping[str, jax.Array]) -> Iterator[None]:
        """Count the time of the block as waiting, if `running`, the results of the step before, are ready after it."""
        began = time.monotonic()
        yield
        if all(value.is_ready() for value in running.values()):
            self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def excluding_compilation(self, function: Callable) -> Iterator[None]:
        """Exclude the time of the block from the rate if the jitted function is compiled in it."""
        programs, began = function._cache_size(), time.monotonic()
        yield
        if function._cache_size() > programs:
            self._apart += time.monotonic() - began
            self.compilation_seconds += time.monotonic() - began

    def lap(self, step: int) -> dict[str, float]:
        """Return rate and share of time spent waiting for data since the last lap, and seconds and goodput so far."""
        taken = time.monotonic() - self._since
        running = taken - self._apart
        figures = {
            "samples_per_second": (step - self._step) * self._batch_size / running,
            "data_wait_share": self._waited / running,
        }
        self._steps_here, self._seconds_here = self._steps_here + step - self._step, self._seconds_here + running
        self.seconds, self._step = self.seconds + taken, step
        self._seconds_in_steps += running - self._waited - self._saved
        self._since, self._waited, self._saved, self._apart = time.monotonic(), 0.0, 0.0, 0.0
        return {**figures, "seconds": self.seconds, "goodput": self.goodput}

    def seconds_left(self, steps: int) -> float:
        """Return the expected seconds from the last lap to the end of the stage, without compilation."""
        return self._seconds_here / self._steps_here * (steps - self._step)
