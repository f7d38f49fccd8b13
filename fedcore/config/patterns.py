"""Regular expressions for text settings, each with a description for error messages."""

from __future__ import annotations

NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
DATA_NAME = r"^[A-Za-z0-9._-]{1,64}$"
PATH = r"^[^\x00]+$"
HOURS = r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$"
SHA256 = r"^[0-9a-f]{64}$"
ADDRESS = r"^https://(\[[0-9a-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$"

_WORDS = {
    NAME: "1 to 64 of a-z, 0-9, '-' and '_', the first a letter or digit, e.g. \"turbofan-2\"",
    DATA_NAME: "1 to 64 of letters, digits, '.', '-' and '_', e.g. \"ward-3\"",
    PATH: 'the path of a folder, e.g. "/srv/measurements"',
    HOURS: 'a range of hours of the day, each HH:MM, e.g. "22:00-06:00"',
    SHA256: "a SHA-256 digest: 64 characters of 0-9 and a-f, as printed by `sha256sum FILE`",
    ADDRESS: 'an address with its port, e.g. "https://server.example.org:9092"',
}


def describe_pattern(pattern: str) -> str:
    """Describes the text that matches ``pattern``; quotes an unknown pattern itself."""
    return _WORDS.get(pattern, f"text that matches {pattern}")
