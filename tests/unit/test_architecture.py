"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import fedcore

ROOT = Path(__file__).parents[2]
PRODUCT = sorted(
    path for top in ("fedcore", "edge_client", "server") for path in (ROOT / top).rglob("*.py")
)
ALL = PRODUCT + sorted(
    path for top in ("tests", "examples", "benchmarks") for path in (ROOT / top).rglob("*.py")
)
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS = {
    "fedcore/kernels/sparse_backward.py:compile_sparse_backward": "one loop nest, compiled at once",
}
"""Functions that may be longer, and why."""
UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"torch.load", "np.load", "numpy.load", "eval", "exec"}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(), filename=str(path)))


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each module that a file imports, with the names that it takes from it."""
    for node in parsed(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, tuple(alias.name for alias in node.names)


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_layers_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("path", ALL, ids=label)
def test_a_file_is_about_one_thing(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def long_functions(path: Path) -> Iterator[str]:
    for node in parsed(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            if (node.end_lineno or 0) - first.lineno + 1 > MAX_FUNCTION_LINES:
                yield f"{label(path)}:{node.name}"


def test_a_function_is_read_on_one_page() -> None:
    assert sorted(LONG_FUNCTIONS) == sorted(
        name for path in PRODUCT for name in long_functions(path)
    )


def test_a_class_name_is_used_once() -> None:
    found: dict[str, list[str]] = {}
    for path in PRODUCT:
        if not path.name.startswith("wake_pb2"):
            for node in parsed(path):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(label(path))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def is_public_flower(module: str, names: tuple[str, ...]) -> bool:
    rooms = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
    if not any(module == room or module.startswith(f"{room}.") for room in rooms):
        return False
    offered = getattr(import_module(module), "__all__", None)
    return all(name in offered if offered else not name.startswith("_") for name in names)


def test_flowers_private_modules_are_imported_in_one_room_alone() -> None:
    found = [
        f"{label(path)}: {module} {' '.join(names)}"
        for path in PRODUCT
        if ROOT / "fedcore" / "flower" not in path.parents
        for module, names in imports(path)
        if module.partition(".")[0] == "flwr" and not is_public_flower(module, names)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "names", "public"),
    [
        ("flwr.app", ("Message", "RecordDict"), True),
        ("flwr.serverapp.strategy", ("FedAvg",), True),
        ("flwr.app", ("NoSuchName",), False),
        ("flwr", (), False),
        ("flwr.common", ("Message",), False),
        ("flwr.supercore.task_identity", ("TaskIdentity",), False),
        ("flwr.application", (), False),
    ],
)
def test_what_counts_as_flowers_public_side(
    module: str, names: tuple[str, ...], public: bool
) -> None:
    assert is_public_flower(module, names) == public


def offences(path: Path) -> Iterator[str]:
    """What no file of the product may do: unpickle, evaluate text, swallow errors."""
    for module, names in imports(path):
        taken = {f"{module}.{name}" for name in names}
        if module.partition(".")[0] in UNPICKLING or taken & FORBIDDEN_CALLS:
            yield f"imports {module} {' '.join(names)}"
    for node in parsed(path):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: calls {ast.unparse(node.func)}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield f"line {node.lineno}: allow_pickle"
        if isinstance(node, ast.ExceptHandler) and swallows(node):
            yield f"line {node.lineno}: swallows every error"


def swallows(handler: ast.ExceptHandler) -> bool:
    caught = ast.unparse(handler.type) if handler.type else "Exception"
    return caught in ("Exception", "BaseException") and all(
        isinstance(line, ast.Pass | ast.Continue)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in handler.body
    )


PRINTING = {"fedcore/observability/foreign.py", "fedcore/observability/console.py"}
"""Where text goes to a terminal; everything else goes through these, which escape it."""
TRACEBACKS = {
    "server/commands/simulate_command.py": "a traceback is what its user asks for",
    "server/simulation/workers/process_pool.py": "a worker's failure, told by its parent process",
}
_WRITES = {
    *("print", "sys.stdout.write", "sys.stderr.write", "warnings.warn"),
    *("logging.basicConfig", "logging.StreamHandler", "logging.FileHandler"),
}
_TRACES = {"traceback.print_exc", "traceback.print_exception", "traceback.format_exc"}


def outbursts(path: Path) -> Iterator[str]:
    """Ways to a terminal or a log on which nothing is escaped or bounded."""
    where = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    for node in parsed(path):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in _WRITES and where not in PRINTING:
            yield f"line {node.lineno}: {called}; use fedcore.observability.foreign.say"
        traces = called in _TRACES or called in ("log.exception", "logging.exception")
        traces |= any(keyword.arg in ("exc_info", "stack_info") for keyword in node.keywords)
        if traces and where not in TRACEBACKS:
            yield f"line {node.lineno}: {called} writes a traceback"


@pytest.mark.parametrize("path", PRODUCT, ids=label)
def test_what_is_printed_or_logged_is_escaped_and_bounded(path: Path) -> None:
    assert list(outbursts(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "print('x')",
        "import sys\nsys.stderr.write('x')",
        "log.error('x', exc_info=True)",
        "log.exception('x')",
        "import logging\nlogging.basicConfig()",
        "import traceback\ntraceback.print_exc()",
    ],
)
def test_each_way_around_is_found(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.py"
    path.write_text(text)
    assert len(list(outbursts(path))) == 1


@pytest.mark.parametrize("path", PRODUCT, ids=label)
def test_the_product_unpickles_nothing_and_swallows_nothing(path: Path) -> None:
    assert list(offences(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x')",
        "f(allow_pickle=True)",
        "eval('1')",
        "try:\n    f()\nexcept Exception:\n    pass",
        "for x in y:\n    try:\n        f()\n    except:\n        continue",
    ],
)
def test_each_offence_is_found(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.py"
    path.write_text(text)
    assert len(list(offences(path))) == 1


def test_what_is_no_offence_is_let_pass(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "model.eval()\ntry:\n    f()\nexcept KeyError:\n    pass\nsafetensors.load(x)\n"
    )
    assert list(offences(path)) == []


def test_all_names_what_the_package_offers() -> None:
    assert len(set(fedcore.__all__)) == len(fedcore.__all__)
    for name in fedcore.__all__:
        assert getattr(fedcore, name) is not None
    # In a fresh process, so that nothing but the package's own imports has put names there.
    offered = json.loads(
        run_python(
            "import fedcore, json, types\n"
            "eager = [n for n, v in vars(fedcore).items() if not n.startswith('_')\n"
            "         and getattr(v, '__module__', '').startswith('fedcore')]\n"
            "print(json.dumps([*eager, *fedcore._LAZY, '__version__']))"
        )
    )
    assert sorted(offered) == sorted(fedcore.__all__)


@pytest.mark.parametrize("name", sorted(set(fedcore.__all__) - {"__version__"}))
def test_each_public_name_explains_itself_by_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(fedcore, name)) or ""
    assert re.search(r"^Example::\n\n    \S", text, re.M)


def test_a_name_that_the_package_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedcore' has no attribute 'nothing'"):
        _ = fedcore.nothing


def test_the_lazy_names_are_the_ones_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "fedcore" / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == fedcore._LAZY


def loaded_by(code: str) -> set[str]:
    """The top-level packages that are loaded once ``code`` has run."""
    said = run_python(f"{code}\nimport sys\nprint('loaded', *sys.modules)")
    return {name.partition(".")[0] for name in said.splitlines()[-1].split()}


TRAINING = {"agent", "ledger", "device_folder.py"}
"""What of a device trains, and needs more than the base package."""


def test_a_device_that_only_infers_loads_neither_torch_nor_flower() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PRODUCT
        if path.is_relative_to(ROOT / "edge_client")
        and path.relative_to(ROOT / "edge_client").parts[0] not in TRAINING
    ]
    assert "edge_client.inference.confined" in modules
    loaded = loaded_by(f"import fedcore, fedcore.cli, {', '.join(modules)}")
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "flwr", "opacus", "onnx", "server"}


def test_neither_onnxruntime_nor_flower_reports_to_its_maker(tmp_path: Path) -> None:
    code = """
