"""Folders of safetensors files, read and written one tensor at a time."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # as transformers cuts them


class BadCheckpoint(ValueError):
    """Weights that cannot be used; one sentence says which file or tensors, and what is accepted."""


class TensorFolder(Mapping[str, Shaped[np.ndarray, "..."]]):
    """The tensors of a folder's safetensors files by name, each read from disk when it is asked for.

    Raises BadCheckpoint if the folder has no such files, an index names a file that is not there, or a file is
    truncated.
    """

    def __init__(self, folder: Path):
        self._open_files = contextlib.ExitStack()
        self._file_of = {}
        for path in weight_files(folder):
            try:
                file = self._open_files.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(
                    f"{path} is truncated or not a safetensors file ({error}); a whole one is accepted"
                ) from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._open_files.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())


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
    """A tensor that is made when its file is written."""

    name: str
    bytes: int
    make: Callable[[], Shaped[np.ndarray, "..."]]


def write_tensors(tensors: Sequence[TensorToWrite], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors into `folder` as transformers does: one file, or several and an index.

    A file's tensors are held in memory while it is written, `shard_bytes` of them at most (or one tensor).
    """
    shards: list[list[TensorToWrite]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    files = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({tensor.name: tensor.make() for tensor in shard}, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys([tensor.name for tensor in shard], name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
