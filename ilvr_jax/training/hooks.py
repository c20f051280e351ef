"""Hooks: what a training loop does every n steps beside the step itself.

To add one, write a function of a `StepState` and name it in the list of `loop.run_steps`:

    def log_decoder_norm(now: StepState) -> None:
        norm = optax.tree.norm(now.train_state.params["decoder"])
        now.run.progress.log(f"{now.stage}, step {now.step}: norm of the decoder {float(norm):.4g}")

    Hook("norm", 100, log_decoder_norm),

Hooks run in the order of the list. With several processes each runs in all of them, so that it may use the devices;
what one process alone should write is behind `distributed.is_main()`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import grain
import jax

from ilvr_jax.checkpoints.manager import Checkpoints
from ilvr_jax.training.clock import Clock
from ilvr_jax.training.divergence import SkippedUpdates
from ilvr_jax.training.metrics import Metrics
from ilvr_jax.training.run import Run
from ilvr_jax.training.state import TrainState

UNLOGGED = ("skipped_in_row", "offending_record")  # metrics that `divergence` reports as sentences


@dataclasses.dataclass(frozen=True)
class StepState:
    """The state of a stage after a step.

    The device may still compute the step: reading `train_state` or `metrics` waits for it. The next step donates the
    buffers of `train_state`, so a hook that keeps arrays has to copy them.
    """

    run: Run
    stage: str
    step: int  # from 1
    steps: int  # of the stage
    train_state: TrainState
    metrics: Mapping[str, jax.Array]  # of this step
    previous_metrics: Mapping[str, jax.Array]  # of the step before, ready; empty after the first step of a process
    stopping: bool  # whether the run stops after this step, for a signal


@dataclasses.dataclass(frozen=True)
class Hook:
    """A function that a loop calls every n steps, and after the last step of the stage."""

    name: str
    every: int  # steps
    run: Callable[[StepState], None]
    on_stop: bool = False  # also after the step at which a signal stops the run

    def is_due(self, now: StepState) -> bool:
        """Return whether the hook runs after this step."""
        return now.step % self.every == 0 or now.step == now.steps or (self.on_stop and now.stopping)


def check_update(now: StepState, updates: SkippedUpdates) -> None:
    """Wait for the step; log it if it was skipped, and raise Diverged if too many in a row were."""
    updates.check(now.step, now.metrics)


def log_metrics(now: StepState, metrics: Metrics, clock: Clock) -> None:
    """Write the metrics and the speed of the steps since the last log to files and to the terminal."""
    losses = {key: value.item() for key, value in jax.device_get(now.metrics).items() if key not in UNLOGGED}
    speed = clock.lap(now.step)
    metrics.write(now.step, {**losses, **speed})
    now.run.progress.report(losses, speed["samples_per_second"], clock.seconds_left(now.steps))


def save_checkpoint(now: StepState, checkpoints: Checkpoints, iterator: grain.DatasetIterator, clock: Clock) -> None:
    """Begin to save the train state and the place in the data; raises DiskFull as `Checkpoints.save` does."""
    with clock.saving():
        checkpoints.save(now.step, now.train_state, iterator)
