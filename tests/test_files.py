"""Files of users: special files, damaged JSON, failing writes, and two writers."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ilvr_jax.errors import InputError
from ilvr_jax.files import InUse, lock, locked_folder, new_folder, open_regular, read_json, write_text, written


class BadThing(InputError):
    pass


def special_files(folder: Path) -> list[Path]:
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("/dev/zero")
    return [folder / "fifo", folder / "folder", folder / "link", Path("/dev/null"), Path("/dev/zero")]


def test_reading_refuses_what_is_no_regular_file_and_never_waits(tmp_path):
    for path in special_files(tmp_path):
        with pytest.raises(OSError) as error:
            open_regular(path)
        assert error.value.filename == str(path)


def test_writing_refuses_what_is_no_regular_file(tmp_path):
    for path in special_files(tmp_path):
        before = os.stat(path).st_mode
        with pytest.raises(InputError, match="must be a regular file"):
            write_text(path, "x")
        assert os.stat(path).st_mode == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "folder", "link"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "0 bytes"),
        (b'{"a": ', "6 bytes"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"[" * 10**6, "must be JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 11\n", "git lfs pull"),
        (None, "No such file"),
    ],
)
def test_json_that_cannot_be_read_is_named(content, problem, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadThing, match=problem) as error:
        read_json(path, BadThing)
    assert str(path) in str(error.value)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a" / "x", "old")
    with pytest.raises(RuntimeError), written(tmp_path / "a" / "x") as unfinished:
        unfinished.write_text("new")
        raise RuntimeError
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    (tmp_path / "link").symlink_to("a/x")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a" / "x").read_text() == "new"


def test_a_second_writer_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    path = tmp_path / ".lock"
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom ilvr_jax.files import lock\n"
        f"with lock(Path({str(path)!r}), 'runs/x'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InUse, match=rf"runs/x .* process {other.pid} on \S+ since 20"), lock(path, "runs/x"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with lock(path, "runs/x"), pytest.raises(InUse, match=f"process {os.getpid()} "), lock(path, "runs/x"):
        pass
    with lock(path, "runs/x"):
        pass


def test_a_folder_is_held_by_one_writer_and_left_as_it_was(tmp_path):
    folder = tmp_path / "runs" / "x"
    with pytest.raises(RuntimeError), locked_folder(folder):
        with pytest.raises(InUse, match=f"^{folder} is being written by process {os.getpid()} "), locked_folder(folder):
            pass
        raise RuntimeError
    assert not (tmp_path / "runs").exists()
    with new_folder(folder), pytest.raises(InUse), new_folder(folder):
        pass
    with new_folder(folder):
        (folder / "model").touch()
    assert [path.name for path in folder.iterdir()] == ["model"]
    with pytest.raises(InputError, match=f"{folder} must be a new or empty folder"), new_folder(folder):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_warning(number, tmp_path, monkeypatch, capsys):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked_folder(tmp_path):
        pass
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{tmp_path} does not support locks ({os.strerror(number)})" in err
    assert not any(tmp_path.iterdir())
