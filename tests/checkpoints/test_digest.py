"""The digest of a model: equal for every sharding, and another for any change of parameters."""

import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilvr_jax.checkpoints.trained import weighted_sums
from tests.paths import REPOSITORY

SHARDED = """
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ilvr_jax.checkpoints.trained import weighted_sums

mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
specs = [("fsdp", "tensor"), (None, "tensor", "fsdp"), ("tensor",), ()]
places = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
print(weighted_sums([jax.device_put(array, place) for array, place in zip(arrays(), places, strict=True)]))
"""


def arrays():
    keys = jax.random.split(jax.random.key(0), 2)
    matrix = jax.random.normal(keys[0], (6, 8))
    return [matrix, jax.random.normal(keys[1], (3, 4, 2)), jnp.arange(8, dtype=jnp.bfloat16), jnp.float16(0.5)]


def test_sums_are_equal_for_every_sharding():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", f"{inspect.getsource(arrays)}{SHARDED}"]
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout == f"{weighted_sums(arrays())}\n"


def test_sums_are_those_of_host_arrays():
    assert weighted_sums([np.asarray(array) for array in arrays()]) == weighted_sums(arrays())
    assert weighted_sums([]) == []


@given(st.integers(0, 47), st.integers(0, 47), st.integers(0, 31))
def test_any_flipped_bit_and_any_two_exchanged_values_change_the_sums(one, other, bit):
    matrix = np.asarray(arrays()[0])
    before = weighted_sums([matrix])
    bits = matrix.copy().reshape(-1).view(np.uint32)
    bits[one] ^= np.uint32(1) << np.uint32(bit)
    flipped = weighted_sums([bits.view(np.float32).reshape(6, 8)])
    assert all(a != b for a, b in zip(flipped[0], before[0], strict=True))
    exchanged = matrix.copy().reshape(-1)
    exchanged[[one, other]] = exchanged[[other, one]]
    assert (weighted_sums([exchanged.reshape(6, 8)]) != before) == (one != other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_moved_rows_change_the_sums(dtype):
    rows = jnp.eye(4).astype(dtype)
    assert weighted_sums([rows]) != weighted_sums([rows[::-1]])
