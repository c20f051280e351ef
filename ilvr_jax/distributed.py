"""Several processes as one run: how they find each other, and what they tell each other beside the devices."""

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

TIMEOUT = 300  # seconds to wait for the others
LONGEST_TIMEOUT = 7 * 24 * 3600
MOST_PROCESSES = 100_000
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
    if not 1 <= options.timeout <= LONGEST_TIMEOUT:
        raise BadConfig(f"--timeout must be from 1 to {LONGEST_TIMEOUT} seconds, got {quote(options.timeout)}")
    if options.coordinator is None:
        if options.processes is not None or options.process is not None:
            raise BadConfig("--processes and --process must come with --coordinator=host:port")
        if options.distributed:
            _initialize(options, "as the surroundings say")
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
    """Returns host and port of "host:port"; an IPv6 host is in brackets there, and returned without.

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
    """Waits until something listens; jax's own client would end the process with a trace."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())):
                return
        except (OSError, UnicodeError) as error:  # a host of letters that no name has is a UnicodeError
            if time.monotonic() >= end:
                raise BadConfig(
                    f"--coordinator must be the address of process 0, which must run, but port {port} of {quote(host)} "
                    f"could not be reached in {seconds} seconds ({error})"
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
        raise BadConfig("JAX_PLATFORMS must be cpu for several processes on CPUs, the only devices here")


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
