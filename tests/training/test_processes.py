"""Several processes as one run: the losses of one process, and checkpoints that cross over."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ilvr_jax.distributed import split_address
from ilvr_jax.files import locked_folder
from ilvr_jax.train import main
from ilvr_jax.training.metrics import read_metrics
from tests.samples import export_maps
from tests.vectors import COPIES, of_kind

REPOSITORY = Path(__file__).parents[2]
CONFIG = """
from pathlib import Path

from tests.samples import tiny_config


def get_config():
    config = tiny_config(Path({data!r}))
    config.data.update(source="ilvr", path={data!r}, image_scale=28 / 64)
    config.stages = ("stage1", "stage2")
    for name in config.stages:
        config[name].update(batch_size=8, accumulation=2)
    config.mesh.update(data=2, fsdp=-1)
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "config.py").write_text(CONFIG.format(data=str(export_maps(folder, 12))))
    return folder / "config.py"


def free_port(family: socket.AddressFamily = socket.AF_INET) -> int:
    with socket.socket(family) as probe:
        probe.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    config_file: Path, workdir: Path, processes: int, devices: int = 8, flags: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """Start the training command in some processes, of so many devices together."""
    command = ["train", f"--config={config_file}", f"--workdir={workdir}", *flags]
    command.append(f"--config.data.feature_cache={workdir / 'features'}")
    return start_command(command, config_file.parent, processes, devices)


