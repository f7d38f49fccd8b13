"""Outbound proxies, named by the environment."""

from __future__ import annotations

from collections.abc import MutableMapping

_NAMES = ("https_proxy", "no_proxy")


def one_spelling(environment: MutableMapping[str, str]) -> None:
    """Lets gRPC find the proxy that HTTP clients find; to be called before a channel is opened.

    ``HTTPS_PROXY`` and ``NO_PROXY`` are read in capitals by most programs. gRPC's core reads them
    in small letters alone.
    """
    for name in _NAMES:
        value = environment.get(name.upper())
        if value and not environment.get(name):
            environment[name] = value
