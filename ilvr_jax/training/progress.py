"""How training goes, for the person who waits: a live bar on a terminal, elsewhere a line now and then."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SHOWN = ("loss", "similarity")  # the metrics that fit on a terminal


class Progress:
    """Prints sentences and the progress of stages, and writes both to a log file."""

    def __init__(self, log: Path, console: Console | None = None):
        self.console = console or Console()
        self._log = log.open("a")
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def say(self, sentence: str) -> None:
        """Prints a sentence, above the bar if there is one."""
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")
        self._log.flush()
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, step: int, steps: int) -> Iterator[None]:
        """Shows a stage that goes on from a step, while it lasts."""
        self._stage, self._step, self._steps = name, step, steps
        self._since = None
        self._task = self._bar.add_task(name, total=steps, completed=step, text="compiling")
        with self._bar:
            yield
        self._bar.remove_task(self._task)

    def advance(self) -> None:
        """Counts one step."""
        self._step += 1
        if self._since is None:  # the first step was compiled: it says nothing about the others
            self._first, self._since = self._step, time.monotonic()
        self._bar.advance(self._task)

    def report(self, values: Mapping[str, float], rate: float) -> None:
        """Shows the newest losses and the rate in samples a second."""
        losses = " ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        self._bar.update(self._task, text=f"{rate:.1f} samples/s {losses}")
        taken = time.monotonic() - self._since
        left = taken / max(self._step - self._first, 1) * (self._steps - self._step)
        line = (
            f"{self._stage} {self._step}/{self._steps} {rate:.1f} samples/s {losses} "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        if self.console.is_terminal:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self._log.flush()
        else:
            self.say(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self._log.close()
