"""Outbound proxies, named by the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from urllib.parse import urlsplit

from fedcore.errors import ConfigError

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
"""HTTP clients read all of them, whichever they then need."""
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*")  # a name, or an address
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


def check_proxies(environment: Mapping[str, str]) -> None:
    """Looks whether the proxies that the environment names can be used at all.

    Raises:
        ConfigError: one is no HTTP proxy, or cannot be read; the message shows no password.
    """
    if "*" in (one.strip() for one in _value(environment, "no_proxy")[1].split(",")):
        return  # HTTP clients go by none then
    for small in _PROXIES:
        name, value = _value(environment, small)
        if value and not _is_proxy(value if "://" in value else f"http://{value}"):
            raise ConfigError(
                f"environment: {name} = {_masked(value)}: expected the address of an HTTP proxy, "
                "as http://proxy.example.org:3128. No connection was tried; set it so, or unset it "
                "(SOCKS proxies are not supported)."
            )


def _value(environment: Mapping[str, str], small: str) -> tuple[str, str]:
    """A variable's name as it is spelt there, and its value; small letters come first."""
    name = small if environment.get(small) else small.upper()
    return name, environment.get(name, "")


def _is_proxy(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    plain = url.isascii() and url.isprintable() and " " not in url
    # An empty port is none, and port 0 is nobody's.
    return plain and parts.scheme in ("http", "https") and bool(_HOST.fullmatch(host)) and port != 0


def _masked(value: str) -> str:
    """An address without the user's name and password, however odd it is."""
    secret, at, host = value.rpartition("@")
    scheme, separator, _ = secret.partition("://")
    return repr(f"{scheme + separator if separator else ''}***@{host}" if at else value)
