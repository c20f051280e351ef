"""Options of the whole suite."""

import atexit
import gc
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# The tests compile hundreds of small programs once each: less optimisation and plainer code for what is fused take a
# third of the time. Before jax is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# Each in one piece, since the tests use all cores already.
PLAIN_CODE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{PLAIN_CODE} {os.environ.get('XLA_FLAGS', '')}"

# And files, processes and the commands that they start meet each other's programs again: one folder for the session.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from tests.paths import REPOSITORY  # noqa: E402
from tests.vectors import DEFAULT, SHARED  # noqa: E402

gc.set_threshold(50_000)  # tracing allocates many objects, few of them garbage
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; tests send it to commands
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, which start first, so that no worker ends with one of them alone.
LONGEST = ("test_pretrained_run", "test_sharding", "test_processes", "test_objectives", "test_kills", "test_step")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _processes_without_torch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY / "tests" / "without_torch"), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """Free the compiled programs after a file if they hold many memory mappings.

    A process may have 65,530 of these on Linux, and half of the files compile more; then LLVM ends the process. No file
    alone adds 50,000.
    """
    yield
    if "jax" in sys.modules and memory_mappings() > 15_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


def memory_mappings() -> float:
    """Return the number of memory mappings of this process, infinity where there is no way to count them."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else math.inf


def pytest_addoption(parser):
    parser.addoption("--vectors", type=Path, default=DEFAULT, help="folder of the conformance vectors to check")


@pytest.fixture(scope="session")
def published_processor() -> Path:
    """The folder of Qwen2.5-VL's own tokenizer and chat template; 11 MB that are not kept in the repository."""
    folder = SHARED / "data" / "qwen2_5_vl_processor"
    if not folder.is_dir():
        pytest.skip("optional data: Qwen2.5-VL's tokenizer files are not in ../shared/data/qwen2_5_vl_processor")
    return folder
