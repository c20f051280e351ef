"""Ctrl-C: commands end with 130 and one sentence, whatever they are doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.paths import REPOSITORY

PREPARE = "import sys, time\nfrom ilvr_jax.interrupts import *\nfrom ilvr_jax import files\nfrom pathlib import Path\n"
WAIT = "print('ready', flush=True)\nwhile True: time.sleep(9)\n"


def run(*arguments: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY)


def interrupt(process: subprocess.Popen) -> tuple[str, str]:
    """Return stdout and stderr of a process that must end, with 130, within seconds."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130, err
    return out, err


@pytest.mark.parametrize("seconds", [0.2, 1.0])
@pytest.mark.parametrize("command", ["generate", "train"])
def test_commands_stop_while_they_import(command, seconds):
    process = run("-m", f"ilvr_jax.{command}", "absent")
    time.sleep(seconds)
    if process.poll() is None:
        assert interrupt(process)[1] == "stopped\n"


def test_files_are_whole_and_the_sentence_is_the_innermost(tmp_path):
    program = f"""{PREPARE}stop_at_interrupts()
with stop_sentence(lambda: "outer"), stop_sentence(lambda: "3 answers are kept"):
    print("not flushed")
    folder = Path({str(tmp_path)!r})
    with files.new_folder(folder / "new"), files.lock(folder / "lock", "it"), files.written(folder / "a") as unfinished:
        unfinished.write_text("half")
        (folder / "new" / "part").mkdir()
        {WAIT.replace(chr(10), chr(10) + 8 * " ")}"""
    process = run("-c", program)
    assert [process.stdout.readline() for _ in range(2)] == ["not flushed\n", "ready\n"]
    assert len(os.listdir(tmp_path)) == 3
    assert interrupt(process)[1] == "3 answers are kept\n"
    assert os.listdir(tmp_path) == []


def test_compiled_code_that_calls_python_does_not_lose_an_interrupt():
    program = f"""{PREPARE}import jax, jax.numpy as jnp, numpy as np
stop_at_interrupts()
def wait(x):
    {WAIT.replace(chr(10), chr(10) + 4 * " ")}
jax.jit(lambda x: jax.pure_callback(wait, x, x))(1.0)"""
    process = run("-c", program)
    assert process.stdout.readline() == "ready\n"
    assert interrupt(process)[1] == "stopped\n"


def test_a_reader_that_has_stopped_reading_does_not_hold_it_up():
    program = f"{PREPARE}stop_at_interrupts()\nprint('ready', flush=True)\nwhile True: print('x' * 9999, flush=True)"
    process = run("-c", program)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    process.stdout.close(), process.stderr.close()


def test_where_interrupts_are_ignored_or_handled_they_stay_so():
    program = f"""{PREPARE}import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
stop_at_interrupts()
os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
stop_at_interrupts()
seen = []
before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.1)
signal.signal(signal.SIGINT, before)
print('handled', len(seen))"""
    process = run("-c", program)
    assert process.communicate(timeout=60)[0] == "handled 1\n" and process.returncode == 0
