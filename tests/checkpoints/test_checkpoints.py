"""Checkpoints: what is restored is what was saved, however the process ended."""

import errno
import os
import shutil

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from ilvr_jax.checkpoints.manager import Checkpoints, DamagedCheckpoint, DiskFull, OtherCheckpoint
from ilvr_jax.checkpoints.runs import stage_folder, stages_with_checkpoints
from ilvr_jax.config.workdir import is_checkpoint


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    teacher: dict | None
    rng: jax.Array


def make_state(with_teacher=True):
    params = {"decoder": {"kernel": jnp.arange(200_000.0).reshape(500, 400).astype(jnp.bfloat16)}, "vision": {}}
    teacher = {"kernel": jnp.ones((3, 2))} if with_teacher else None
    return State(jnp.int32(0), params, optax.adamw(1e-3).init(params), teacher, jax.random.key(7))


def make_iterator():
    return iter(grain.MapDataset.range(1000).shuffle(seed=3).repeat().to_iter_dataset().batch(4))


def numbers(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.replace(rng=jax.random.key_data(state.rng)))]


@pytest.mark.parametrize("with_teacher", [True, False])
def test_state_and_place_in_the_data_come_back(tmp_path, with_teacher):
    state, iterator = make_state(with_teacher), make_iterator()
    for _ in range(3):
        next(iterator)
    with Checkpoints(tmp_path / "stage", keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, state, iterator)
        following = next(iterator)
    fresh = make_iterator()
    with Checkpoints(tmp_path / "stage", keep=1) as checkpoints:
        assert checkpoints.latest() == 3
        restored = checkpoints.restore(3, jax.eval_shape(lambda: make_state(with_teacher)))
        fresh.set_state(checkpoints.restore_place(3))
        params = checkpoints.restore_params(3, state.params)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for one, other in zip(numbers(restored), numbers(state), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(params["decoder"]["kernel"], state.params["decoder"]["kernel"])
    np.testing.assert_array_equal(next(fresh), following)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """The step that follows reuses the buffers while the save is still being written."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = State(jnp.int32(0), {"kernel": jnp.zeros((2000, 1000))}, (), None, jnp.int32(0))
    like = jax.eval_shape(lambda: state)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for number in range(1, 4):
            state = step(state)
            checkpoints.save(number, state, make_iterator())
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        for number in range(1, 4):
            restored = checkpoints.restore(number, like)
            np.testing.assert_array_equal(restored.params["kernel"], number)


def test_the_newest_are_kept(tmp_path):
    state, iterator = make_state(), make_iterator()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, state, iterator)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "3"]


def test_a_folder_is_a_checkpoint_by_its_name(tmp_path):
    for name, expected in (("4", True), ("04", False), ("²", False), ("4.damaged", False), ("0", True), ("-4", False)):
        (tmp_path / name).mkdir()
        assert is_checkpoint(tmp_path / name) == expected
    (tmp_path / "7").write_text("")
    assert not is_checkpoint(tmp_path / "7")


def test_an_unfinished_checkpoint_is_not_one(tmp_path):
    folder = stage_folder(tmp_path, "stage1")
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, make_state(), make_iterator())
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    (folder / "2.orbax-checkpoint-tmp" / "left_behind").touch()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest() == 1
    assert (folder / "2.orbax-checkpoint-tmp").exists()  # another process may be writing it, so a reader leaves it
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, make_state(), make_iterator())  # waits for the removal, which runs in parallel
        assert not (folder / "2.orbax-checkpoint-tmp" / "left_behind").exists()
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["1", "2"]
    assert stages_with_checkpoints(tmp_path, ("warm_up", "stage1", "stage2")) == ["stage1"]


def test_a_disk_with_too_little_room_is_noticed_before_writing(tmp_path, monkeypatch):
    state = make_state()
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    usage = shutil.disk_usage(tmp_path)
    with pytest.raises(DiskFull, match=r"\(1.2 MB are needed, 1.2 MB are free\)"):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(1, state, make_iterator())
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
            checkpoints.save(2, state, make_iterator())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_a_full_disk_gets_one_sentence_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    state, iterator = make_state(), make_iterator()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, iterator)

    def no_room(self, *arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch, pytest.raises(DiskFull, match="no disk space .* before it are complete"):
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            patch.setattr(type(epath.Path("/")), "write_text", no_room)
            checkpoints.save(2, state, iterator)
            checkpoints.wait()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.restore(1, state)


def the_only(folder, pattern):
    (path,) = [path for path in folder.glob(pattern) if path.is_file()]
    return path


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def invert(path):
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


DAMAGES = {
    "data of arrays gone": lambda folder: largest(folder / "params" / "ocdbt.process_0" / "d").unlink(),
    "data of arrays cut off": lambda folder: os.truncate(largest(folder / "params" / "ocdbt.process_0" / "d"), 1000),
    "list of arrays gone": lambda folder: (folder / "params" / "manifest.ocdbt").unlink(),
    "list of arrays empty": lambda folder: os.truncate(folder / "training" / "manifest.ocdbt", 0),
    "list of arrays changed": lambda folder: invert(the_only(folder, "training/d/*")),
    "metadata empty": lambda folder: os.truncate(folder / "training" / "_METADATA", 0),
    "metadata a list": lambda folder: (folder / "params" / "_METADATA").write_text("[1, 2]"),
    "metadata a folder": lambda folder: [
        (folder / "params" / "_METADATA").unlink(),
        (folder / "params" / "_METADATA").mkdir(),
    ],
    "a FIFO among the arrays": lambda folder: os.mkfifo(folder / "params" / "fifo"),
    "metadata gone": lambda folder: (folder / "training" / "_METADATA").unlink(),
    "metadata changed": lambda folder: invert(folder / "params" / "_METADATA"),
    "parameters gone": lambda folder: shutil.rmtree(folder / "params"),
    "place gone": lambda folder: the_only(folder, "data/metadata").unlink(),
    "place cut off": lambda folder: os.truncate(the_only(folder, "data/metadata"), 5),
    "everything gone": lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2, whose states hold the step."""
    folder, state = tmp_path_factory.mktemp("two"), make_state()
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state.replace(step=jnp.int32(step)), make_iterator())
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(two, tmp_path, damage):
    folder, like, messages = tmp_path / "stage", jax.eval_shape(make_state), []
    shutil.copytree(two, folder)
    DAMAGES[damage](folder / "2")
    with Checkpoints(folder, keep=2) as checkpoints:

        def restore(step):
            checkpoints.restore_place(step)
            return checkpoints.restore(step, like)

        assert checkpoints.latest() == 2
        step, state = checkpoints.restore_newest(restore, messages.append, set_aside=True)
        assert step == int(state.step) == checkpoints.latest() == 1
        assert len(messages) == 1 and messages[0].startswith(f"the checkpoint {folder / '2'} is damaged (")
        assert (
            messages[0].endswith("), renamed to 2.damaged; using the checkpoint of step 1") and "\n" not in messages[0]
        )
        checkpoints.save(2, state.replace(step=jnp.int32(2)), make_iterator())
        checkpoints.wait()
        step, state = checkpoints.restore_newest(restore, messages.append)
        assert (step, int(state.step), len(messages)) == (2, 2, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "2.damaged"]
    with Checkpoints(folder, keep=1) as checkpoints:  # renamed checkpoints do not count
        checkpoints.save(3, state, make_iterator())
    assert sorted(path.name for path in folder.iterdir()) == ["2.damaged", "3"]


