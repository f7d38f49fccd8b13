from __future__ import annotations

import multiprocessing.spawn
import subprocess
import sys
from pathlib import Path

import pytest

from server.process.spawn import main_script_hidden

SCRIPT = """
import multiprocessing, os
from server.process.spawn import main_script_hidden

print("run", __name__)
with main_script_hidden():
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
assert process.exitcode == 0
assert __file__ and os.path.samefile(__file__, "script.py")
"""


@pytest.mark.parametrize("how", [["script.py"], ["-m", "script"]])
def test_a_process_does_not_run_the_script_again(tmp_path: Path, how: list[str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *how], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("run __main__\n", "")


@pytest.mark.parametrize("has_file", [True, False])
def test_what_names_the_script_is_back_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, has_file: bool
) -> None:
    main = sys.modules["__main__"]
    if has_file:
        monkeypatch.setattr(main, "__file__", "script.py", raising=False)
    else:
        monkeypatch.delattr(main, "__file__", raising=False)
    before = main.__spec__, getattr(main, "__file__", None)
    told: dict[str, object] = {}

    def fails() -> None:
        with main_script_hidden():
            told.update(multiprocessing.spawn.get_preparation_data("x"))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert told["name"] == "x"
    assert not any(name.startswith("init_main") for name in told)
    assert (main.__spec__, getattr(main, "__file__", None)) == before
    assert hasattr(main, "__file__") == has_file
