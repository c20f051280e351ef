"""The records that are held out of training, to evaluate on."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from ilvr_jax.data.pipeline import Source, fingerprint
from ilvr_jax.data.records import Fingerprint, Record


class Subset:
    """Some of a source's records, numbered from 0.

    Attributes:
        skipped, remarks: sentences as a source has them.
        shuffled: the order of an epoch, if the source has the method.
    """

    def __init__(
        self,
        source: Source,
        numbers: Int[np.ndarray, " records"],
        skipped: Sequence[str] = (),
        remarks: Sequence[str] = (),
    ):
        self.skipped, self.remarks = list(skipped), list(remarks)
        self._source, self._numbers = source, numbers
        if hasattr(source, "shuffled"):
            self.shuffled = self._shuffled

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._numbers[index])]

    def fingerprint(self) -> str:
        """Return a digest of the source's own fingerprint and of the numbers of these records in it."""
        digest = Fingerprint()
        digest.add(fingerprint(self._source), self._numbers.astype("<i8").tobytes())
        return digest.text(len(self))

    def _shuffled(self, random: np.random.Generator) -> Int[np.ndarray, " records"]:
        own = np.full(len(self._source), -1)
        own[self._numbers] = np.arange(len(self))
        order = own[self._source.shuffled(random)]
        return order[order >= 0]


def hold_out(source: Source, fraction: float) -> tuple[Subset, Subset]:
    """Return the records to train on and those that are held out, at equal distances: with 0.02 every 50th.

    At least one is held out, and the first never is. Records appended to the source change no other's part.
    """
    # The small number makes up for rounding, which would delay some records by one.
    is_held_out = np.diff(np.floor(np.arange(len(source) + 1) * fraction + 1e-9)) > 0
    is_held_out[0] = False
    is_held_out[-1] |= not is_held_out.any()
    rest = Subset(source, np.flatnonzero(~is_held_out), getattr(source, "skipped", ()), getattr(source, "remarks", ()))
    return rest, Subset(source, np.flatnonzero(is_held_out))
