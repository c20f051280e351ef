"""Steps that take far longer than usual are spoken of, while they last and when they have ended."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

REMEMBERED = 50  # so many steps say what is usual
NEEDED = 5  # before so many have ended nothing is
TIMES_USUAL = 10.0
LEAST_SECONDS = 5.0  # less is a hiccup of the machine, however short the steps are


def long_for(durations: Sequence[float]) -> float | None:
    """Returns from how many seconds on a step is far longer than these; None if they are too few to say."""
    if len(durations) < NEEDED:
        return None
    return max(TIMES_USUAL * statistics.median(durations), LEAST_SECONDS)


class Watchdog:
    """Times the steps of a stage. A thread of its own speaks while a step hangs, once each time that doubles.

    What happens between `step_ends` and the next `step_begins`, such as saving, is not watched, nor a compilation.
    """

    def __init__(self, stage: str, say: Callable[[str], None]):
        self._stage, self._say = stage, say
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self._programs: set[Hashable] = set()
        self._step, self._began, self._compiles = 0, 0.0, False
        self._next: float | None = None  # when to speak; None while nothing is watched
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step_begins(self, step: int) -> None:
        """Starts the time of a step, the wait for its data included."""
        with self._changed:
            limit = long_for(self._durations)
            self._step, self._began, self._compiles = step, time.monotonic(), False
            self._next = None if limit is None else self._began + limit
            self._changed.notify()

    def runs(self, program: Hashable) -> None:
        """Says what the step runs: a program is compiled when it is first met, and that step is no longer watched."""
        with self._changed:
            if program not in self._programs:
                self._programs.add(program)
                self._compiles, self._next = True, None

    def step_ends(self) -> None:
        """Ends the time of the step; one that took far longer than usual gets a sentence."""
        with self._changed:
            taken, limit = time.monotonic() - self._began, long_for(self._durations)
            self._next = None
            if self._compiles:
                return
            usual = self._usual()
            self._durations.append(taken)
        if limit is not None and taken > limit:
            self._say(f"{self._stage}, step {self._step} took {taken:.1f} s; usual are {usual:.3g} s")

    def _usual(self) -> float:
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
                self._say(
                    f"{self._stage}, step {self._step}: no step has ended for {taken:.1f} s; usual are "
                    f"{self._usual():.3g} s"
                )

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
