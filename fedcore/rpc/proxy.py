"""Outbound HTTP proxies from the environment: which one applies, and whether it is valid."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from fedcore.errors import ConfigError

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
"""HTTP clients parse all of these variables, even those that they do not use."""
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*")  # a name, or an address


def proxy_for(url: str, environment: Mapping[str, str]) -> str | None:
    """Returns the proxy for an ``https`` address; None for a direct connection.

    ``HTTPS_PROXY`` precedes ``ALL_PROXY``, lower-case names precede upper-case ones; ``NO_PROXY``
    lists exceptions. httpx uses these rules, but has no public function for their outcome.
    """
    if any(_exempts(entry, url) for entry in _exempt(environment)):
        return None
    value = _value(environment, "https_proxy")[1] or _value(environment, "all_proxy")[1]
    if not value:
        return None
    return value if "://" in value else f"http://{value}"


def check_proxies(environment: Mapping[str, str]) -> None:
    """Checks that the environment's proxy settings are usable.

    Raises:
        ConfigError: a proxy is no HTTP proxy or cannot be parsed, or an entry of ``NO_PROXY``
            cannot be parsed. The message shows no password.
    """
    exempt = _exempt(environment)
    if "*" in exempt:
        return  # HTTP clients then use no proxy
    for entry in exempt:
        if not _is_exemption(entry):
            raise ConfigError(
                f"environment: {_value(environment, 'no_proxy')[0]}: {entry!r}: expected a host "
                "name or an address, e.g. example.org, .example.org:9092, 10.0.0.1 or ::1. No "
                "connection was attempted; correct it, or leave it out."
            )
    for small in _PROXIES:
        name, value = _value(environment, small)
        if value and not _is_proxy(value if "://" in value else f"http://{value}"):
            raise ConfigError(
                f"environment: {name} = {_masked(value)}: expected the address of an HTTP proxy, "
                "e.g. http://proxy.example.org:3128. No connection was attempted; correct it, or "
                "unset it (SOCKS proxies are not supported)."
            )


def shown(proxy: str) -> str:
    """Returns a proxy's host and port, without user name and password."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return f"{parts.hostname}:{parts.port or 80}"


def _value(environment: Mapping[str, str], small: str) -> tuple[str, str]:
    """Returns a variable's name as spelt in the environment, and its value.

    The lower-case name precedes the upper-case one even if empty, so that a user can unset a proxy
    for one program.
    """
    name = small if small in environment else small.upper()
    return name, environment.get(name, "")


def _exempt(environment: Mapping[str, str]) -> list[str]:
    """Returns the entries of ``NO_PROXY``."""
    entries = (entry.strip() for entry in _value(environment, "no_proxy")[1].split(","))
    return [entry for entry in entries if entry]


def _is_exemption(entry: str) -> bool:
    """Returns whether HTTP clients can parse an entry of ``NO_PROXY``."""
    if _is_address(entry):
        return True
    try:
        parts = urlsplit(entry if "://" in entry else f"all://{entry}")
        return entry.isascii() and "[" not in entry and (parts.port or 1) > 0
    except ValueError:
        return False


def _exempts(entry: str, url: str) -> bool:
    """Returns whether an entry of ``NO_PROXY`` exempts an address.

    A name matches all its subdomains, and itself unless it begins with a dot. Networks are
    not supported: ``10.0.0.0/8`` matches only the address ``10.0.0.0``.
    """
    if entry == "*":
        return True
    there = urlsplit(url)
    host = there.hostname or ""
    if _is_address(entry):
        return host == entry.partition("/")[0].lower()
    scheme, _, name = entry.rpartition("://")
    exact = scheme or name.lower() == "localhost"
    named = urlsplit(f"all://{name if exact else '*' + name}")
    if scheme not in ("", "all", there.scheme) or named.port not in (None, there.port):
        return False
    name = named.hostname or ""
    if name.startswith("*."):
        return host.endswith(name[1:])
    if name.startswith("*"):
        return name != "*" and f".{host}".endswith(f".{name[1:]}")
    return host == name


def _is_address(entry: str) -> bool:
    """Returns whether an entry is an IP address or an IPv4 network."""
    address, _, network = entry.partition("/")
    try:
        return ipaddress.ip_address(address).version == 4 or not network
    except ValueError:
        return False


def _is_proxy(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    plain = url.isascii() and url.isprintable() and " " not in url
    # An empty port means the default; port 0 is invalid.
    return plain and parts.scheme in ("http", "https") and bool(_HOST.fullmatch(host)) and port != 0


def _masked(value: str) -> str:
    """Returns an address without user name and password, even if malformed."""
    secret, at, host = value.rpartition("@")
    scheme, separator, _ = secret.partition("://")
    return repr(f"{scheme + separator if separator else ''}***@{host}" if at else value)
