"""What training measured: one JSON object a line, and TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from ilvr_jax.files import open_regular, write_text


class Metrics:
    """Writes the metrics of a stage to workdir/metrics.jsonl and workdir/tensorboard/<stage>.

    `after` is the step that the stage goes on from: lines of later steps, left by a run that was cut off before it
    could save, are taken out first. `seconds_before` says how long the stage had taken by the last line kept, and
    `seconds_in_steps_before` how much of it was spent in steps. Of several processes one `writes`.
    """

    def __init__(self, workdir: Path, stage: str, after: int, writes: bool = True):
        self.stage = stage
        self._path = workdir / "metrics.jsonl"
        self._writes = writes
        kept = [line for line in read_metrics(workdir) if line["stage"] != stage or line["step"] <= after]
        times = [(line.get("seconds", 0.0), line.get("goodput", 0.0)) for line in kept if line["stage"] == stage]
        self.seconds_before, goodput = max(times, default=(0.0, 0.0))
        self.seconds_in_steps_before = self.seconds_before * goodput
        if not writes:
            return
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=after + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line, {"stage", "step", ...values}; null is a value that is not finite, since JSON has none such."""
        if not self._writes:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"stage": self.stage, "step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._board.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the objects of workdir/metrics.jsonl; a line that is cut off or no step's metrics is skipped.

    Raises OSError if the file is there and cannot be read.
    """
    path = workdir / "metrics.jsonl"
    if not os.path.lexists(path):
        return []
    with open_regular(path) as file:
        return [line for line in map(_read_line, file) if line]


def _read_line(line: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("stage"), str) or type(fields.get("step")) is not int:
        return None
    times = (fields.get("seconds", 0.0), fields.get("goodput", 0.0))
    return fields if all(isinstance(value, int | float) for value in times) else None
