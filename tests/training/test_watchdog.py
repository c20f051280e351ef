"""The watchdog speaks of steps that take far longer than usual, while they last and afterwards."""

import pytest

from ilvr_jax.training import watchdog
from ilvr_jax.training.watchdog import NEEDED, Watchdog, long_for


class Time:
    """A clock that only moves when a test says so."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def take(guard, clock, step, seconds, program="small"):
    guard.step_begins(step)
    guard.runs(program)
    clock.now += seconds
    guard.step_ends()


def test_long_is_ten_times_the_median_and_some_seconds():
    assert long_for([1.0] * (NEEDED - 1)) is None
    assert long_for([1.0, 2.0, 3.0, 4.0, 100.0]) == 30.0
    assert long_for([0.01] * 20) == 5.0


def test_a_long_step_is_said_and_a_compilation_is_not(clock):
    said = []
    guard = Watchdog("stage1", said.append)  # its thread is not started
    take(guard, clock, 1, 300.0)  # compiled
    for step in range(2, 8):
        take(guard, clock, step, 1.0)
    take(guard, clock, 8, 9.9)
    take(guard, clock, 9, 50.0, program="large")  # compiled
    clock.now += 1000.0  # saving
    take(guard, clock, 10, 1.0, program="large")
    assert said == []
    take(guard, clock, 11, 10.1)
    assert said == ["stage1, step 11 took 10.1 s; usual are 1 s"]


def test_only_the_last_steps_say_what_is_usual(clock):
    said = []
    guard = Watchdog("stage1", said.append)
    take(guard, clock, 0, 1.0)
    for step in range(60):
        take(guard, clock, step, 100.0)
    for step in range(60, 100):
        take(guard, clock, step, 1.0)
    take(guard, clock, 100, 90.0)
    assert said == ["stage1, step 100 took 90.0 s; usual are 1 s"]


def test_a_step_that_hangs_is_said_once_each_doubling(monkeypatch):
    """Real time here: usual steps take no time at all, and 0.1 s is long."""
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 0.1)
    said = []
    with Watchdog("stage2", said.append) as guard:
        for step in range(1, NEEDED + 2):
            guard.step_begins(step)
            guard.runs("small")
            guard.step_ends()
        guard._thread.join(0.3)  # between steps nothing hangs
        assert said == []
        guard.step_begins(8)
        guard._thread.join(1.0)
        hanging = list(said)
        guard.step_ends()
        guard.step_begins(9)
        guard.runs("large")
        guard._thread.join(0.3)  # a compilation
        assert len(said) == len(hanging) + 1
    assert not guard._thread.is_alive()
    assert 2 <= len(hanging) <= 4  # after 0.1, 0.2, 0.4 and 0.8 s, fewer on a busy machine
    assert all(line.startswith("stage2, step 8: no step has ended for ") for line in hanging)
    waits = [float(line.split(" for ")[1].split(" s;")[0]) for line in hanging]
    assert all(later >= 1.9 * earlier - 0.1 for earlier, later in zip(waits, waits[1:], strict=False))
    assert said[-1].startswith("stage2, step 8 took 1.")
