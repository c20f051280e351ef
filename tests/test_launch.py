"""The scripts in launch/, run with programs that stand in for gcloud, xpk, srun and the workers of a TPU slice."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch"]
TPU = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "NAME": "my-run",
    "ACCELERATOR": "v5litepod-16",
    "RUNTIME": "v2-alpha-tpuv5-lite",
}
GKE = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "CLUSTER": "my-cluster",
    "WORKLOAD": "my-run",
    "TPU_TYPE": "v5litepod-16",
    "IMAGE": "us-docker.pkg.dev/my-project/my-folder/ilvr-jax:1",
}
UP = ["create", "wait", "copy", "install", "run"]
UP_CALLS = ["create", "describe", "scp", "ssh tar", "ssh install", "ssh run"]
TRAINER = ["--config=configs/base.py", "--workdir=/mnt/bucket/run"]
NASTY = ["a  b", "it's", 'say "hi"', "$HOME", "`id`", "\\", "*", "; exit 3 #", "", "two\nlines", "&& true", "é"]

# Stands in for every program: it notes its arguments, fails on cue, and plays a slice whose workers are folders.
FAKE = """
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
program, arguments = Path(sys.argv[0]).name, sys.argv[1:]
home = Path(os.environ["FAKE_HOME"])
def note(name, *row):
    with open(home / name, "a") as file:
        file.write(json.dumps(row) + chr(10))
