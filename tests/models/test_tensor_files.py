"""Host memory while checkpoints are read and written: one tensor at a time beside the parameters."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ilvr_jax.checkpoints.pretrained import open_pretrained
from ilvr_jax.checkpoints.weights import load_params
from ilvr_jax.models.qwen2_5_vl.config import model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.weights import put
from ilvr_jax.models.tensor_files import TensorFiles, TensorToWrite, checkpoint_tensors, write_tensors
from tests.published import save_published


class Held:
    """The arrays handed out that still are in memory."""

    def __init__(self):
        self.references = []

    def hand_out(self, array: np.ndarray) -> np.ndarray:
        """Return a copy that is tracked."""
        # At an address that no device would take for a buffer of its own, in place of a copy.
        room = np.empty(array.nbytes + 128, np.uint8)
        start = 64 - room.ctypes.data % 64 + 16
        copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        self.references.append(weakref.ref(room))
        return copy

    def count(self) -> int:
        return sum(reference() is not None for reference in self.references)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tensor_is_let_go_before_the_next_is_read(tmp_path, monkeypatch, dtype):
    save_published(tmp_path, shard="40KB")
    pretrained, held, read = open_pretrained(tmp_path), Held(), TensorFiles.__getitem__

    def watched(self, name):
        # The runtime lets go of the tensor before when it is next called.
        assert held.count() <= 1, f"two tensors are held when {name} is read"
        return held.hand_out(read(self, name))

    monkeypatch.setattr(TensorFiles, "__getitem__", watched)
    config = model_config_from_hf(pretrained.hf_config)
    params = load_params(pretrained, config, dtype, jax.random.key(0))
    assert len(held.references) == len(checkpoint_tensors(tmp_path))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_is_put_in_its_place_without_a_copy_of_the_others(dtype):
    stacked, tensor = jax.ShapeDtypeStruct((50, 64, 32), dtype), jax.ShapeDtypeStruct((64, 32), "bfloat16")
    memory = put.lower(stacked, tensor, 0).compile().memory_analysis()
    assert memory.alias_size_in_bytes == stacked.size * stacked.dtype.itemsize  # it is written where it was
    assert memory.temp_size_in_bytes < 5 * tensor.size * tensor.dtype.itemsize


def test_a_tensor_is_let_go_before_the_next_is_made(tmp_path):
    held = Held()

    def make(value: int) -> np.ndarray:
        assert held.count() == 0
        return held.hand_out(np.full((3, value), value, np.float16))

    write_tensors([TensorToWrite(f"t{n}", "float16", (3, n), lambda n=n: make(n)) for n in range(1, 6)], tmp_path)
    assert len(held.references) == 5
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, np.full((3, int(name[1:])), int(name[1:]), np.float16))
