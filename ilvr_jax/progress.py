"""Progress of a run: a live bar on a terminal, lines elsewhere, and a log file."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from ilvr_jax.files import check_output, named_errors

REPORT_SECONDS = 10.0  # between two lines of `advance_timed`
SHOWN = ("loss", "similarity")  # the metrics that fit on a terminal


class Progress:
    """Printer of messages and of the progress of stages, which also writes them to a log file, if one is given."""

    def __init__(self, log: Path | None, console: Console | None = None):
        self.console = console or Console()
        if log:
            check_output(log)
        self._path = log or Path(os.devnull)
        self._file = self._path.open("a")
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def log(self, message: str) -> None:
        """Print a message, above the bar if there is one, and write it to the log file."""
        self._write(message)
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, step: int, steps: int) -> Iterator[None]:
        """Show a stage, from the step that it resumes at, in the block."""
        self._stage, self._step, self._steps = name, step, steps
        self._timed, self._first = 0, 0.0
        self._task = self._bar.add_task(name, total=steps, completed=step, text="compiling")
        with self._bar:
            yield
        self._bar.remove_task(self._task)

    def advance(self) -> None:
        """Count a step."""
        self._step += 1
        self._bar.advance(self._task)

    def advance_timed(self) -> None:
        """Count a step and, every REPORT_SECONDS, report the rate and the time left.

        They are measured from the stage's first step on, without compilation.
        """
        self.advance()
        now, self._timed = time.monotonic(), self._timed + 1
        if self._timed == 1:
            self._first = self._reported = now
        elif now - self._reported > REPORT_SECONDS:
            rate, self._reported = (self._timed - 1) / (now - self._first), now
            self.report({}, rate, (self._steps - self._step) / rate)

    def report(self, values: Mapping[str, float], rate: float, left: float) -> None:
        """Show the newest losses, the rate in samples per second and the seconds left."""
        losses = " ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        text = f"{rate:.1f} samples/s {losses} {int(left // 60)}:{int(left % 60):02d} left"
        self._bar.update(self._task, text=text)
        line = f"{self._stage} {self._step}/{self._steps} {text}"
        if self.console.is_terminal:
            self._write(line)
        else:
            self.log(line)

    def _write(self, line: str) -> None:
        with named_errors(self._path):
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self._file.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported when the line was written
            self._file.close()