def start_command(command: list[str], folder: Path, processes: int, devices: int = 8) -> list[subprocess.Popen]:
    """Start a command in some processes, of so many devices together; compiled programs are kept in the folder."""
    command = [sys.executable, "-m", f"ilvr_jax.{command[0]}", *command[1:]]
    where = f"--coordinator=127.0.0.1:{free_port()}"
    devices_flag = f"--xla_force_host_platform_device_count={devices // processes}"
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices_flag}"}
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PLATFORMS": "cpu",
    }
    places = [[where, f"--processes={processes}", f"--process={number}"] for number in range(processes)]
    return [
        subprocess.Popen(
            command + (places[number] if processes > 1 else []),
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]


def train(config_file: Path, workdir: Path, processes: int) -> list[str]:
    """Run the training command to its end and return the output of each process."""
    return outputs_of(start(config_file, workdir, processes))


def outputs_of(started: list[subprocess.Popen]) -> list[str]:
    """Wait for the processes of a command to succeed, and return what each printed."""
    try:
        printed = [process.communicate(timeout=240)[0] for process in started]
    finally:  # processes that wait for each other would never end
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(printed)[-3000:]
    return printed


def curve(workdir: Path) -> np.ndarray:
    return np.array([[line["loss"], line["gradient_norm"]] for line in read_metrics(workdir)])


@pytest.fixture(scope="module")
def one(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    train(config_file, workdir, 1)
    return workdir


@pytest.fixture(scope="module")
def two(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, train(config_file, workdir, 2)


def test_two_processes_have_the_losses_of_one_and_one_of_them_writes(one, two):
    workdir, printed = two
    assert curve(one).shape == (12, 2)
    np.testing.assert_allclose(curve(workdir), curve(one), atol=1e-4)
    assert "Results written to" in printed[0] and "accuracy" in printed[0]
    assert "stage1" not in printed[1]
    names = [sorted(path.name for path in (run / "evaluations").iterdir()) for run in (one, workdir)]
    assert names[0] == names[1] and len(names[0]) == 3 * 2
    for stage in ("stage1", "stage2"):
        answers = (workdir / "evaluations" / f"{stage}-vsp_planning-latent.jsonl").read_text().splitlines()
        assert len(answers) == 1 + 2 * 12  # with and without holes
    assert "stage1: encoded" in printed[0] and "stage2: encoded 0 images" in printed[0]
    assert answers_of(one) == answers_of(workdir)


def answers_of(workdir: Path) -> dict[tuple[int, str], str]:
    """Return the text of each answer after the last stage."""
    lines = (workdir / "evaluations" / "stage2-vsp_planning-latent.jsonl").read_text().splitlines()[1:]
    return {(line["number"], line["form"]): line["text"] for line in map(json.loads, lines)}


def test_two_processes_evaluate_as_one(one, tmp_path, config_file):
    workdir = tmp_path / "run"
    shutil.copytree(one, workdir)
    shutil.rmtree(workdir / "evaluations")
    printed = outputs_of(start_command(["evaluate", str(workdir), "--mesh=data=2,fsdp=-1"], config_file.parent, 2))
    assert "Answers written to" in printed[0] and "Answers written to" not in printed[1]
    assert answers_of(workdir) == answers_of(one)


def test_two_processes_decode_the_tokens_of_the_published_code(tmp_path):
    command = [sys.executable, "-m", "tests.decoding_processes", str(tmp_path / "tokens")]
    port, vectors = str(free_port()), of_kind(COPIES, "generate")[:2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    started = [
        subprocess.Popen([*command, str(process), port], cwd=REPOSITORY, env=environment) for process in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in started] == [0, 0]
    finally:  # processes that wait for each other would never end
        for process in started:
            process.kill()
    for process in range(2):
        for vector, tokens in zip(vectors, np.load(tmp_path / f"tokens.{process}.npy"), strict=True):
            expected = vector["expect_tokens"]
            np.testing.assert_array_equal(tokens[: len(expected)], expected)


@pytest.mark.parametrize(("begun_by", "ended_by"), [(1, 2), (2, 1)])
def test_a_checkpoint_crosses_over(begun_by, ended_by, one, two, config_file, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(one if begun_by == 1 else two[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "stage2" / "6")
    (workdir / "stages" / "stage2.json").unlink()
    printed = train(config_file, workdir, ended_by)
    assert "stage2: resuming from step 4" in printed[0]
    np.testing.assert_allclose(curve(workdir), curve(one), atol=1e-4)


def test_what_one_process_cannot_read_is_damaged_for_all(tmp_path):
    command = [sys.executable, "-m", "tests.shared_checkpoint", str(tmp_path), str(free_port())]
    started = [subprocess.Popen([*command, str(process)], cwd=REPOSITORY) for process in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    logs = [(tmp_path / f"log_{process}.txt").read_text() for process in range(2)]
    assert logs[0] == logs[1] and logs[0].endswith("; restored 1: 1")
    assert "2 is damaged" in logs[0] and "renamed to 2.damaged; using the checkpoint of step 1" in logs[0]


def test_sigterm_to_one_stops_all_at_the_same_step(config_file, tmp_path):
    # One device per process, where collectives of XLA on CPUs were met in different orders.
    started = start(config_file, tmp_path, 2, devices=2, flags=("--config.mesh.data=1",))
    while all(process.poll() is None for process in started) and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.01)
    started[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [128 + signal.SIGTERM] * 2, "\n".join(printed)[-3000:]
    ((stage, step),) = set(re.findall(r"stopped in (\S+) after step (\d+) of 6", "".join(printed)))
    assert (tmp_path / "checkpoints" / stage / step).is_dir()


def test_all_processes_of_a_second_run_are_refused(config_file, tmp_path):
    with locked_folder(tmp_path / "run"):
        started = start(config_file, tmp_path / "run", 2)
        printed = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], "\n".join(printed)[-3000:]
    assert all(f"{tmp_path / 'run'} is being written by process {os.getpid()}" in one for one in printed)
    assert not (tmp_path / "run").exists()


PORT, HOST = "its port must be from 1 to 65535", "its host must be a name or an address"
BAD_ADDRESSES = [
    ("", PORT),
    ("here", PORT),
    ("here:", PORT),
    ("here:0", PORT),
    ("here:70000", PORT),
    ("here:-1", PORT),
    ("here:1.5", PORT),
    ("here:٣", PORT),
    ("[::1]", PORT),
    (":1234", HOST),
    ("a b:1234", HOST),
    ("http://here:1234", "an IPv6 address must be in brackets, as in [::1]:1234"),
    ("::1:1234", "an IPv6 address must be in brackets, as in [::1]:1234"),
    ("[here]:1234", "brackets must hold an IPv6 address"),
    ("[]:1234", "brackets must hold an IPv6 address"),
]


INITIALIZE = """
import argparse, sys
import jax
from ilvr_jax.distributed import add_flags, initialize_distributed, open_exchange
parser = argparse.ArgumentParser()
add_flags(parser)
initialize_distributed(parser.parse_args(sys.argv[1:]))
print(open_exchange()(jax.process_index()))
"""


def test_processes_meet_at_an_ipv6_address():
    address = f"localhost:{free_port()}"
    with contextlib.suppress(OSError):  # a machine without IPv6
        address = f"[::1]:{free_port(socket.AF_INET6)}"
    command = [sys.executable, "-c", INITIALIZE, f"--coordinator={address}", "--processes=2", "--timeout=60"]
    started = [
        subprocess.Popen(
            [*command, f"--process={process}"],
            cwd=REPOSITORY,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in started] == ["[0, 1]\n"] * 2


def test_addresses_are_split():
    for address, parts in {
        "localhost:1234": ("localhost", 1234),
        "10.0.0.1:1": ("10.0.0.1", 1),
        "worker-0.job:65535": ("worker-0.job", 65535),
        "[::1]:1234": ("::1", 1234),
        "[fe80::1%eth0]:1234": ("fe80::1%eth0", 1234),
    }.items():
        assert split_address(address) == parts


PLAIN_MAPS = f"--config={REPOSITORY / 'configs' / 'plain_maps.py'}"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--processes=2"], "--processes and --process must come with --coordinator=host:port"),
        (
            ["--coordinator=localhost:1", "--processes=2", "--process=2"],
            "a --process from 0 to below that, got 2 and 2",
        ),
        (["--coordinator=localhost:1", "--processes=2"], "a --process from 0 to below that, got 2 and None"),
        (["--coordinator=localhost:1", "--processes=0", "--process=0"], "must come with --processes, from 1 to 100000"),
        (["--coordinator=localhost:1", f"--processes={10**12}", "--process=1"], "from 1 to 100000"),
        (["--timeout=0"], "--timeout must be from 1 to 604800 seconds, got 0"),
        ([f"--timeout={10**20}"], "--timeout must be from 1 to 604800 seconds"),
        *(
            ([f"--coordinator={address}", "--processes=2", "--process=1"], f"host:port, and {problem}, got {address!r}")
            for address, problem in BAD_ADDRESSES
        ),
        (
            ["--coordinator=127.0.0.1:1", "--processes=2", "--process=1", "--timeout=1"],
            "port 1 of '127.0.0.1' could not be reached in 1 seconds",
        ),
    ],
)
def test_bad_flags_get_one_sentence(flags, sentence, tmp_path, capsys):
    assert main([PLAIN_MAPS, f"--workdir={tmp_path / 'run'}", *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
