"""The command that delivers releases limits TLS before gRPC reads its settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedcore.errors import ConfigError
from server.commands.serve_command import listen_address

ROOT = Path(__file__).parents[4]


def test_no_command_of_releases_imports_grpc_before_its_tls_is_limited() -> None:
    code = (
        "import sys; import server.commands.release_commands, edge_client.update_commands; "
        "sys.exit('grpc' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.parametrize("text", ["", "9094", "host:", ":9094", "host:99999", "host:x"])
def test_an_address_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        listen_address(text)


def test_an_address_is_a_host_and_a_port() -> None:
    assert listen_address("[::]:9094") == ("::", 9094)
