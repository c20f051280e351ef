"""Reading and writing the files of users: only regular ones, each replaced as a whole; locks and new folders."""

import contextlib
import datetime
import errno
import functools
import json
import os
import resource
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ilvr_jax.errors import InputError, quote
from ilvr_jax.interrupts import undone_when_stopped

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a full quota, a file over the size limit
FULL_WORDS = ("No space left", "ENOSPC", "Disk quota", "File too large")
LOCK = ".lock"  # the lock file of a folder, held by the process that writes there
CANNOT_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # file systems without locks
POINTER = b"version https://git-lfs"  # the beginning of a file that was cloned without large-file storage
IS_POINTER = "is a pointer of Git's large-file storage; fetch the file itself (git lfs pull)"


class InUse(InputError):
    """A file or folder that another process is writing; the sentence names the process."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading bytes.

    Raises OSError, with the path, if it is missing or not a regular file: a FIFO or a device may never end.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(path: str | Path, raises: Callable[[str], InputError] = InputError) -> Any:
    """Return the content of a JSON file; raise `raises`, naming the file, if it cannot be read."""
    try:
        with open_regular(path) as file:
            content = file.read()
        return json.loads(content)
    except OSError as error:
        raise raises(f"{path} must be a JSON file, but cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if content.startswith(POINTER):
            problem = IS_POINTER
        else:
            problem = f"is not ({error}); it has {len(content)} bytes"
        raise raises(f"{path} must be JSON in UTF-8, but {problem}") from error


def read_object(path: str | Path, raises: Callable[[str], InputError] = InputError) -> dict[str, Any]:
    """Return the object in a JSON file; raise `raises`, naming the file, as `read_json` does."""
    content = read_json(path, raises)
    if not isinstance(content, dict):
        raise raises(f"{path} must be a JSON object, got {quote(content)}")
    return content


def read_text(path: str | Path, raises: type[InputError] = InputError) -> str:
    """Return the content of a text file in UTF-8; raise `raises`, naming the file, if it cannot be read."""
    try:
        with open_regular(path) as file:
            content = file.read()
        text = content.decode()
    except OSError as error:
        raise raises(f"{path} must be a text file, but cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise raises(f"{path} must be text in UTF-8, but is not ({error})") from error
    if content.startswith(POINTER):
        raise raises(f"{path} {IS_POINTER}")
    return text


def check_output(path: Path) -> None:
    """Raise InputError if `path` exists and is not a regular file."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device, FIFO or socket"
        raise InputError(f"{path} must be a regular file or a new one, but it is {kind}")


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path` after the block, unless the block raises an error.

    Makes folders as needed. Raises InputError if `path` is not a regular file, OSError, with the path, if it cannot be
    written.
    """
    check_output(path)
    path = Path(os.path.realpath(path))  # a link stays a link to the file
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(path):
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent)
        except OSError as error:
            error.filename = str(path)  # not the temporary file
            raise
        os.close(descriptor)
        unfinished = Path(name)
        remove = functools.partial(unfinished.unlink, missing_ok=True)
        try:
            with undone_when_stopped(remove):
                unfinished.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
                yield unfinished
                unfinished.replace(path)
        finally:
            remove()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as a whole or not at all; raise as `written` does."""
    with written(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; raise as `written` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def copy(source: Path, destination: Path) -> None:
    """Copy a small file; raise OSError, with the path that cannot be read or written."""
    with open_regular(source) as file, named_errors(destination):
        destination.write_bytes(file.read())


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Add the name of `path` to OSErrors of the block that have none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # one without a number is a sentence already
            error.filename = str(path)
        raise


def check_new_folder(path: Path) -> None:
    """Raise InputError unless `path` is new or an empty folder that no other process writes to; OSError as `lock`."""
    if path.is_dir():
        with locked_folder(path):
            _check_empty(path)
    elif os.path.lexists(path):
        kind = "a file" if path.is_file() else "a device, FIFO, socket or broken link"
        raise InputError(f"{path} must be a new or empty folder, but is {kind}")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Make or lock a new or empty folder that the block fills; empty it again if the block does not finish.

    Raises as `check_new_folder` does, and OSError, with the path, if it cannot be made or the disk is full, whatever
    error a library raises for that.
    """
    if not path.is_dir():
        check_new_folder(path)
    with locked_folder(path):
        _check_empty(path)

        def remove() -> None:
            for part in path.iterdir():
                if part.name != LOCK:
                    shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink()

        try:
            with undone_when_stopped(remove):
                yield
        except BaseException as error:
            remove()
            if is_full_disk(error) and not isinstance(error, OSError):
                raise full_disk(path) from error
            raise


def _check_empty(folder: Path) -> None:
    if any(path.name != LOCK for path in folder.iterdir()):
        raise InputError(f"{folder} must be a new or empty folder, but is not empty")


def check_room(folder: Path, size: int, file_size: int) -> None:
    """Raise the error of a full disk unless files of `size` bytes in total, up to `file_size` each, can be written."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if shutil.disk_usage(folder).free < size or 0 <= limit < min(size, file_size):
        raise full_disk(folder)


def full_disk(path: Path) -> OSError:
    """Return the error of a full disk for `path`."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is that of a full disk, by its code or its words."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def lock(path: Path, target: str) -> Iterator[None]:
    """Hold the lock file `path`, for one writer of `target`, during the block, and remove it afterwards.

    The lock ends with the process, even a killed one. A file system without locks prints a warning. Raises InUse, with
    the process that holds the lock, its host and the time, if there is one; OSError if the file cannot be made.
    """
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }

    linked = True

    def sign(descriptor: int) -> None:
        nonlocal linked
        linked = os.fstat(descriptor).st_nlink > 0
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)

    held = FileLock(path, blocking=False, thread_local=False, preserve_lock_file=True, on_acquired=sign)
    try:
        held.acquire()
        while not linked:  # its holder deleted the file after it was opened here and before it was locked
            held.release()
            held.acquire()
    except Timeout as error:
        path.touch()  # if it is missing, this raises why it cannot be made
        raise InUse(f"{target} is being written by {_holder(path)}; wait for it to end or stop it") from error
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise
        warning = (
            f"{path.parent} does not support locks ({error.strerror}), so other writers of {target} cannot be detected"
        )
        print(warning, file=sys.stderr)
    remove = functools.partial(path.unlink, missing_ok=True)
    try:
        with undone_when_stopped(remove):
            yield
    finally:
        remove()  # before the release: a process that has opened it notices that it is gone
        held.release()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make a folder if it is missing, and lock it during the block; raise as `lock` does.

    Folders that were made and are still empty are removed afterwards.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{folder} must be a folder, but is a file, a device or a broken link")
    made = [path for path in (folder, *folder.parents) if not path.exists()]

    def remove_empty() -> None:
        with contextlib.suppress(OSError):  # it is not empty
            for path in made:
                path.rmdir()

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with undone_when_stopped(remove_empty), lock(folder / LOCK, str(folder)):
            yield
    finally:
        remove_empty()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        return f"process {quote(holder['process'])} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError):  # it was made a moment ago
        return "another process"
