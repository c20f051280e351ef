"""Features of images from the frozen vision tower, on disk: computed once and read in place of pixels."""

import errno
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ilvr_jax.data.records import ImageSource
from ilvr_jax.files import open_regular
from ilvr_jax.models.qwen2_5_vl.images import EncodedImage
from ilvr_jax.models.tensor_files import TensorFiles, tensor_places

UNFINISHED = ".partial"


class FeatureStore:
    """The features of images by the images' content, in a folder of safetensors files.

    A file is complete when it gets its name, and never changes. The folder belongs to one vision tower and one way of
    preparing images. Copies in other processes read the files that exist at their first access.
    """

    def __init__(self, folder: Path, channels: int, dtype: str):
        """`channels` and `dtype` are those of the features."""
        self.folder = folder
        self.no_image = EncodedImage(np.zeros((0, 0, channels), jnp.dtype(dtype)))
        self._tensors: TensorFiles | None = None

    def get(self, source: ImageSource) -> EncodedImage | None:
        """Return an image's features, or None if they were not computed."""
        key = image_key(source)
        return EncodedImage(self._opened()[key]) if key in self._opened() else None

    def __contains__(self, key: str) -> bool:
        return key in self._opened()

    def add(self, features: Mapping[str, Float[np.ndarray, "rows columns channels"]]) -> None:
        """Write features by `image_key`. Raises OSError if there is no room for them."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=UNFINISHED, delete=False) as file:
            unfinished = Path(file.name)
        try:
            save_file(dict(features), unfinished)
        except SafetensorError as error:
            unfinished.unlink()
            code = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            raise OSError(code, str(error), str(self.folder)) from error
        unfinished.replace(self.folder / f"{next(iter(features))}.safetensors")
        self._tensors = None

    def repair(self) -> list[str]:
        """Make the folder if there is none, remove unfinished and damaged files, and return the names of damaged ones.

        No other process may add to the folder meanwhile.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"*{UNFINISHED}"):
            path.unlink()
        damaged = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy"):
                    pass
            except (SafetensorError, OSError):
                path.unlink()
                damaged.append(path.name)
        self._tensors = None
        return damaged

    def _opened(self) -> Mapping[str, np.ndarray]:
        if self._tensors is None:
            paths = sorted(self.folder.glob("*.safetensors"))
            if not paths:
                return {}
            self._tensors = TensorFiles({key: place for path in paths for key, place in tensor_places(path).items()})
        return self._tensors

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tensors": None}  # another process opens the files itself


def image_key(source: ImageSource) -> str:
    """Return the key of an image: a hash of its file's content, or of its pixels and their shape.

    It is empty if the file cannot be read.
    """
    content = hashlib.blake2b(digest_size=16)
    if isinstance(source, np.ndarray):
        content.update(repr(source.shape).encode())
        content.update(np.ascontiguousarray(source))
    elif isinstance(source, bytes):
        content.update(source)
    else:
        try:
            with open_regular(source) as file:
                hashlib.file_digest(file, lambda: content)
        except (OSError, ValueError):  # ValueError: not a path
            return ""
    return content.hexdigest()
