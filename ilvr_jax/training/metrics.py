"""What training measured: one JSON object a line, and TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class Metrics:
    """Writes the metrics of a stage to workdir/metrics.jsonl and workdir/tensorboard/<stage>.

    `after` is the step that the stage goes on from: lines of later steps, left by a run that was cut off before it
    could save, are taken out first. `seconds_before` says how long the stage had taken by the last line kept.
    """

    def __init__(self, workdir: Path, stage: str, after: int):
        self.stage = stage
        self._path = workdir / "metrics.jsonl"
        kept = _drop_later(self._path, stage, after)
        self.seconds_before = max((line.get("seconds", 0.0) for line in kept if line["stage"] == stage), default=0.0)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=after + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line, {"stage", "step", ...values}."""
        self._file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the objects of workdir/metrics.jsonl, a line that was cut off left out."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def _drop_later(path: Path, stage: str, after: int) -> list[dict[str, Any]]:
    lines = read_metrics(path.parent)
    kept = [line for line in lines if line["stage"] != stage or line["step"] <= after]
    unfinished = path.with_suffix(".jsonl.partial")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
    unfinished.replace(path)
    return kept
