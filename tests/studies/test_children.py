"""Child processes: their errors, and signals that are passed on to them once."""

import os
import signal
import sys
import threading
import time

import pytest

from ilvr_jax.studies.children import Stopped, child_processes

# Counts SIGINTs for a moment after the first.
COUNT = """
import pathlib, signal, sys, time
path, count = pathlib.Path(sys.argv[1]), 0
def note(number, frame):
    global count
    count += 1
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
path.write_text("ready")
while not count:
    time.sleep(0.01)
time.sleep(0.2)
path.write_text(f"{count} signals")
sys.exit(130)
"""


def run(*command):
    with child_processes() as children:
        return children.run([sys.executable, "-c", *command])


def test_a_failed_child_gives_the_last_line_of_its_errors(capfd):
    assert run("print('fine')") is None
    assert run("import sys; print('a\\nb\\n', file=sys.stderr); sys.exit(2)") == "b"
    assert run("raise ValueError('wrong')") == "ValueError: wrong"
    assert run("import sys; sys.exit(3)") == "ended with status 3"
    assert run("import os; os.kill(os.getpid(), 9)") == "ended with status -9"
    printed = capfd.readouterr()
    assert "fine" in printed.out and "a\nb\n" in printed.err and "Traceback" in printed.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_child_once_and_starts_no_other(tmp_path, number):
    path, handler = tmp_path / "count", signal.getsignal(number)

    def stop():
        while not (path.exists() and path.read_text() == "ready"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    with child_processes() as children:
        with pytest.raises(Stopped):
            children.run([sys.executable, "-c", COUNT, str(path)])
        with pytest.raises(Stopped):
            children.run([sys.executable, "-c", f"open({str(tmp_path / 'other')!r}, 'w')"])
    assert path.read_text() == "1 signals" and not (tmp_path / "other").exists()
    assert signal.getsignal(number) is handler
