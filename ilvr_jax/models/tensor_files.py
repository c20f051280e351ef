"""Folders of safetensors files, read and written one tensor at a time."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from ilvr_jax.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # in a file's header
SHARD_BYTES = 5 * 10**9  # as transformers cuts them


class BadCheckpoint(InputError):
    """Weights that cannot be used; one sentence says which file or tensors, and what is accepted."""


class TensorFolder(Mapping[str, Shaped[np.ndarray, "..."]]):
    """The tensors of a folder's safetensors files by name, each read from disk when it is asked for.

    Raises BadCheckpoint if the folder has no such files, an index names a file that is not there, or a file is
    truncated.
    """

    def __init__(self, folder: Path):
        self._places: dict[str, tuple[Path, tuple[int, ...]]] = {}  # file and shape
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="numpy") as file:
                    for name in file.keys():
                        self._places[name] = path, tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(
                    f"{path} is truncated or not a safetensors file ({error}); a whole one is accepted"
                ) from error

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        # Opened anew each time: the pages that were read stay in the process as long as their file is open.
        with safe_open(self._places[name][0], framework="numpy") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return self._places[name][1]


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint: those of its index, or all there are.

    Raises BadCheckpoint if there are none, or one is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise BadCheckpoint(
                f"{index} is damaged ({error}); the JSON object with a weight_map is accepted"
            ) from error
        for name in names:
            if not (folder / name).is_file():
                raise BadCheckpoint(
                    f"{index} names {name}, which is not in {folder}; all files of the index are needed"
                )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
        if pickles:
            raise BadCheckpoint(
                f"{folder} holds pickled weights ({', '.join(pickles)}), which can run any code when they are opened; "
                "only safetensors files are accepted"
            )
        raise BadCheckpoint(f"{folder} holds no *.safetensors files; a folder of a published checkpoint is accepted")
    return files


class TensorToWrite(NamedTuple):
    """A tensor that is made when its place in a file is written: C-contiguous, one of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Shaped[np.ndarray, "..."]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def write_tensors(tensors: Sequence[TensorToWrite], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors into `folder`, cut as transformers does: one file, or several and an index."""
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
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(tensors: Sequence[TensorToWrite], path: Path) -> None:
    """Writes a safetensors file, one tensor after another; the library's own writer takes all of them at once."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.make().view(np.uint8))
