"""Several processes as one run: how they find each other, and what they tell each other beside the devices."""

import argparse
import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from ilvr_jax.errors import InputError
from ilvr_jax.files import locked_folder
from ilvr_jax.training.configuration import BadConfig

TIMEOUT = 300  # seconds to wait for the others
_exchanges = itertools.count()  # processes open exchanges in the same order, so numbers are names


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `join` reads."""
    parser.add_argument("--distributed", action="store_true", help="find the others as Cloud TPU, GKE or SLURM say")
    parser.add_argument("--coordinator", help="or where process 0 listens, host:port, the same for all")
    parser.add_argument("--processes", type=int, help="with --coordinator: how many there are")
    parser.add_argument("--process", type=int, help="with --coordinator: which this one is, from 0")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds to wait for the others")


def join(options: argparse.Namespace) -> None:
    """Makes this process one of several, if its flags say so, before any device is looked at.

    Raises BadConfig if flags are missing, the surroundings tell nothing, or the coordinator is not reached in time.
    """
    numbered = options.processes is not None and options.process is not None
    if options.coordinator is None:
        if options.processes is not None or options.process is not None:
            raise BadConfig("--processes and --process come with --coordinator=host:port")
        if options.distributed:
            _initialize(options, "as the surroundings say")
        return
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not numbered or not 0 <= options.process < options.processes:
        raise BadConfig(
            f"--coordinator is {options.coordinator!r}, --processes {options.processes}, --process {options.process}; "
            "host:port, how many and a number below that are accepted"
        )
    if options.process:
        _reach(host, int(port), options.timeout)
    _initialize(options, options.coordinator)


def _reach(host: str, port: int, seconds: int) -> None:
    """Waits until something listens; jax's own client would end the process with a trace."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() >= end:
                raise BadConfig(
                    f"the coordinator {host}:{port} could not be reached in {seconds} seconds ({error}); "
                    "--coordinator takes the address of process 0, which must be running"
                ) from error
            time.sleep(0.2)


def _initialize(options: argparse.Namespace, where: str) -> None:
    if jax.config.jax_platforms == "cpu":
        # Processes must meet in the same order. On CPUs, threads of XLA take what is independent in any, and so does a
        # program that was read from the cache of compiled ones.
        os.environ["NPROC"] = "1"  # threads; it is read when the devices are first looked at
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process, initialization_timeout=options.timeout
        )
    except (ValueError, RuntimeError) as error:
        raise BadConfig(f"the processes did not find each other ({where}): {str(error).splitlines()[0]}") from error
    if jax.default_backend() == "cpu" and jax.config.jax_platforms != "cpu":
        raise BadConfig("the only devices are CPUs; several processes on CPUs are accepted with JAX_PLATFORMS=cpu")


def is_main() -> bool:
    """Says whether this process writes what only one should."""
    return jax.process_index() == 0


def in_main(act: Callable[[], None]) -> None:
    """Calls a function in the process that writes; if it raises InputError or OSError, all processes raise InputError.

    The others would wait for it in vain.
    """
    failure = None
    if is_main():
        try:
            act()
        except (InputError, OSError) as error:
            failure = error
    problem = open_exchange()(str(failure) if failure else None)[0]
    if failure:
        raise failure
    if problem:
        raise InputError(problem)


@contextlib.contextmanager
def locked_workdir(workdir: Path) -> Iterator[None]:
    """Holds a workdir for one run: its main process has the lock, and all of them raise if there is none to be had."""
    with contextlib.ExitStack() as held:
        in_main(lambda: held.enter_context(locked_folder(workdir)))
        yield


def wait_for_all(place: str) -> None:
    """Returns when every process has come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def open_exchange() -> Callable[[Any], list[Any]]:
    """Returns a function that gives every process what each of them called it with, in the order of their numbers.

    It goes through the coordinator and not through devices, so that it may be called while these are busy, from
    another thread. Values are JSON.
    """
    if jax.process_count() == 1:
        return lambda value: [value]
    from jax._src.distributed import global_state  # jax has no public way to the coordinator's values

    exchange, calls = next(_exchanges), itertools.count()

    def key(call: int, process: int) -> str:
        return f"ilvr_jax/exchange_{exchange}/{call}/{process}"

    def tell(value: Any) -> list[Any]:
        call, client, mine = next(calls), global_state.client, jax.process_index()
        client.key_value_set(key(call, mine), json.dumps(value))
        told = [
            json.loads(client.blocking_key_value_get(key(call, process), 1000 * TIMEOUT))
            for process in range(jax.process_count())
        ]
        if call:  # everyone has read what was told before the others came here
            client.key_value_delete(key(call - 1, mine))
        return told

    return tell