@pytest.mark.parametrize("content", ["", "[1]", '{"metrics": 3}', '{"init_timestamp_nsecs": "x"}'])
def test_the_file_that_orbax_reads_first_is_named(two, tmp_path, content):
    """Without the file the checkpoint can be read."""
    folder, state = tmp_path / "stage", make_state()
    shutil.copytree(two, folder)
    path = folder / "2" / "_CHECKPOINT_METADATA"
    path.write_text(content)
    with pytest.raises(DamagedCheckpoint, match=f"^{folder}/(2|[*])/{path.name} must .*; delete that file") as error:
        Checkpoints(folder)
    assert len(str(error.value)) < 400
    path.unlink()
    with Checkpoints(folder) as checkpoints:
        assert (
            checkpoints.restore_newest(lambda step: checkpoints.restore_params(step, state.params), pytest.fail)[0] == 2
        )


def test_damage_everywhere_is_an_error_that_leaves_the_folder_as_it_is(two, tmp_path):
    folder = tmp_path / "stage"
    shutil.copytree(two, folder)
    DAMAGES["parameters gone"](folder / "1")
    DAMAGES["data of arrays gone"](folder / "2")
    with Checkpoints(folder, keep=2) as checkpoints, pytest.raises(DamagedCheckpoint) as error:
        checkpoints.restore_newest(lambda step: checkpoints.restore(step, make_state()), pytest.fail, set_aside=True)
    assert f"no checkpoint in {folder} can be read: restore one of 2, 1 from a copy, or move" in str(error.value)
    assert f"{folder / '2'} is damaged (" in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_reader_leaves_a_damaged_checkpoint_where_it_is(two, tmp_path):
    folder, messages = tmp_path / "stage", []
    shutil.copytree(two, folder)
    DAMAGES["data of arrays gone"](folder / "2")
    with Checkpoints(folder) as checkpoints:
        like = make_state().params
        step, params = checkpoints.restore_newest(lambda step: checkpoints.restore_params(step, like), messages.append)
    assert step == 1 and messages[0].endswith("); using the checkpoint of step 1")
    np.testing.assert_array_equal(params["decoder"]["kernel"], like["decoder"]["kernel"])
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"params": {"decoder": {"kernel": jnp.zeros((5, 4))}}},
            r"decoder.kernel of shape \(500, 400\) in place of \(5, 4\)",
        ),
        (
            {"params": {"decoder": {"kernels": jnp.zeros((500, 400))}}},
            "params has the unexpected decoder.kernel",
        ),
        ({"teacher": None}, "training has the unexpected teacher.kernel"),
        ({"opt_state": (*make_state().opt_state, {"new": jnp.zeros(3)})}, r"training has no opt_state.\d.new"),
    ],
)
def test_a_checkpoint_of_another_model_is_no_damaged_one(two, tmp_path, changes, difference):
    """It is not skipped for the one before it, which is not this model's either."""
    folder = tmp_path / "stage"
    shutil.copytree(two, folder)
    like = make_state().replace(**changes)
    with Checkpoints(folder, keep=2) as checkpoints, pytest.raises(OtherCheckpoint, match=difference) as error:
        checkpoints.restore_newest(lambda step: checkpoints.restore(step, like), pytest.fail, set_aside=True)
    assert f"the checkpoint {folder / '2'} must be of this config's model, but " in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
