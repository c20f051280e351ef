"""Images in records: paths of files in the folder of a data set, or data URIs."""

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ilvr_jax.data.records import BadRecord, ImageSource
from ilvr_jax.errors import quote

LONGEST_PATH = 4096  # characters: the limit of Linux; resolving a path of a million takes half a minute
MOST_IMAGES = 1000  # of a field, far more than fit a context
DATA_URI = re.compile(r"data:", re.IGNORECASE)
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class ImageFolder:
    """The folder that the image paths of a data set are relative to.

    A path must not leave the folder by its text. Links in the folder are trusted and followed; with
    `follow_links=False` a link out of the folder is an error.
    """

    def __init__(self, folder: str | Path, follow_links: bool = True):
        self.folder = Path(os.path.realpath(folder))
        self.follow_links = follow_links
        self._named = os.path.abspath(folder)  # an absolute path in a record may begin with this spelling as well

    def find(self, value: Any, where: str) -> ImageSource:
        """Return the file at a path, or the content of a data URI.

        Raises BadRecord, beginning with `where`, for anything else, a path out of the folder or not of a regular file.
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

    def find_all(self, value: Any, where: str) -> tuple[ImageSource, ...]:
        """Return the images at a path, a list of paths or null; raise BadRecord as `find` does."""
        values = [] if value is None else value if isinstance(value, list) else [value]
        if len(values) > MOST_IMAGES:
            raise BadRecord(f"{where} must list at most {MOST_IMAGES} images, got {len(values)}")
        return tuple(self.find(path, where) for path in values)

    def _inside(self, value: str) -> Path | None:
        """Return a path without `..`, or None if it leaves the folder by its text."""
        # Before links are resolved: `..` behind a link would leave the folder that the link points to.
        path = os.path.normpath(os.path.join(self.folder, value))
        for folder in (str(self.folder), self._named):
            if path.startswith(folder.rstrip("/") + "/"):
                return self.folder / path[len(folder.rstrip("/")) + 1 :]
        return None


def leaves(path: Path, folder: Path) -> bool:
    """Return whether links in a path lead out of a folder, which is given by its real path."""
    return not Path(os.path.realpath(path)).is_relative_to(folder)


def _problem(path: Path) -> str:
    """Return why a path is not a regular file."""
    try:
        os.stat(path)
    except OSError as error:
        return "is a link to nothing" if os.path.islink(path) else f"cannot be read: {error.strerror}"
    return "is not a regular file"


def decode_data_uri(text: str, where: str) -> bytes:
    """Return the content of a data URI such as `data:image/png;base64,...`; raise BadRecord if it cannot be read."""
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
    """Return whether a text has no half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
