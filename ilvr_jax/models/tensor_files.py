"""Safetensors files, of published checkpoints and others, read and written one tensor at a time."""

import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from ilvr_jax.errors import InputError, listed, one_line, quote
from ilvr_jax.files import IS_POINTER, POINTER, named_errors, open_regular, read_json, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # in a file's header
COMPARED_ROWS = 4096  # of two matrices, at a time
SHARD_BYTES = 5 * 10**9  # as in transformers
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FOREIGN = (*PICKLES, ".gguf", ".safetensors", ".safetensors.index.json")  # the ends of names of files of weights


class BadCheckpoint(InputError):
    """A checkpoint that cannot be used; the sentence names the file or tensors, what they must be and what they are."""


class Place(NamedTuple):
    """A tensor's file, and its shape and dtype in the file's header."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # "F32", "BF16", "F8_E4M3" and so on


class TensorFiles(Mapping[str, Shaped[np.ndarray, "..."]]):
    """The tensors of safetensors files by name, each read from disk on access."""

    def __init__(self, places: Mapping[str, Place]):
        self.places = places

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        # Opened every time, since the pages read stay in the process's memory while the file is open.
        with safe_open(self.places[name].path, framework="numpy") as file:
            return file.get_tensor(name)

    def equal(self, name: str, other: str) -> bool:
        """Return whether two matrices hold the same numbers, reading COMPARED_ROWS rows at a time."""
        places = self.places[name], self.places[other]
        if places[0].shape != places[1].shape:
            return False
        with (
            safe_open(places[0].path, framework="numpy") as first,
            safe_open(places[1].path, framework="numpy") as second,
        ):
            views = first.get_slice(name), second.get_slice(other)
            count = places[0].shape[0]
            for start in range(0, count, COMPARED_ROWS):
                rows = [view[start : min(start + COMPARED_ROWS, count)].astype(np.float32) for view in views]
                if not np.array_equal(*rows):
                    return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def tensor_places(path: Path) -> dict[str, Place]:
    """Return the places of a file's tensors; raise BadCheckpoint, naming it, if it is not a whole safetensors file."""
    try:
        with open_regular(path) as file:
            start = file.read(len(POINTER))
        with safe_open(path, framework="numpy") as file:
            views = {name: file.get_slice(name) for name in file.keys()}
            return {name: Place(path, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
    except OSError as error:
        raise BadCheckpoint(f"{path} must be a safetensors file, but cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        if start == POINTER:
            problem = IS_POINTER
        elif not start:
            problem = "is empty"
        else:
            problem = _unknown_dtype(path) or f"is truncated or of another format ({error})"
        raise BadCheckpoint(f"{path} must be a whole safetensors file, but {problem}") from error


def _unknown_dtype(path: Path) -> str:
    """Return the first tensor of a file whose dtype the library does not read, as a clause; empty if none is found."""
    try:
        with open_regular(path) as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 10**8)))
        for name, described in header.items():
            if name != "__metadata__" and described["dtype"] not in _LIBRARY_DTYPES:
                return f"{quote(name)} in it has the dtype {quote(described['dtype'])}"
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
        pass
    return ""


_LIBRARY_DTYPES = "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64".split()


def checkpoint_tensors(folder: Path) -> TensorFiles:
    """Return the tensors of a published checkpoint, from the files of `weight_files`.

    Raises BadCheckpoint as that does, or if a file is damaged, lacks a tensor of the index, or repeats one of another.
    """
    places: dict[str, Place] = {}
    for path, promised in weight_files(folder).items():
        present = tensor_places(path)
        if missing := [name for name in promised if name not in present]:
            raise BadCheckpoint(f"{path} must hold what {INDEX} places in it, but lacks {listed(missing)}")
        if repeated := [name for name in present if name in places]:
            other = places[repeated[0]].path.name
            raise BadCheckpoint(f"a tensor must be in one file, but {path} and {other} both hold {listed(repeated)}")
        places |= present
    return TensorFiles(places)


def weight_files(folder: Path) -> dict[Path, Sequence[str]]:
    """Return the files of a checkpoint's weights, with the names of the tensors that the index places in each.

    They are the files that transformers loads: `model.safetensors`, or else those of the index. Raises BadCheckpoint if
    there are none, one is missing, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: ()}
    if os.path.lexists(folder / INDEX):
        return _indexed_files(folder)
    if os.path.lexists(folder / WEIGHTS):
        raise BadCheckpoint(f"{folder / WEIGHTS} must be a regular file, but is a folder, a broken link or a device")
    others = ignored_files(folder)
    required = f"{folder} must hold {WEIGHTS}, or {INDEX} and its files"
    if pickles := [name for name in others if name.endswith(PICKLES)]:
        raise BadCheckpoint(
            f"{required}, but its weights are pickled ({listed(pickles)}), which can run any code when opened; "
            "save them with transformers again"
        )
    raise BadCheckpoint(f"{required}, but holds {f'only {listed(others)}' if others else 'no weights'}")


def ignored_files(folder: Path, used: Collection[Path] = ()) -> list[str]:
    """Return the names of a folder's files of weights, indexes included, that are not among the used ones."""
    files = {path for path in folder.iterdir() if path.name.endswith(FOREIGN)}.difference(used)
    if used and folder / WEIGHTS not in used:
        files.discard(folder / INDEX)
    return sorted(path.name for path in files)


def _indexed_files(folder: Path) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for name, file in read_index(folder).items():
        files.setdefault(folder / file, []).append(name)
    if missing := [str(path.relative_to(folder)) for path in files if not os.path.isfile(path)]:
        raise BadCheckpoint(f"{folder} must hold all files that {INDEX} names, but lacks {listed(missing)}")
    return dict(sorted(files.items()))


def read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor in a checkpoint's index, relative to the folder.

    Raises BadCheckpoint if the index is damaged or names files elsewhere.
    """
    index = folder / INDEX
    content = read_json(index, BadCheckpoint)
    placed = content.get("weight_map") if isinstance(content, dict) else content
    if not isinstance(placed, dict) or not placed:
        raise BadCheckpoint(f"{index} must be an object with `weight_map`, files by tensor names, got {quote(content)}")
    for name, file in placed.items():
        if not isinstance(file, str) or not file or file.startswith("/") or ".." in PurePosixPath(file).parts:
            raise BadCheckpoint(
                f"{index} must place {quote(name)} in a file of its own folder, but names {quote(file)}"
            )
    return placed


def warn(sentence: str) -> None:
    """Print a sentence on stderr, in the first process alone."""
    if jax.process_index() == 0:
        print(one_line(sentence), file=sys.stderr)


class TensorToWrite(NamedTuple):
    """A tensor that `make` creates when it is written: C-contiguous, of one of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Shaped[np.ndarray, "..."]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def write_tensors(tensors: Sequence[TensorToWrite], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors into `folder`, sharded as transformers does: one file, or several and an index."""
    shards: list[list[TensorToWrite]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    files = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(shard, folder / name)
        files |= dict.fromkeys([tensor.name for tensor in shard], name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": files}
        write_json(folder / INDEX, index)


def write_file(tensors: Sequence[TensorToWrite], path: Path) -> None:
    """Write a safetensors file one tensor at a time; the library's own writer needs all of them at once."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    with named_errors(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.make().view(np.uint8))
