from __future__ import annotations

import pytest

from fedcore.rpc.proxy import one_spelling


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
