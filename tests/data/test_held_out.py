"""Records held out of training: a fixed part, never seen in an epoch of the rest."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilvr_jax.data.held_out import hold_out
from ilvr_jax.data.pipeline import fingerprint, shuffled_numbers
from ilvr_jax.data.zebra_cot import ZebraCotSource
from tests.zebra_cot import row, write

fractions = st.floats(1e-6, 0.999)


@given(st.integers(2, 300), fractions)
def test_every_record_is_of_one_part(count, fraction):
    rest, held_out = ([part[number] for number in range(len(part))] for part in hold_out(range(count), fraction))
    assert sorted(rest + held_out) == list(range(count)) and rest and held_out
    assert len(held_out) == max(1, int(count * fraction + 1e-9))
    gaps = np.diff([-1, *held_out])
    assert set(gaps) <= {int(1 / fraction), int(1 / fraction) + 1} or len(held_out) == 1


@given(st.integers(2, 300), st.integers(0, 300), fractions)
def test_appended_records_leave_the_others_where_they_are(count, added, fraction):
    before, after = (hold_out(range(size), fraction)[1] for size in (count, count + added))
    before, after = ([part[number] for number in range(len(part))] for part in (before, after))
    assert after[: len(before)] == before or len(before) == 1  # one is held out in any case


@pytest.mark.parametrize(("fraction", "numbers"), [(0.02, [49, 99, 149, 199]), (0.005, [199]), (0.001, [199])])
def test_a_fraction_is_every_kth_record(fraction, numbers):
    _, held_out = hold_out(range(200), fraction)
    assert [held_out[number] for number in range(len(held_out))] == numbers


def test_fingerprints_are_of_the_part_and_of_the_source():
    class Named(list):
        def __init__(self, text, count):
            super().__init__(range(count))
            self.text = text

        def fingerprint(self):
            return self.text

    prints = [
        fingerprint(part)
        for text, count, fraction in (("a", 8, 0.5), ("b", 8, 0.5), ("a", 8, 0.25), ("c", 9, 0.5))
        for part in hold_out(Named(text, count), fraction)
    ]
    assert len(set(prints)) == len(prints) and prints[0].startswith("4 records with digest ")
    assert prints[:2] == [fingerprint(part) for part in hold_out(Named("a", 8), 0.5)]


def test_an_epoch_of_a_source_with_an_order_of_its_own_has_the_rest_once(tmp_path):
    rows = [row(f"question {number}", "so", None if number == 4 else "1") for number in range(21)]
    source = ZebraCotSource(write(tmp_path / "rows.parquet", [*rows, row(None, "so")], group=4), on_bad_record="skip")
    parts = hold_out(source, 0.2)
    rest, held_out = (pickle.loads(pickle.dumps(part)) for part in parts)
    assert rest.skipped == source.skipped and len(rest.skipped) == 1 and not held_out.skipped
    order = shuffled_numbers(rest, seed=3)
    epochs = [[order[epoch * len(rest) + place] for place in range(len(rest))] for epoch in range(2)]
    assert epochs[0] != epochs[1] and all(sorted(epoch) == list(range(len(rest))) for epoch in epochs)
    seen = {rest[number].question for number in epochs[0]}
    assert len(seen) == len(rest) and not seen & {held_out[number].question for number in range(len(held_out))}
