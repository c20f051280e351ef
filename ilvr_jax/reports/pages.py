"""Pages: one HTML file each, with everything in it, from the templates beside this module."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ilvr_jax.files import write_text


def write_html(path: Path, template: str, **parts: Any) -> None:
    """Write a page from a template's name and the values in it; raise as `write_text` does.

    Templates extend page.html, which needs `title`. Text is escaped; `markupsafe.Markup` is not.
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.get_template(template).render(**parts))


def image_uri(pixels: UInt8[np.ndarray, "height width 3"], most: int) -> str:
    """Return an image as a data URI for a page, shrunk until its longer side has at most so many pixels."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    image.thumbnail((most, most))
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
