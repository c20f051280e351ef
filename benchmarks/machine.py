"""The machine that a figure was measured on, in a line, and what benchmarks share beside it."""

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ilvr_jax.analysis.flops import Peaks


def machine(packages: Sequence[str]) -> str:
    """Return the processor, its cores and the versions of Python and of packages."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Parser(argparse.ArgumentParser):
    """Answer a bad value with one sentence."""

    def error(self, message: str) -> NoReturn:
        refuse(message)


def positive(text: str) -> int:
    """Read the value of a flag that is a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def refuse(sentence: str) -> NoReturn:
    """End the program with a sentence about what it was given."""
    print(sentence, file=sys.stderr)
    sys.exit(2)


def measure_peaks(dtype: str, repeats: int = 5) -> Peaks:
    """Measure JAX's default device: the best of several large products, and of ways to go through a large array."""
    import jax
    import jax.numpy as jnp

    small = jax.default_backend() == "cpu"
    side, length = (4096, 2**27) if small else (8192, 2**30)

    def best(function: Callable, *inputs: jax.Array) -> float:
        compiled, times = jax.jit(function), []
        jax.block_until_ready(compiled(*inputs))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*inputs))
            times.append(time.perf_counter() - start)
        return min(times)

    square = jnp.ones((side, side), dtype)
    flops = 2 * side**3 / best(jnp.dot, square, square)
    array = jnp.ones((length // side, side), dtype)
    ways = (
        (1, jnp.sum, (array,)),
        (1, jnp.dot, (array, square[0])),
        (2, jnp.negative, (array,)),
    )
    return Peaks(flops, max(passes * array.nbytes / best(function, *inputs) for passes, function, inputs in ways))


def device_line(packages: Sequence[str]) -> str:
    """Return the machine line with JAX's default device ahead, if that is not the processor."""
    import jax

    device = jax.devices()[0]
    return machine(packages) if device.platform == "cpu" else f"{device.device_kind}; {machine(packages)}"
