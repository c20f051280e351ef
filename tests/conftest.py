"""Options of the whole suite."""

import os
from pathlib import Path

# The tests compile hundreds of small programs once each: less optimisation takes half the time. Before jax is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

from tests.vectors import DEFAULT  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--vectors", type=Path, default=DEFAULT, help="folder of the conformance vectors to check")
