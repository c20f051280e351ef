"""Pages: one HTML file each, with everything in it, from the templates beside this module."""

from pathlib import Path
from typing import Any

import jinja2

from ilvr_jax.files import write_text


def write_html(path: Path, template: str, **parts: Any) -> None:
    """Write a page from a template's name and the values in it; raise as `write_text` does.

    Templates extend page.html, which needs `title`. Text is escaped; `markupsafe.Markup` is not.
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.get_template(template).render(**parts))
