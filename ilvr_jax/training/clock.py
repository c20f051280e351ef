"""How long the steps of a stage take, and what else its time goes into."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax


class Clock:
    """Measures the rate of a stage and how long the device stood idle because no batch was ready."""

    def __init__(self, batch_size: int, first: int, seconds: float, seconds_in_steps: float, began: float):
        """`seconds` were spent on the stage before, up to step `first`, `seconds_in_steps` of them in steps.

        The stage `began` at that monotonic time: what was done since, such as restoring, is no part of its rate.
        """
        self.seconds, self.compilation_seconds = seconds, 0.0
        self._seconds_in_steps = seconds_in_steps
        self._batch_size, self._step = batch_size, first
        self._steps_here, self._seconds_here = 0, 0.0  # without compilation
        self._since, self._waited, self._saved, self._apart = began, 0.0, 0.0, time.monotonic() - began

    @property
    def goodput(self) -> float:
        """The share of the stage's time, up to the last lap, in steps: not compiling, saving or without data."""
        return self._seconds_in_steps / self.seconds if self.seconds else 0.0

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Times what happens within it as no part of a step."""
        began = time.monotonic()
        yield
        self._saved += time.monotonic() - began

    @contextlib.contextmanager
    def waiting_for_data(self, running: Mapping[str, jax.Array]) -> Iterator[None]:
        """Times what happens within it, unless `running`, the results of the step before, were not ready after it."""
        began = time.monotonic()
        yield
        if all(value.is_ready() for value in running.values()):
            self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def setting_compilation_apart(self, function: Callable) -> Iterator[None]:
        """Keeps a call of a jitted function out of the rate if it is compiled for it."""
        programs, began = function._cache_size(), time.monotonic()
        yield
        if function._cache_size() > programs:
            self._apart += time.monotonic() - began
            self.compilation_seconds += time.monotonic() - began

    def lap(self, step: int) -> dict[str, float]:
        """Returns rate and share of time without data since the lap before, and seconds and goodput so far."""
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
        """Returns how long the stage will take from the last lap on, compilation aside."""
        return self._seconds_here / self._steps_here * (steps - self._step)
