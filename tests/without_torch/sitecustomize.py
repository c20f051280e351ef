"""Hides PyTorch from the processes that tests start: users have none, and transformers would import it."""

import sys

sys.modules["torch"] = None
