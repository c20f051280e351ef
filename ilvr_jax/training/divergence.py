"""Steps whose loss or gradient is not finite: each is logged, and too many in a row end the run."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax


class Diverged(ArithmeticError):
    """Raised when loss or gradient were not finite for too many steps in a row."""


class SkippedUpdates:
    """Log of the steps that left parameters, optimizer and teacher unchanged, read from their metrics."""

    def __init__(self, stage: str, limit: int, folder: Path, log: Callable[[str], None]):
        """Take the number of skips in a row that ends the run, and the folder of the stage's checkpoints."""
        self._stage, self._limit, self._folder, self._log = stage, limit, folder, log
        self._checked, self._records = 0, []

    def check(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Log a skipped step, once however often it is checked; raises Diverged at the limit."""
        if step <= self._checked or not metrics:
            return
        self._checked = step
        names = ("skipped_in_row", "offending_record", "loss", "gradient_norm")
        in_row, record, loss, norm = jax.device_get([metrics[name] for name in names])
        if not in_row:
            self._records = []
            return
        if record < 0:
            cause = f"the norm of the gradient is {norm}, while every loss is finite"
        else:
            cause = f"the loss is {loss} (the first such record is {record})"
            self._records += [int(record)] if record not in self._records else []
        if in_row < self._limit:
            self._log(f"{self._stage}, step {step}: the update is skipped, since {cause}; {in_row} in a row")
            return
        names = f" (records at fault: {', '.join(map(str, self._records))})" if self._records else ""
        raise Diverged(
            f"{self._stage}, step {step}: the updates of {in_row} steps in a row were skipped, since {cause}{names}"
            f"; the checkpoints in {self._folder} remain; lower {self._stage}.learning_rate or "
            f"{self._stage}.clip, remove the records or raise max_skipped"
        )
