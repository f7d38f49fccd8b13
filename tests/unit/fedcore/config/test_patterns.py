"""What people read where a text in a file has the wrong form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedcore.config import patterns
from fedcore.config.owner import load_owner
from fedcore.config.patterns import describe_pattern
from fedcore.errors import ConfigError

PATTERNS = {name: value for name, value in vars(patterns).items() if name.isupper()}


@pytest.mark.parametrize("name", sorted(name for name in PATTERNS if not name.startswith("_")))
def test_each_is_put_in_words_whose_example_it_takes(name: str) -> None:
    words = describe_pattern(PATTERNS[name])
    assert PATTERNS[name] not in words
    example = re.search(r'e\.g\. "(.*)"$', words)
    assert name == "SHA256" or (example and re.fullmatch(PATTERNS[name], example[1]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'hours = ["22-6"]',
            'it should be a range of hours of the day, each HH:MM, e.g. "22',
        ),
        ('tasks = ["abc"]', "it should be a SHA-256 digest: 64 characters of 0-9 and a-f"),
        ('[[datasets]]\nname = "a b"\npath = "x"', "1 to 64 of letters, digits, '.', '-' and '_'"),
    ],
)
def test_an_owner_reads_words_and_no_pattern(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_owner(path)
    assert said in str(caught.value)
    assert "matches" not in str(caught.value)
