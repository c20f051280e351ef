"""Options of the whole suite."""

from pathlib import Path

from tests.vectors import DEFAULT


def pytest_addoption(parser):
    parser.addoption("--vectors", type=Path, default=DEFAULT, help="folder of the conformance vectors to check")
