"""Images as records name them: files in the folder of a data set, or their content as a data URI."""

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ilvr_jax.data.records import BadRecord, ImageSource
from ilvr_jax.errors import quote

LONGEST_PATH = 4096  # characters: Linux opens no longer ones, and following one of a million takes half a minute
MOST_IMAGES = 1000  # of a field: far above what a context holds
DATA_URI = re.compile(r"data:", re.IGNORECASE)
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class ImageFolder:
    """The folder that the image paths of a data set are relative to.

    A path must stay inside by its text. Links inside are those of the folder's owner and are followed; with
    `follow_links=False` one that leads out of the folder is refused.
    """

    def __init__(self, folder: str | Path, follow_links: bool = True):
        self.folder = Path(os.path.realpath(folder))
        self.follow_links = follow_links
        self._named = os.path.abspath(folder)  # as an absolute path in a record may begin, too

    def find(self, value: Any, where: str) -> ImageSource:
        """Returns the file that a path names, or the content of a data URI.

        Raises BadRecord, which begins with `where`, if it is neither, leaves the folder, or is no regular file.
        """
        if not isinstance(value, str) or not value:
            raise BadRecord(f"{where} must be the path of an image file, got {quote(value)}")
        if DATA_URI.match(value):
            return decode_data_uri(value, where)
        if URL.match(value):
            raise BadRecord(f"{where} must be a path in the data folder or a data URI, got the address {quote(value)}")
        if "\0" in value or len(value) > LONGEST_PATH or not is_unicode(value):
            raise BadRecord(
                f"{where} must be a path of at most {LONGEST_PATH} Unicode characters without NUL, got {quote(value)}"
            )
        path = self._inside(value)
        if path is None:
            raise BadRecord(f"{where} must stay inside the data folder {self.folder}, got {quote(value)}")
        if not self.follow_links and leaves(path, self.folder):
            raise BadRecord(
                f"{where} must stay inside the data folder {self.folder}, since data.follow_links is false, but "
                f"{quote(value)} is a link out of it"
            )
        if not os.path.isfile(path):
            raise BadRecord(f"{where} must be an image file in {self.folder}, but {quote(value)} {_problem(path)}")
        return path

    def _inside(self, value: str) -> Path | None:
        """Returns a path without `..`, None if it leaves the folder by its text."""
        # Before links are followed: `..` after a link would leave the folder that the link leads to.
        path = os.path.normpath(os.path.join(self.folder, value))
        for folder in (str(self.folder), self._named):
            if path.startswith(folder.rstrip("/") + "/"):
                return self.folder / path[len(folder.rstrip("/")) + 1 :]
        return None


def leaves(path: Path, folder: Path) -> bool:
    """Returns whether a path leads out of a folder (a real path) by its links."""
    return not Path(os.path.realpath(path)).is_relative_to(folder)


def _problem(path: Path) -> str:
    """Returns why a path is no file."""
    try:
        os.stat(path)
    except OSError as error:
        return "is a link to nothing" if os.path.islink(path) else f"cannot be read: {error.strerror}"
    return "is no regular file"


def check_image_path(value: Any, root: ImageFolder, where: str) -> ImageSource:
    """Returns the image that a field names; raises BadRecord as `ImageFolder.find` does."""
    return root.find(value, where)


def check_image_paths(value: Any, root: ImageFolder, where: str) -> tuple[ImageSource, ...]:
    """Returns the images that a path, a list of paths or null names; raises BadRecord as `ImageFolder.find` does."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if len(values) > MOST_IMAGES:
        raise BadRecord(f"{where} must list at most {MOST_IMAGES} images, got {len(values)}")
    return tuple(root.find(path, where) for path in values)


def decode_data_uri(text: str, where: str) -> bytes:
    """Returns the content of a data URI such as `data:image/png;base64,...`; raises BadRecord if it cannot be read."""
    head, comma, data = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise BadRecord(f"{where} must be a data URI such as data:image/png;base64,..., got {quote(text)}")
    try:
        content = base64.b64decode("".join(unquote(data).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord(f"{where} must be a data URI of valid base64, got {quote(text)} ({error})") from error
    if not content:
        raise BadRecord(f"{where} must be a data URI with the content of an image, got {quote(text)}")
    return content


def is_unicode(text: str) -> bool:
    """Returns whether a text holds no half of a surrogate pair, which JSON can and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
