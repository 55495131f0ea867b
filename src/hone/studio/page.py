"""What the self-contained pages share: templates, data for scripts, the Plotly bundle, and a file written whole."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup


def template(name: str) -> jinja2.Template:
    """A template of this package; everything that is put in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def source(name: str) -> str:
    """The text of a file beside the templates."""
    return (files("hone.studio") / "templates" / name).read_text(encoding="utf-8")


def inlined(*names: str) -> Markup:
    """Scripts or style sheets of ours, one after the other, for the inside of their element."""
    return Markup("\n".join(map(source, names)))


@cache
def plotly() -> Markup:
    """Plotly's script, from its Python package."""
    try:
        package = files("plotly")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the report draws with plotly; install it with pip install 'hone[train]'") from error
    return Markup((package / "package_data" / "plotly.min.js").read_text(encoding="utf-8"))


def embedded(data: Mapping[str, Any]) -> Markup:
    """Data for the page's script, as JSON in which no text can end the element."""
    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def write_page(path: Path, page: str) -> Path:
    """Write a page whole, or not at all; returns where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path
