"""Where the repository and its data are."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
