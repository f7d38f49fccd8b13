from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.config.settings import load_run, with_settings
from fedcore.errors import ConfigError
from tests.unit.fedcore.config.test_settings import REQUIRED, refused, written


@pytest.mark.parametrize(
    "override",
    [
        "release.push=s3://me:hunter2@bucket/p",
        "release.push='s3://me:hunter2/and-the-rest-of-a-key-that-is-longer-than-is-shown@bucket'",
        "release.push=s3://bucket/p?secret=hunter2",
        "release.psh=s3://me:hunter2@bucket/p",
        "release.push.to=s3://me:hunter2@bucket/p",
        "release.push=['s3://me:hunter2@bucket/p']",
        "s3://me:hunter2@bucket/p",
        "seed=s3://me:hunter2@bucket/p",
    ],
)
def test_credentials_in_an_address_are_not_repeated(tmp_path: Path, override: str) -> None:
    places = "[release]\nrepository = 'r'\nkeys = 'k'\n"
    assert "hunter2" not in refused(tmp_path, places, override)
    key, equals, value = override.partition("=")
    if equals and "." in key:
        section, _, name = key.partition(".")
        settings = {section: {name: value.strip("'")}}
        with pytest.raises(ConfigError) as caught:
            with_settings(load_run(written(tmp_path, REQUIRED)), settings)
        assert "hunter2" not in str(caught.value)
