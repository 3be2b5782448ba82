"""Jinja2 templates of HTML pages: values are escaped, and a missing name is an error."""

from pathlib import Path

import jinja2


def load_template(path: Path) -> jinja2.Template:
    """The template in a file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)
