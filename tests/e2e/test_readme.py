"""Every command of the README and of the documentation is one that works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
QUICK = ["federation.rounds=2", "finetune.epochs=1", "compression.timing_runs=100"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[str]:
    lines = [line.strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run(command: str, folder: Path) -> str:
    """Runs a command that must succeed; what it printed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("FEDCORE_DATA", None)
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_readme_works_in_its_order(tmp_path: Path) -> None:
    page = commands(ROOT / "README.md")
    # What goes on in the background is followed by test_deployment.py.
    page = page[: page.index("fedcore provision init --project orchard")]
    ours = [command for command in page if command.startswith("fedcore ")]
    assert len(ours) >= 8
    for command in ours:
        shorter = command.startswith("fedcore simulate")
        options = "".join(f" --set {value}" for value in QUICK) if shorter else ""
        run(command + options, tmp_path)


@pytest.mark.slow
def test_the_release_page_works_in_its_order(tmp_path: Path) -> None:
    page = commands(ROOT / "docs" / "release.md")
    assert page
    for command in page:
        run(command, tmp_path)


@pytest.mark.slow
def test_the_algorithms_page_works_in_its_order(tmp_path: Path) -> None:
    page = ROOT / "docs" / "algorithms.md"
    source, call = blocks(page, "python")
    new, *rest = commands(page)
    assert len(source.splitlines()) <= 40
    run(new, tmp_path)
    (tmp_path / "churn" / "mine.py").write_text(source)
    for command in rest:
        shorter = command.startswith("fedcore simulate")
        options = "".join(f" --set {value}" for value in QUICK) if shorter else ""
        run(command + options, tmp_path)
    quick = ", progress=False, finetune={'epochs': 0}, compression={'candidates': ('fp32',)})"
    body = f"import fedcore, sys\nsys.path.insert(0, 'churn')\nfrom mine import *\n{call}"
    (tmp_path / "call.py").write_text(body.replace("(beta=0.5))", "(beta=0.5)" + quick))
    run(f"{sys.executable} call.py", tmp_path)


@pytest.mark.slow
def test_the_task_in_the_readme_is_ready(tmp_path: Path) -> None:
    _, source = blocks(ROOT / "README.md", "python")
    (tmp_path / "task.py").write_text(source)
    assert "This task is ready." in run("fedcore check task.py", tmp_path)


@pytest.mark.slow
def test_the_call_in_the_readme_works(tmp_path: Path) -> None:
    source, _ = blocks(ROOT / "README.md", "python")
    settings = 'federation={"rounds": 20}'
    quick = 'federation={"rounds": 2}, compression={"timing_runs": 100}, finetune={"epochs": 1}'
    assert settings in source
    run("fedcore new churn", tmp_path)
    # What starts processes stands behind such a line in a script; a notebook needs none.
    body = "".join(f"    {line}\n" for line in source.replace(settings, quick).splitlines())
    (tmp_path / "script.py").write_text(f'if __name__ == "__main__":\n{body}')
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert "round 2/2" in done.stderr


def test_every_make_target_that_is_named_exists() -> None:
    written = re.compile(r"(?:^|`)make ([a-z-]+)", re.M)  # as a command, not in a sentence
    named = {name for page in PAGES for name in written.findall(page.read_text())}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
