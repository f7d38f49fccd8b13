"""The page at ``/`` on which a person tries a model: its files, and what it knows of the models.

The page loads nothing from elsewhere, and its policy lets it run no script but its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from edge_client.serving.http_parts import HttpAnswer

_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
MODELS = "/page/models"
HEADERS = (
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-store"),
)


@dataclass(frozen=True)
class Page:
    """The page's files, and the models that it shows."""

    models: Callable[[], Sequence[dict[str, Any]]]
    """Returns name, version, kind, presentation, labels, inputs and an example of each model."""

    def answer(self, path: str) -> HttpAnswer | None:
        """Returns one of the page's files; None for another path."""
        if path == MODELS:
            return HttpAnswer(200, json.dumps(list(self.models())).encode(), headers=HEADERS)
        if path not in _FILES:
            return None
        name, content_type = _FILES[path]
        return HttpAnswer(200, _file(name), content_type, HEADERS)


@cache
def _file(name: str) -> bytes:
    return files("edge_client.serving").joinpath("site", name).read_bytes()
