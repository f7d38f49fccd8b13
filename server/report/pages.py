"""HTML pages from the Jinja templates in ``templates``: all values are escaped except `Markup`."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedcore import __version__
from fedcore.observability.foreign import foreign
from fedcore.observability.words import counted, epsilon_text

MAX_TEXT = 20_000
"""Maximum number of characters of one text in a report."""


def render(template: str, **values: Any) -> str:
    """Renders a template.

    Args:
        template: File name in ``templates``.
        values: The values that the template uses.

    Returns:
        The page.

    Guarantee:
        A value that isn't `Markup` becomes text of at most `MAX_TEXT` printable characters: it
        can't open a tag, end an attribute, or be parsed as a template.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("server.report"),
        autoescape=True,  # for every file name, not only for names that end in .html
        undefined=StrictUndefined,  # a misspelt value is an error, not an empty text
        finalize=_text,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {"counted": counted, "epsilon": epsilon_text}
    environment.globals["version"] = __version__
    return environment


def _text(value: object) -> Markup | str:
    """Bounds a value and makes it printable; Jinja escapes the returned text."""
    return value if isinstance(value, Markup) else foreign(str(value), MAX_TEXT)
