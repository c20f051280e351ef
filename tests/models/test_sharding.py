"""Arrays on a mesh: the same numbers as on one device, each parameter sharded as in the table."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ilvr_jax.config.schema import LoraConfig
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.sharding import AXES, check_mesh, make_mesh, shardings
from ilvr_jax.training.step import OBJECTIVES, accumulation_parts
from tests.samples import CONFIG
from tests.vectors import COPIES, of_kind

REPOSITORY = Path(__file__).parents[2]
ONE = {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of tests/sharded_runs.py on eight simulated devices, by run and mesh."""
    out = tmp_path_factory.mktemp("sharded") / "runs.npz"
    command = [sys.executable, "-m", "tests.sharded_runs", str(out)]
    finished = subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = {}
    for name, values in np.load(out).items():
        what, mesh = name.split(" ", 1)
        found.setdefault(what, {})[mesh] = values
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_mesh_gives_the_losses_of_one_device(runs, objective):
    one = runs[objective].pop("(1, 1, 1, 1)")
    # One objective was also run with a kernel's attention, and from a checkpoint to the next on changing meshes.
    assert len(runs[objective]) == (6 if objective == "alignment" else 4) and one.shape == (5, 2)
    assert np.abs(np.diff(one[:, 0])).min() > 1e-2  # five steps that learn
    for mesh, losses in runs[objective].items():
        np.testing.assert_allclose(losses, one, atol=1e-4, err_msg=mesh)


def test_the_loss_does_not_send_the_head_for_each_chunk(runs):
    assert runs["sent"]["by_the_loss"] < 1  # in sizes of the head: 0.3, or 17 where each of 16 chunks fetches it


def test_every_mesh_decodes_the_tokens_of_one_device(runs):
    one = runs["tokens"].pop("(1, 1, 1, 1)")
    # On one mesh the cache was also written as on a TPU.
    assert len(runs["tokens"]) == 5 and len(np.unique(one)) > 10
    for mesh, tokens in runs["tokens"].items():
        np.testing.assert_array_equal(tokens, one, err_msg=mesh)


def test_every_mesh_decodes_the_tokens_of_the_published_code(runs):
    vectors = of_kind(COPIES, "generate")
    assert len(runs["published"]) == 4
    for mesh, answers in runs["published"].items():
        for vector, tokens in zip(vectors, answers, strict=True):
            expected = vector["expect_tokens"]
            np.testing.assert_array_equal(tokens[: len(expected)], expected, err_msg=f"{vector.name} {mesh}")


def test_the_communication_of_a_loop_is_counted_as_often_as_it_runs(runs):
    assert runs["collectives"]["(1, 1, 8, 1)"].tolist() == [True, 5, 5 * 4 * 64 * 4]


def abstract_mesh(**sizes: int) -> AbstractMesh:
    sizes = {**ONE, **sizes}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def test_every_matrix_of_the_decoder_is_divided_over_fsdp_and_tensor():
    model = Qwen2_5VL(dataclasses.replace(CONFIG, lora=LoraConfig(rank=2)))
    params = jax.eval_shape(model.init, jax.random.key(0))
    places = shardings(params, abstract_mesh(fsdp=4, tensor=2))
    for path, place in jax.tree_util.tree_leaves_with_path(places["decoder"]):
        name = jax.tree_util.keystr(path)
        if "kernel" in name or "embed_tokens" in name or "lm_head" in name:
            assert {"fsdp", "tensor"} <= set(place.spec), name
    for path, place in jax.tree_util.tree_leaves_with_path(places["adapters"]):
        assert any(place.spec), jax.tree_util.keystr(path)
    assert places["decoder"]["norm"]["weight"].spec == PartitionSpec()


def test_an_axis_that_the_mesh_does_not_divide_is_whole():
    tree = {"qkv": {"kernel": jnp.zeros((6, 10))}}
    assert shardings(tree, abstract_mesh(fsdp=4))["qkv"]["kernel"].spec == PartitionSpec()
    assert shardings(tree, abstract_mesh(fsdp=5))["qkv"]["kernel"].spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"data": 3}, "the number of devices must be 3 for slice 1, data 3, fsdp 1, tensor 1, got 8"),
        ({"data": -1, "tensor": 3}, "the number of devices must be a multiple of 3 for .*, got 8"),
        ({"data": -1, "fsdp": -1}, "at most one size may be -1 \\(all remaining devices\\), got"),
        ({"data": 0}, "sizes must be whole numbers from 1, or -1 for the rest, got"),
        ({"data": True}, "sizes must be whole numbers from 1, or -1 for the rest, got"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_mesh({**ONE, **sizes}, jax.devices() * 8)


@pytest.mark.parametrize(("axis", "name"), [("tensor", "num_attention_heads"), ("fsdp", "hidden_size")])
def test_a_mesh_that_does_not_divide_the_model_is_refused(axis, name):
    with pytest.raises(ValueError, match=rf"{axis} must divide the model's {name} \(\d+\), got 3"):
        check_mesh(abstract_mesh(**{axis: 3}), CONFIG)
    check_mesh(abstract_mesh(tensor=2, fsdp=8), CONFIG)


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_device_has_no_more_rows_at_a_time_than_one_alone_would(at_a_time, accumulation):
    devices = 4
    batch_size = at_a_time * accumulation
    if batch_size % devices:
        with pytest.raises(ValueError, match=f"batch_size must be a multiple of {devices}, the devices"):
            accumulation_parts(batch_size, accumulation, devices)
        return
    parts = accumulation_parts(batch_size, accumulation, devices)
    assert batch_size // devices % parts == 0 and batch_size // devices // parts <= at_a_time
    assert accumulation_parts(batch_size, accumulation, 1) == accumulation
    assert accumulation_parts(batch_size, 1, devices) == 1
    assert parts <= accumulation


def test_the_axes_of_a_config_are_those_of_the_mesh():
    assert tuple(make_mesh(ONE, jax.devices()[:1]).axis_names) == AXES
