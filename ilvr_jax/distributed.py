"""Several processes as one run: finding each other, and exchanging values outside the devices."""

import argparse
import contextlib
import ipaddress
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

from ilvr_jax.config.fields import BadConfig
from ilvr_jax.errors import InputError, quote
from ilvr_jax.files import locked_folder

TIMEOUT = 300  # seconds
LONGEST_TIMEOUT = 7 * 24 * 3600
MOST_PROCESSES = 100_000
_exchanges = itertools.count()  # processes open exchanges in the same order, so that numbers name them


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `initialize_distributed` reads."""
    parser.add_argument("--distributed", action="store_true", help="find the others through Cloud TPU, GKE or SLURM")
    parser.add_argument("--coordinator", help="or the address of process 0, host:port, the same in all")
    parser.add_argument("--processes", type=int, help="with --coordinator: the number of processes")
    parser.add_argument("--process", type=int, help="with --coordinator: the number of this process, from 0")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds to wait for the other processes")


def initialize_distributed(options: argparse.Namespace) -> None:
    """Make this process one of several if its flags ask for it, before any device is used.

    Raises BadConfig if flags are missing, the environment is not recognised, or the coordinator is not reached in time.
    """
    numbered = options.processes is not None and options.process is not None
    if not 1 <= options.timeout <= LONGEST_TIMEOUT:
        raise BadConfig(f"--timeout must be from 1 to {LONGEST_TIMEOUT} seconds, got {quote(options.timeout)}")
    if options.coordinator is None:
        if options.processes is not None or options.process is not None:
            raise BadConfig("--processes and --process must come with --coordinator=host:port")
        if options.distributed:
            _initialize(options, "found through the environment")
        return
    host, port = split_address(options.coordinator)
    if not numbered or not 0 <= options.process < options.processes <= MOST_PROCESSES:
        raise BadConfig(
            f"--coordinator must come with --processes, from 1 to {MOST_PROCESSES}, and a --process from 0 to below "
            f"that, got {quote(options.processes)} and {quote(options.process)}"
        )
    if options.process:
        _reach(host, port, options.timeout)
    _initialize(options, options.coordinator)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port"; an IPv6 host must be in brackets, and is returned without them.

    Raises BadConfig if either is missing, the port is not from 1 to 65535 or brackets hold no IPv6 address.
    """
    host, _, port = address.rpartition(":")
    problem = ""
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and 1 <= int(port) <= 65535):
        problem = "its port must be from 1 to 65535"
    elif host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            problem = "brackets must hold an IPv6 address"
    elif ":" in host:
        problem = "an IPv6 address must be in brackets, as in [::1]:1234"
    elif not host or not all(letter.isalnum() or letter in "-._" for letter in host):
        problem = "its host must be a name or an address"
    if problem:
        raise BadConfig(f"--coordinator must be host:port, and {problem}, got {quote(address)}")
    return host, int(port)


def _reach(host: str, port: int, seconds: int) -> None:
    """Wait until the port accepts connections; jax's own client would end the process with a traceback."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())):
                return
        except (OSError, UnicodeError) as error:  # UnicodeError: a host with letters that no name can have
            if time.monotonic() >= end:
                raise BadConfig(
                    f"--coordinator must be the address of process 0, which must be running, but port {port} of "
                    f"{quote(host)} could not be reached in {seconds} seconds ({error})"
                ) from error
            time.sleep(0.2)


def _initialize(options: argparse.Namespace, where: str) -> None:
    if jax.config.jax_platforms == "cpu":
        # Processes must run collectives in the same order. On CPUs, threads of XLA run independent ones in any order,
        # and so does a program from the compilation cache.
        os.environ["NPROC"] = "1"  # threads; read when the devices are first used
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process, initialization_timeout=options.timeout
        )
    except (ValueError, RuntimeError) as error:
        raise BadConfig(f"the processes did not find each other ({where}): {str(error).splitlines()[0]}") from error
    if jax.default_backend() == "cpu" and jax.config.jax_platforms != "cpu":
        raise BadConfig("JAX_PLATFORMS must be cpu to run several processes on CPUs, the only devices found")


def is_main() -> bool:
    """Return whether this is the process that writes what only one should."""
    return jax.process_index() == 0


def in_main(act: Callable[[], None], exchange: Callable[[Any], list[Any]] | None = None) -> None:
    """Call a function in the main process; if it raises InputError or OSError there, the others raise InputError.

    They would otherwise wait for it in vain. `exchange` is from `open_exchange`, for many calls.
    """
    failure = None
    if is_main():
        try:
            act()
        except (InputError, OSError) as error:
            failure = error
    problem = (exchange or open_exchange())(str(failure) if failure else None)[0]
    if failure:
        raise failure
    if problem:
        raise InputError(problem)


@contextlib.contextmanager
def locked_workdir(workdir: Path) -> Iterator[None]:
    """Lock a workdir for one run: its main process holds the lock, and all of them raise if it cannot be had."""
    with contextlib.ExitStack() as stack:
        in_main(lambda: stack.enter_context(locked_folder(workdir)))
        yield


def wait_for_all(point: str) -> None:
    """Return once every process has reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)


def open_exchange() -> Callable[[Any], list[Any]]:
    """Return an all-gather of JSON values: called by every process, it returns their values in the processes' order.

    It uses the coordinator and no devices, so that it may be called while these are busy, from another thread.
    """
    if jax.process_count() == 1:
        return lambda value: [value]
    from jax._src.distributed import global_state  # jax has no public access to the coordinator's store

    exchange, calls = next(_exchanges), itertools.count()

    def key(call: int, process: int) -> str:
        return f"ilvr_jax/exchange_{exchange}/{call}/{process}"

    def all_gather_json(value: Any) -> list[Any]:
        call, client, own = next(calls), global_state.client, jax.process_index()
        client.key_value_set(key(call, own), json.dumps(value))
        values = [
            json.loads(client.blocking_key_value_get(key(call, process), 1000 * TIMEOUT))
            for process in range(jax.process_count())
        ]
        if call:  # all processes have read the values of the call before
            client.key_value_delete(key(call - 1, own))
        return values

    return all_gather_json
