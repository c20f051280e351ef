"""Metrics of training: one JSON object per line, and TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from ilvr_jax.files import open_regular, write_text


class Metrics:
    """Writer of a stage's metrics to workdir/metrics.jsonl and workdir/tensorboard/<stage>.

    `after` is the step that the stage resumes from: lines of later steps, left by a run that ended before it could
    save, are removed first. `seconds_before` is the time of the stage up to the last line that remains, and
    `seconds_in_steps_before` the part of it that was spent in steps. Of several processes one `writes`.
    """

    def __init__(self, workdir: Path, stage: str, after: int, writes: bool = True):
        self.stage = stage
        self._path = workdir / "metrics.jsonl"
        self._writes = writes
        lines = [line for line in read_metrics(workdir) if line["stage"] != stage or line["step"] <= after]
        times = [(line.get("seconds", 0.0), line.get("goodput", 0.0)) for line in lines if line["stage"] == stage]
        self.seconds_before, goodput = max(times, default=(0.0, 0.0))
        self.seconds_in_steps_before = self.seconds_before * goodput
        if not writes:
            return
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=after + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append {"stage", "step", ...values} as a line; JSON has null in place of values that are not finite."""
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
    """Return the objects of workdir/metrics.jsonl, skipping lines that are cut off or not the metrics of a step.

    Raises OSError if the file exists but cannot be read.
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
