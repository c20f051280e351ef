"""Hooks run at the steps that they are due."""

import pytest

from ilvr_jax.training.hooks import Hook, StepState


def due_steps(hook: Hook, stop_at: int | None = None) -> list[int]:
    """Return the steps of a stage of ten at which a loop calls the hook."""
    states = (StepState(None, "stage1", step, 10, None, {}, {}, stopping=step == stop_at) for step in range(1, 11))
    return [now.step for now in states if hook.is_due(now)]


@pytest.mark.parametrize(
    ("every", "steps"), [(1, list(range(1, 11))), (2, [2, 4, 6, 8, 10]), (4, [4, 8, 10]), (100, [10])]
)
def test_a_hook_runs_every_n_steps_and_after_the_last(every, steps):
    assert due_steps(Hook("log", every, print)) == steps


def test_a_hook_may_run_when_a_signal_stops_the_stage():
    assert due_steps(Hook("log", 4, print), stop_at=5) == [4, 8, 10]
    assert due_steps(Hook("save", 4, print, on_stop=True), stop_at=5) == [4, 5, 8, 10]
