"""Steps whose loss or gradient is not finite: each gets a sentence, and too many in a row end the run."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax


class Diverged(ArithmeticError):
    """Step after step, loss or gradient are not finite; one sentence says where."""


class SkippedUpdates:
    """Reads off the metrics of steps which of them left parameters, optimizer and teacher as they were."""

    def __init__(self, stage: str, limit: int, folder: Path, say: Callable[[str], None]):
        """`limit` in a row are too many; `folder` holds the checkpoints of the stage."""
        self._stage, self._limit, self._folder, self._say = stage, limit, folder, say
        self._seen, self._records = 0, []

    def look(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Says so if a step was skipped, once however often it is looked at; raises Diverged at the limit."""
        if step <= self._seen or not values:
            return
        self._seen = step
        names = ("skipped_in_row", "offending_record", "loss", "gradient_norm")
        in_row, record, loss, norm = jax.device_get([values[name] for name in names])
        if not in_row:
            self._records = []
            return
        if record < 0:
            at_fault = f"the norm of the gradient is {norm}, while every loss is finite"
        else:
            at_fault = f"the loss is {loss}, of record {record} first"
            self._records += [int(record)] if record not in self._records else []
        if in_row < self._limit:
            self._say(f"{self._stage}, step {step}: the update is skipped, since {at_fault}; {in_row} in a row")
            return
        names = f" (records at fault: {', '.join(map(str, self._records))})" if self._records else ""
        raise Diverged(
            f"{self._stage}, step {step}: the updates of {in_row} steps in a row were skipped, since {at_fault}{names}"
            f"; the checkpoints in {self._folder} are kept, and a lower {self._stage}.learning_rate or "
            f"{self._stage}.clip, records left out or a higher max_skipped may help"
        )
