"""What all tests share: the data sets, the GPU, and a check that nothing is left running."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

# The benchmarks and the tests' own helpers are no installed packages, and Opacus installs a
# `benchmarks` and an `examples` of its own: the project's folder comes first, for all modules.
ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from tests.onnx_registry import share_registry_if_exporting  # noqa: E402

if TYPE_CHECKING:
    from tests.prefork import Prefork

# multiprocessing starts these once a process and ends them with it.
_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def pytest_configure() -> None:
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when Flower is imported
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its threads in a worker: a note at each fork
    # How long an example takes says more about the machine's other work than about the code.
    hypothesis.settings.register_profile("fedcore", deadline=None)
    hypothesis.settings.load_profile("fedcore")


# Those that start processes and wait for them: first, so that the others fill the waits.
_FIRST = ("e2e", "adversarial", "statistical")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(tests).parts[0] not in _FIRST)
    for item in items:
        if "data_folder" in getattr(item, "fixturenames", ()):
            item.add_marker("data")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Excludes what is collected from garbage collection: these million objects live to the end.

    Without it, each full collection would visit them; Flower and some tests ask for many.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    share_registry_if_exporting()
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU, and torch finds none here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # What a test of foreign text has logged may hold halves of pairs, which workers cannot send.
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    data = os.environ.get("FEDCORE_DATA")
    if report.skipped and data and item.get_closest_marker("data"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = (
            f"FEDCORE_DATA = {data} is set, so this test must run, and it skipped: {reason}"
        )
    return report


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder that FEDCORE_DATA names; a test that asks for it is marked ``data``."""
    value = os.environ.get("FEDCORE_DATA")
    if not value:
        pytest.skip("FEDCORE_DATA is not set: it names the folder of the data sets")
    folder = Path(value).resolve()
    assert folder.is_dir(), f"FEDCORE_DATA = {value}: this folder does not exist"
    return folder


@pytest.fixture(scope="session", autouse=True)
def _flower_writes_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["FLWR_HOME"] = str(tmp_path_factory.mktemp("flower"))


@pytest.fixture(scope="session", autouse=True)
def _devices_count_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("counts"))


@pytest.fixture(scope="session")
def prefork(_flower_writes_elsewhere: None, _devices_count_elsewhere: None) -> Iterator[Prefork]:
    """Starts command lines without their four seconds of imports."""
    from tests.prefork import Prefork

    started = Prefork()
    yield started
    started.close()


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 3
    while (left := _children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"the tests left child processes: {left}"


def _children() -> dict[int, str]:
    """Command lines of this process's children, zombies among them (with an empty line)."""
    found = {}
    for listing in Path("/proc/self/task").glob("*/children"):
        try:
            children = listing.read_text().split()
        except FileNotFoundError:  # a thread that has just ended
            continue
        for child in children:
            try:
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except FileNotFoundError:
                continue
            if not any(helper in line for helper in _HELPERS):
                found[int(child)] = line
    return found
