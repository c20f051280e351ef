"""The watchdog logs steps that take much longer than usual, while they run and afterwards."""

import pytest

from ilvr_jax.training import watchdog
from ilvr_jax.training.watchdog import MIN_STEPS, Watchdog, time_limit


class Time:
    """A clock that a test moves."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def take(guard, clock, step, seconds, program="small"):
    guard.start_step(step)
    guard.start_program(program)
    clock.now += seconds
    guard.end_step()


def test_long_is_ten_times_the_median_and_some_seconds():
    assert time_limit([1.0] * (MIN_STEPS - 1)) is None
    assert time_limit([1.0, 2.0, 3.0, 4.0, 100.0]) == 30.0
    assert time_limit([0.01] * 20) == 5.0


def test_a_long_step_is_logged_and_a_compilation_is_not(clock):
    messages = []
    guard = Watchdog("stage1", messages.append)  # its thread is not started
    take(guard, clock, 1, 300.0)  # compiled
    for step in range(2, 8):
        take(guard, clock, step, 1.0)
    take(guard, clock, 8, 9.9)
    take(guard, clock, 9, 50.0, program="large")  # compiled
    clock.now += 1000.0  # saving
    take(guard, clock, 10, 1.0, program="large")
    assert messages == []
    take(guard, clock, 11, 10.1)
    assert messages == ["stage1, step 11 took 10.1 s (typical: 1 s)"]


def test_only_recent_steps_define_what_is_typical(clock):
    messages = []
    guard = Watchdog("stage1", messages.append)
    take(guard, clock, 0, 1.0)
    for step in range(60):
        take(guard, clock, step, 100.0)
    for step in range(60, 100):
        take(guard, clock, step, 1.0)
    take(guard, clock, 100, 90.0)
    assert messages == ["stage1, step 100 took 90.0 s (typical: 1 s)"]


def test_a_step_that_hangs_is_logged_at_each_doubling(monkeypatch):
    """In real time: typical steps take no time, and 0.1 s is long."""
    monkeypatch.setattr(watchdog, "MIN_SECONDS", 0.1)
    messages = []
    with Watchdog("stage2", messages.append) as guard:
        for step in range(1, MIN_STEPS + 2):
            guard.start_step(step)
            guard.start_program("small")
            guard.end_step()
        guard._thread.join(0.3)  # between steps nothing hangs
        assert messages == []
        guard.start_step(8)
        guard._thread.join(1.0)
        hanging = list(messages)
        guard.end_step()
        guard.start_step(9)
        guard.start_program("large")
        guard._thread.join(0.3)  # a compilation
        assert len(messages) == len(hanging) + 1
    assert not guard._thread.is_alive()
    assert 2 <= len(hanging) <= 4  # after 0.1, 0.2, 0.4 and 0.8 s, fewer on a busy machine
    assert all(line.startswith("stage2, step 8: still running after ") for line in hanging)
    waits = [float(line.split(" after ")[1].split(" s ")[0]) for line in hanging]
    assert all(later >= 1.9 * earlier - 0.1 for earlier, later in zip(waits, waits[1:], strict=False))
    assert messages[-1].startswith("stage2, step 8 took 1.")