import os, sys
for name in ("ORT_DISABLE_TELEMETRY", "FLWR_TELEMETRY_ENABLED"):
    os.environ.pop(name, None)
os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = sys.argv[1]
import edge_client.commands, flwr.supercore.telemetry as flower
held = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{n}")]
print(flower.FLWR_TELEMETRY_ENABLED, [path for path in held if "onnxruntime" in path])
"""
    assert run_python(code, str(tmp_path)) == "0 []\n"
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_is_parsed_without_torch_or_flower() -> None:
    loaded = loaded_by("from fedcore.cli import build_parser\nbuild_parser()")
    assert "fedcore" in loaded
    assert not loaded & {"torch", "flwr", "opacus", "sklearn", "matplotlib"}


def test_a_verb_loads_nothing_of_the_others() -> None:
    loaded = loaded_by("from fedcore.cli import build_parser\nbuild_parser('server')")
    assert "server" in loaded
    assert not loaded & {"onnxruntime", "tuf", "edge_client"}


def test_each_verb_explains_its_options() -> None:
    names = {entry.name for entry in entry_points(group="fedcore.commands")}
    assert {"check", "client", "device", "new", "provision", "release", "simulate"} <= names
    for name in sorted(names):
        said = run_python(
            "from fedcore.cli import main; import sys; main(sys.argv[1:])", name, "-h"
        )
        assert said.startswith(f"usage: fedcore {name}")
        assert "example:" in said or "VERB" in said
