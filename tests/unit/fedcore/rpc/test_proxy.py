from __future__ import annotations

import httpx
import pytest

from fedcore.errors import ConfigError
from fedcore.rpc.proxy import check_proxies, proxy_for, shown

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


ADDRESSES = (
    "https://example.com",
    "https://a.example.com:9092",
    "https://example.com:8080",
    "https://anexample.com",
    "https://10.0.0.0:9092",
    "https://10.0.0.1:9092",
    "https://[::1]:9092",
    "https://localhost:9092",
    "https://a.localhost:9092",
)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"HTTPS_PROXY": "http://p:1"},
        {"https_proxy": "p:1", "ALL_PROXY": "http://q:1"},
        {"ALL_PROXY": "http://q:1"},
        {"all_proxy": "q:1", "http_proxy": "http://r:1"},
        {"HTTP_PROXY": "http://r:1"},
        {"https_proxy": "", "HTTPS_PROXY": "http://p:1"},
    ],
)
@pytest.mark.parametrize(
    "exempt",
    [
        *("", "*", "x, *", "10.0.0.1", "10.0.0.0/8", "::1", "fe80::/10", "[::1]", "localhost"),
        *("localhost:9092", "EXAMPLE.com", ".example.com", "*.example.com", "example.com:8080"),
        *(".example.com:9092", "com", "x,example.com ", "http://example.com", "all://*", "a b"),
        *("https://example.com", "https://*.example.com", "caf\u00e9", "x:y", "/x", "example.com/"),
    ],
)
def test_the_proxy_is_the_one_that_http_clients_take(
    named: dict[str, str], exempt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = named | {"NO_PROXY": exempt}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        client = httpx.Client()
    except httpx.InvalidURL:
        with pytest.raises(ConfigError, match=r"NO_PROXY: .*expected a host name or an address"):
            check_proxies(environment)
        return
    check_proxies(environment)
    with client:
        for address in ADDRESSES:
            way = client._transport_for_url(httpx.URL(address))
            proxy = None
            if way is not client._transport:
                assert isinstance(way, httpx.HTTPTransport)
                proxy = way._pool._proxy_url.host.decode()  # type: ignore[attr-defined]
            ours = proxy_for(address, environment)
            assert (ours and shown(ours).partition(":")[0]) == proxy, address


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


def test_a_proxy_is_shown_without_its_password() -> None:
    assert shown("http://user:secret@proxy:3128") == "proxy:3128"
    assert shown("proxy") == "proxy:80"
