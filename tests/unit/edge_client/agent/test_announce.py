from __future__ import annotations

import subprocess
import sys


def test_announcing_imports_no_torch() -> None:
    code = "import sys, edge_client.agent.announce, edge_client.agent.policy"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('torch' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False", done.stderr
