"""Shared parts of the benchmarks: a line about the machine, flags, and measured peaks."""

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
    """Return one line with the processor, its cores and the versions of Python and of packages."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def processor() -> str:
    """Return the name of the processor, if the system has one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Parser(argparse.ArgumentParser):
    """A parser that ends the program with one message at a bad value."""

    def error(self, message: str) -> NoReturn:
        refuse(message)


def positive(text: str) -> int:
    """Read the value of a flag that is a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def refuse(message: str) -> NoReturn:
    """End the program with a message about its input."""
    print(message, file=sys.stderr)
    sys.exit(2)


def measure_peaks(dtype: str, repeats: int = 5) -> Peaks:
    """Measure JAX's default device: the fastest of several large products, and of several passes over a large array."""
    import jax
    import jax.numpy as jnp

    side, length = (4096, 2**27) if jax.default_backend() == "cpu" else (8192, 2**30)

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
    cases = (
        (1, jnp.sum, (array,)),
        (1, jnp.dot, (array, square[0])),
        (2, jnp.negative, (array,)),
    )
    return Peaks(flops, max(passes * array.nbytes / best(function, *inputs) for passes, function, inputs in cases))


def device_line(packages: Sequence[str]) -> str:
    """Return the line of `machine`, after JAX's default device if that is not the processor."""
    import jax

    device = jax.devices()[0]
    return machine(packages) if device.platform == "cpu" else f"{device.device_kind}; {machine(packages)}"
