"""What a server does before it has imported torch."""

from __future__ import annotations

import subprocess
import sys


def test_a_server_listens_before_torch_is_imported() -> None:
    code = "import sys, server.live.commands, server.live.run"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(*{{'torch', 'opacus'}} & sys.modules.keys())"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "", done.stderr
    assert done.returncode == 0