if program == "python" and arguments[:2] == ["-m", "ilvr_jax.train"]:
    def save(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as the trainer does: a second signal ends it at once
        time.sleep(1)
        print("saved", flush=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    print("training", flush=True)
    note("trained.jsonl", os.environ.get("HOME"), arguments[2:])
    if "FAKE_TRAINED" in os.environ: sys.exit(int(os.environ["FAKE_TRAINED"]))
    signal.alarm(60)
    while True: signal.pause()
if program in ("python", "python3"):
    note("installed.jsonl", os.environ["HOME"], program, arguments)
    if arguments[:3] == ["-m", "uv", "venv"]:
        Path(".venv/bin").mkdir(parents=True, exist_ok=True)
        shutil.copy(home / "bin" / "gcloud", ".venv/bin/python")
    sys.exit(0)
note("calls.jsonl", program, arguments)
if os.environ.get("FAKE_FAIL") and os.environ["FAKE_FAIL"] in " ".join([program, *arguments]): sys.exit(9)
if program == "srun": sys.exit(subprocess.call([word for word in arguments if word != "--kill-on-bad-exit=0"]))
if program != "gcloud" or arguments[0] != "compute": sys.exit(0)
options = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
workers = [home / "workers" / str(number) for number in range(int(os.environ.get("FAKE_WORKERS", 2)))]
if arguments[2:4] == ["queued-resources", "describe"]:
    states = (home / "states").read_text().split()
    (home / "states").write_text(" ".join(states[1:] or states))
    print(states[0])
elif arguments[2:4] == ["tpu-vm", "describe"]:
    print(len(workers))
elif arguments[3] in ("scp", "ssh"):
    for worker in workers if options["worker"] == "all" else [workers[int(options["worker"])]]:
        worker.mkdir(parents=True, exist_ok=True)
        if arguments[3] == "scp":
            source, target = (str(worker / word.removeprefix("my-run:")) if word.startswith("my-run:") else word
                              for word in arguments[4:6])
            shutil.copy(source, target)
        else:
            place = dict(cwd=worker, env=os.environ | {"HOME": str(worker)}, start_new_session=True)
            status = subprocess.call(["bash", "-c", options["command"]], **place)
            if status: sys.exit(status)
"""


class Stage:
    """A repository of its own with the scripts, and the stand-ins before everything else on PATH."""

    def __init__(self, folder: Path):
        self.folder, self.repository = folder, folder / "repository"
        (folder / "bin").mkdir()
        for name in ("gcloud", "xpk", "srun", "scontrol", "python3", "pip", "python"):
            (folder / "bin" / name).write_text(f"#!{sys.executable}\n{FAKE}")
            (folder / "bin" / name).chmod(0o755)
        shutil.copytree(ROOT / "launch", self.repository / "launch", ignore=shutil.ignore_patterns("*.env"))
        (self.repository / "ilvr_jax").mkdir()
        (self.repository / "ilvr_jax" / "train.py").touch()
        (self.repository / ".gitignore").write_text("runs/\n")
        for command in ("init", "add .", "-c user.name=a -c user.email=a@b commit -m first"):
            subprocess.run(["git", *command.split()], cwd=self.repository, check=True, capture_output=True)
        self.states("ACTIVE")

    def states(self, *states: str) -> None:
        (self.folder / "states").write_text(" ".join(states))

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "FAKE_HOME": str(self.folder), "HOME": str(self.folder), "POLL_SECONDS": "0"}
        return subprocess.run(
            ["bash", str(self.repository / "launch" / script), *arguments],
            env=environment | variables, text=True, capture_output=True, timeout=60, cwd=self.folder,
        )  # fmt: skip

    def noted(self, name: str = "calls.jsonl") -> list:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def trained(self, count: int) -> list:
        """Returns the arguments of the trainers, which start in the background."""
        end = time.monotonic() + 20
        while len(self.noted("trained.jsonl")) < count and time.monotonic() < end:
            time.sleep(0.05)
        return sorted(self.noted("trained.jsonl"))

    def steps(self) -> list[str]:
        """Returns the purpose of each call of gcloud, in a word or two."""
        said = []
        for _, arguments in self.noted():
            command = next((word for word in arguments if word.startswith("--command=")), "")
            kind = re.search(r"install|worker.sh (run|stop)|tar", command)
            said.append(arguments[3] + (f" {kind[0].split()[-1]}" if kind else ""))
        return said

    def trainers(self) -> list[int]:
        pids = [int(file.read_text()) for file in self.folder.glob("workers/*/ilvr-jax/runs/launch/train.pid")]
        programs = {pid: Path(f"/proc/{pid}/cmdline") for pid in pids}
        return [pid for pid, file in programs.items() if file.exists() and b"ilvr_jax.train" in file.read_bytes()]

    def files(self) -> dict:
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob("*") if ".git" not in path.parts}

    def end_trainers(self) -> None:
        for pid in self.trainers():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    stage.end_trainers()


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, "-x", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_up_trains_on_every_worker(stage):
    stage.states("ACCEPTED", "PROVISIONING", "ACTIVE")
    result = stage.run("tpu.sh", "up", "--", *TRAINER, *NASTY, **TPU, SPOT="1")
    assert result.returncode == 0, result.stderr
    assert stage.steps() == ["create", *["describe"] * 3, *UP_CALLS[2:]]
    where = ["--project=my-project", "--zone=us-west4-a", "--quiet"]
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    create = ["compute", "tpus", "queued-resources", "create", "my-run", "--node-id=my-run", *kind, *where]
    assert stage.noted()[0] == ["gcloud", create]
    assert all("my-run" in " ".join(call) and set(where) <= set(call) for _, call in stage.noted())
    assert all("--worker=all" in call for _, call in stage.noted() if "tpu-vm" in call)
    homes = [str(stage.folder / "workers" / worker) for worker in "01"]
    assert stage.trained(2) == [[home, ["--distributed", *TRAINER, *NASTY]] for home in homes]
    installed = [row[2] for row in stage.noted("installed.jsonl")]
    assert installed.count(["-m", "pip", "install", "--quiet", "-r", "requirements.txt", "jax[tpu]"]) == 2


def test_run_stop_and_logs(stage):
    assert stage.run("tpu.sh", "up", "--", *TRAINER, **TPU).returncode == 0
    stage.trained(2)
    for pid in stage.trainers():
        os.killpg(os.getpgid(pid), signal.SIGHUP)  # the connection drops
    assert "already" in stage.run("tpu.sh", "run", **TPU).stdout  # gcloud repeats what a dropped connection began
    other = stage.run("tpu.sh", "run", "--", "--config=other.py", **TPU)
    assert other.returncode == 1 and "Another training runs" in other.stderr and "step run failed" in other.stderr
    with ThreadPoolExecutor() as pool:  # gcloud repeats this too, while the trainers save
        stops = [
            pool.submit(lambda wait: time.sleep(wait) or stage.run("tpu.sh", "stop", **TPU), wait) for wait in (0, 0.5)
        ]
    assert [stop.result().returncode for stop in stops] == [0, 0] and len(stage.trained(2)) == 2
    assert stage.run("tpu.sh", "logs", **TPU).returncode == 0
    logs = sorted((stage.repository / "runs/launch/my-run/logs").iterdir())
    assert [log.name for log in logs] == ["worker-0.log", "worker-1.log"]
    assert [log.read_text() for log in logs] == ["training\nsaved\n"] * 2
    assert "No training runs" in stage.run("tpu.sh", "stop", **TPU).stdout


@pytest.mark.parametrize("command", ["up", "resume", "logs", "stop", "delete", "copy"])
def test_dry_run_prints_what_a_run_calls(stage, command):
    assert stage.run("tpu.sh", "up", "--", *TRAINER, *NASTY, **TPU, FAKE_WORKERS="1").returncode == 0
    stage.trained(1)
    stage.end_trainers()
    (stage.folder / "calls.jsonl").unlink()
    before = stage.files()
    dry = stage.run("tpu.sh", command, "--dry-run", **TPU, SPOT="1")
    assert dry.returncode == 0 and stage.files() == before  # not even a list of calls
    if command == "resume":
        stage.states("SUSPENDED", "ACTIVE")
    assert stage.run("tpu.sh", command, **TPU, SPOT="1", FAKE_WORKERS="1").returncode == 0
    assert stage.noted() and read_by_a_shell(dry.stdout) == stage.noted()


def read_by_a_shell(printed: str) -> list:
    """The commands that a shell reads in what --dry-run printed; every line is one."""
    note = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps([sys.argv[1], sys.argv[2:]]))'"
    shell = "git() { :; }\n" + "".join(f'{name}() {{ {note} {name} "$@"; }}\n' for name in ("gcloud", "xpk", "srun"))
    lines = [subprocess.check_output(["bash", "-c", shell + line], text=True) for line in printed.splitlines()]
    return [json.loads(line) for line in lines if line]


CUES = ["create", "describe", "scp", "tar -xzf", "worker.sh install", "worker.sh run"]


@pytest.mark.parametrize("calls, step", enumerate(["create", "wait", "copy", "copy", "install", "run"], 1))
def test_a_failing_step_ends_up(stage, calls, step):
    cue = CUES[calls - 1]
    result = stage.run("tpu.sh", "up", "--", *TRAINER, **TPU, FAKE_FAIL=cue)
    assert result.returncode == 1
    assert f"The step {step} failed: gcloud ended with status 9" in result.stderr
    assert re.findall(r"launch/tpu.sh (\w+)", result.stderr) == UP[UP.index(step) :]
    assert stage.steps() == UP_CALLS[:calls]  # no delete among them


@pytest.mark.parametrize("lost", [["SUSPENDED"], ["FAILED"], ["SUSPENDING", "SUSPENDED"]])
def test_resume_repeats_the_training(stage, lost):
    assert stage.run("tpu.sh", "up", "--", *TRAINER, *NASTY, **TPU).returncode == 0
    first = stage.trained(2)
    shutil.rmtree(stage.folder / "workers", stage.end_trainers())  # preempted: nothing on them is left
    (stage.folder / "calls.jsonl").unlink()
    stage.states(*lost, "ACTIVE")
    assert stage.run("tpu.sh", "resume", **TPU).returncode == 0
    assert stage.steps() == [*["describe"] * len(lost), "delete", *UP_CALLS]
    assert "--force" in stage.noted()[len(lost)][1]
    assert stage.trained(4) == sorted(first * 2)


@pytest.mark.parametrize("state", ["ACTIVE", "PROVISIONING", "WAITING_FOR_RESOURCES"])
def test_resume_deletes_nothing_in_use(stage, state):
    stage.states(state)
    result = stage.run("tpu.sh", "resume", "--", *TRAINER, **TPU)
    assert result.returncode == 1 and f"my-run is {state}" in result.stderr and stage.steps() == ["describe"]
    result = stage.run("tpu.sh", "resume", "--", *TRAINER, **TPU, FAKE_FAIL="describe")
    assert result.returncode == 1 and "repeat launch/tpu.sh resume" in result.stderr
    assert "nothing was deleted" not in result.stderr  # printed only for a known state
    assert stage.steps() == ["describe", "describe"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "SUSPENDING"])
def test_wait_says_that_the_slice_is_lost(stage, state):
    stage.states("PROVISIONING", state)
    result = stage.run("tpu.sh", "wait", **TPU)
    assert result.returncode == 1 and f"my-run is {state} and will not become ACTIVE" in result.stderr
    assert stage.steps() == ["describe", "describe"]


@pytest.mark.parametrize("script, command, needed", [("tpu.sh", "up", TPU), ("gke.sh", "create", GKE)])
def test_missing_and_dangerous_variables(stage, script, command, needed):
    result = stage.run(script, command, "--", *TRAINER)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert re.findall(r"(\w+) \(for example (\w+)=", result.stderr) == [(name, name) for name in needed]
    some = dict(list(needed.items())[:2])
    assert re.findall(r"(\w+) \(for", stage.run(script, command, "--", *TRAINER, **some).stderr) == list(needed)[2:]
    for name in needed:
        for value in ("x; touch harm", "$(touch harm)", "-x", "a b", "../up", "x\ny", "'", "é"):
            result = stage.run(script, command, "--", *TRAINER, **needed | {name: value})
            assert result.returncode == 2 and f"{name} must be " in result.stderr and "for example" in result.stderr
    for flaw in (["--spot"], ["rm"]):
        assert "Unknown argument" in stage.run(script, command, *flaw, **needed).stderr
    assert "must be" in stage.run(script, "destroy", **needed).stderr
    assert "after --, for example" in stage.run(script, command, **needed).stderr
    assert "got yes" in stage.run(script, command, "--", *TRAINER, **needed, SPOT="yes").stderr
    assert not stage.noted() and not list(stage.folder.rglob("harm"))


def test_variables_from_a_file(stage):
    file = stage.repository / "launch" / "tpu.env"
    file.write_text("# mine\n\n" + "".join(f"{name}={value}\n" for name, value in TPU.items()))
    assert stage.run("tpu.sh", "delete", "--env=launch/tpu.env", NAME="another").returncode == 0
    assert stage.noted()[0][1][4] == "my-run"
    file.write_text("NAME=my-run\nPATH=$(touch harm)\n")
    assert "has no file missing.env" in stage.run("tpu.sh", "delete", "--env=missing.env").stderr
    result = stage.run("tpu.sh", "delete", "--env=launch/tpu.env")
    assert result.returncode == 2 and "PATH=$(touch harm)" in result.stderr and "ACCELERATOR RUNTIME" in result.stderr
    assert len(stage.noted()) == 1 and not list(stage.folder.rglob("harm"))


def test_gke(stage):
    nasty = [word for word in NASTY if not set(word) & set("$\n")]
    create = ["create", "--", *TRAINER, *nasty]
    dry = stage.run("gke.sh", "create", "--dry-run", *create[1:], **GKE, NUM_SLICES="2")
    assert not stage.noted()
    for command in (create, ["list"], ["delete"], ["logs"]):
        assert stage.run("gke.sh", *command, **GKE, NUM_SLICES="2").returncode == 0
    where = ["--project=my-project", "--zone=us-west4-a", "--cluster=my-cluster"]
    (xpk, made), listed, deleted, (gcloud, read) = stage.noted()
    assert read_by_a_shell(dry.stdout) == [[xpk, made]] and made[:5] == ["workload", "create", *where]
    assert {"--workload=my-run", "--tpu-type=v5litepod-16", "--num-slices=2", "--docker-image=" + GKE["IMAGE"]} < {
        *made
    }
    words = shlex.split(made[-1].removeprefix("--command="))
    assert words == ["exec", "python", "-m", "ilvr_jax.train", "--distributed", *TRAINER, *nasty]
    assert listed == ["xpk", ["workload", "list", *where]]
    assert deleted == ["xpk", ["workload", "delete", *where, "--workload=my-run"]]
    assert (gcloud, read[:2]) == ("gcloud", ["logging", "read"]) and 'jobset-name"="my-run"' in read[2]
    for word in ("$HOME", "two\nlines"):
        assert "dollar sign or a line break" in stage.run("gke.sh", "create", "--", word, **GKE).stderr
    failed = stage.run("gke.sh", "delete", **GKE, FAKE_FAIL="xpk")
    assert failed.returncode == 1 and "The step delete failed: xpk ended with status 9" in failed.stderr
    assert len(stage.noted()) == 5


def test_slurm(stage):
    python = {"PYTHON": str(stage.folder / "bin" / "python")}
    job = {**python, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(stage.repository), "FAKE_TRAINED": "0"}
    assert "SLURM_JOB_ID must be set" in stage.run("slurm.sbatch", *TRAINER, **python).stderr
    assert ".venv/bin/python is not a program" in stage.run("slurm.sbatch", *TRAINER).stderr
    assert "Give the trainer's arguments" in stage.run("slurm.sbatch", **job).stderr
    elsewhere = stage.run("slurm.sbatch", *TRAINER, **job | {"SLURM_SUBMIT_DIR": str(stage.folder)})
    assert elsewhere.returncode == 2 and "top folder" in elsewhere.stderr
    dry = stage.run("slurm.sbatch", "--dry-run", *TRAINER, *NASTY, **python)
    assert dry.returncode == 0 and not stage.noted() and not stage.noted("trained.jsonl")
    assert stage.run("slurm.sbatch", *TRAINER, *NASTY, **job).returncode == 0
    assert stage.noted() == read_by_a_shell(dry.stdout)
    assert [row[1] for row in stage.noted("trained.jsonl")] == [["--distributed", *TRAINER, *NASTY]]
    failed = stage.run("slurm.sbatch", *TRAINER, **job | {"FAKE_TRAINED": "2"})
    assert failed.returncode == 2 and "srun ended with status 2" in failed.stderr
    assert stage.run("slurm.sbatch", *TRAINER, **job | {"FAKE_TRAINED": "143"}).returncode == 0
    assert [call[0] for call in stage.noted()] == ["srun"] * 3 + ["scontrol"]
    assert stage.noted()[-1] == ["scontrol", ["requeue", "7"]]
    refused = stage.run("slurm.sbatch", *TRAINER, **job | {"FAKE_TRAINED": "143", "FAKE_FAIL": "scontrol"})
    assert refused.returncode == 1 and "submit the same command again" in refused.stderr
    head = (ROOT / "launch" / "slurm.sbatch").read_text().partition("\nset -")[0].splitlines()
    assert {"#SBATCH --signal=TERM@120", "#SBATCH --requeue"} < set(head) and all(line.startswith("#") for line in head)


def test_image(stage):
    """The image copies files that exist and are not ignored; its accelerators are the documented ones."""
    text = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {line.split()[1] for line in text.splitlines() if line.startswith("COPY")}
    assert copied == kept and all((ROOT / path).exists() for path in copied)
    install = next(line for line in text.splitlines() if line.startswith("RUN case")).removeprefix("RUN ")
    for accelerator, extra in {"tpu": "jax[tpu]", "cuda13": "jax[cuda13]", "cpu": "jax", "gpu": None}.items():
        path = f"{stage.folder / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "FAKE_HOME": str(stage.folder), "ACCELERATOR": accelerator}
        result = subprocess.run(["sh", "-c", install], env=environment, capture_output=True, text=True)
        if extra:
            assert stage.noted()[-1] == ["pip", ["install", "--no-cache-dir", "-r", "requirements.txt", extra]]
        else:
            assert result.returncode == 2 and "tpu, cuda13 or cpu" in result.stderr
