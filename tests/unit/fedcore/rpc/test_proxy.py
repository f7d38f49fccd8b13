from __future__ import annotations

import httpx
import pytest

from fedcore.errors import ConfigError
from fedcore.rpc.proxy import check_proxies, one_spelling

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"HTTPS_PROXY": "http://p:1"}, {"HTTPS_PROXY": "http://p:1", "https_proxy": "http://p:1"}),
        ({"HTTPS_PROXY": "a", "https_proxy": "b"}, {"HTTPS_PROXY": "a", "https_proxy": "b"}),
        ({"NO_PROXY": "x"}, {"NO_PROXY": "x", "no_proxy": "x"}),
        ({"HTTPS_PROXY": ""}, {"HTTPS_PROXY": ""}),
        ({}, {}),
    ],
)
def test_grpc_finds_the_proxy_that_others_find(
    before: dict[str, str], after: dict[str, str]
) -> None:
    one_spelling(before)
    assert before == after


@pytest.mark.parametrize(
    "value",
    [
        "http://proxy:3128",
        "https://proxy.example.org",
        "proxy:3128",
        "10.0.0.1",
        "http://user:pass@proxy:3128",
        "http://[::1]:3128/",
        "",
    ],
)
def test_proxies_that_clients_can_use_pass(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("https_proxy", "ALL_PROXY"):
        check_proxies({name: value})
        monkeypatch.setenv(name, value)
    httpx.Client().close()  # which reads them, and would raise


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTPS_PROXY", "https_proxy", "http_proxy"])
@pytest.mark.parametrize(
    "value",
    [
        "socks5://proxy:1080",
        "http://proxy:notaport",
        "http://proxy:99999",
        "http://proxy:0",
        "http://[bad",
        "ftp://x",
        "http://",
        "http://a b",
        "http://caf\u00e9",
        "http://proxy\n:1",
    ],
)
def test_a_proxy_that_no_client_can_use_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"environment: {name} = .*expected the address") as error:
        check_proxies({name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "value",
    [
        "socks5://user:secret@proxy:1080",
        "http://secret@proxy:x",
        "user:secret@proxy:x",
        "http://user:secret@more@[bad",
    ],
)
def test_no_password_is_shown(value: str) -> None:
    with pytest.raises(ConfigError, match=r"\*\*\*@(proxy|\[bad)") as error:
        check_proxies({"https_proxy": value})
    assert "secret" not in str(error.value)
    assert "user" not in str(error.value)


def test_the_small_spelling_counts_and_a_star_exempts_all() -> None:
    check_proxies({"https_proxy": "http://p:1", "HTTPS_PROXY": "socks5://p:1"})
    check_proxies({"https_proxy": "socks5://p:1", "NO_PROXY": "x, *"})
    with pytest.raises(ConfigError, match="all_proxy"):
        check_proxies({"all_proxy": "socks5://p:1", "ALL_PROXY": "http://p:1", "no_proxy": "x"})
