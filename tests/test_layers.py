"""Who may import whom, as docs/architecture.md lays it down: read off the source, and checked in a fresh interpreter."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import ROOT, run_python

PACKAGE = ROOT / "vitedge"
# A name imports from the lines below its own. On one line, `a > b` lets a import b; others of a line do not know each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("cli_run", "cli_bench", "cli_report", "cli_tune"),
    ("options", "terminal"),
    ("tune > workshop",),
    ("pipeline > bound", "pipeline > pack", "pipeline > cluster", "doctor", "search > designs"),
    ("bench",),
    ("compiler", "runtime"),
    ("backends",),
    ("datasets > label_table",),
    ("preprocess", "images > archives", "workspace"),
    ("resample_cpu > resample_kernels",),
    ("pixels", "resampling", "exact", "imagenet"),
    ("specs > errors",),
)
LINE = {name: row for row, layer in enumerate(LAYERS) for entry in layer for name in entry.split(" > ")}
NEIGHBOURS = {tuple(entry.split(" > ")) for layer in LAYERS for entry in layer if " > " in entry}
# package -> the modules that may import it; a folder stands for all that is in it
THIRD_PARTY = {
    "numpy": (
        "backends",
        "bench",
        "bound",
        "compiler",
        "runtime",
        "doctor",
        "exact",
        "images",
        "pixels",
        "preprocess",
        "resample_cpu",
        "resample_kernels",
        "resampling",
    ),
    "numba": ("resample_cpu", "resample_kernels"),
    "llvmlite": ("resample_kernels",),
    "PIL": ("images", "preprocess", "runtime/overlay.py"),
    "tomli": ("workspace",),
    "typer": ("cli", "cli_bench", "cli_run", "cli_report", "cli_tune", "options", "terminal"),
    "rich": (
        "cli",
        "cli_run",
        "terminal",
        "bench/breakdown.py",
        "bench/costs.py",
        "bench/losses.py",
        "bench/roofline.py",
        "bench/tables.py",
    ),
    "torch": ("compiler",),
    "onnx": ("compiler",),
    "onnxscript": ("compiler",),
    "ml_dtypes": ("compiler",),
    "safetensors": ("compiler",),
    "transformers": ("compiler",),
    "timm": ("compiler",),
    "torchvision": ("compiler",),
    "onnxruntime": ("compiler", "backends/onnxruntime.py"),
    "openvino": ("backends/openvino.py",),
    "tensorrt": ("backends/tensorrt.py",),
    "pycuda": ("backends/cuda.py",),
    "cuda": ("backends/cuda_graph.py", "backends/cubin.py"),  # cuda-bindings
    "starlette": ("runtime/web_guard.py", "runtime/web_server.py"),
    "uvicorn": ("runtime/web_guard.py", "runtime/web_server.py"),
    "h11": ("runtime/web_guard.py",),  # which uvicorn brings along
    "pyarrow": ("archives",),
    "pynvml": ("runtime/vitals.py",),
    "paho": ("runtime/mqtt.py",),
    "cv2": ("runtime/opencv.py", "runtime/overlay.py"),
}
HEAVY = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "safetensors",
    "transformers",
    "timm",
    "torchvision",
    "cv2",
    "numba",
    "llvmlite",
    "pyarrow",
    "ray",
    "starlette",
    "uvicorn",
)
NUMBA_CODE = "resample_kernels"  # compiled where it is imported, which a function does
WEB_CODE = ("web_guard.py", "web_server.py")  # in runtime/, likewise imported by a function
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a module imports when it runs: not under TYPE_CHECKING, but also by importlib."""
    tree = ast.parse(path.read_text("utf-8"))
    hidden = {id(node) for block in ast.walk(tree) if is_type_checking(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def name_of(path: Path) -> str:
    """The module or sub-package directly below vitedge that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def within(path: Path, places: tuple[str, ...]) -> bool:
    return name_of(path) in places or path.relative_to(PACKAGE).as_posix() in places


def may_import(importer: str, name: str) -> bool:
    return importer == name or LINE[importer] < LINE[name] or (importer, name) in NEIGHBOURS


def test_every_module_has_its_line() -> None:
    assert {name_of(path) for path in MODULES} - {"__init__"} == set(LINE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_lines_below_it(path: Path) -> None:
    importer = name_of(path)
    names = {dotted.split(".")[1] for dotted in imported(path) if dotted.startswith("vitedge.")}
    if importer == "__init__":
        assert {name for name in names if not name.startswith("__")} == {"errors", "specs"}
        return
    wrong = {name for name in names if name in LINE and not may_import(importer, name)}
    assert not wrong, f"{importer} imports {', '.join(sorted(wrong))}"
    assert names <= set(LINE) | {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_package_of_others_is_imported_only_where_it_belongs(path: Path) -> None:
    tops = {dotted.partition(".")[0] for dotted in imported(path)} - {"vitedge", ""}
    foreign = tops - set(sys.stdlib_module_names) - {"tomllib"}
    assert foreign <= set(THIRD_PARTY), "say in THIRD_PARTY where it may be imported"
    wrong = {top for top in foreign if not within(path, THIRD_PARTY[top])}
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_is_called_after_nothing_in_particular(path: Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc", "base", "manager")


def test_the_rule_itself_finds_deviations(tmp_path: Path) -> None:
    module = tmp_path / "m.py"
    module.write_text(
        "from typing import TYPE_CHECKING\nimport torch.nn as nn\nfrom vitedge import pipeline\n"
        "if TYPE_CHECKING:\n    import cv2\n"
        "def f():\n    import importlib\n    from vitedge.runtime.engine import x\n    importlib.import_module('timm')\n"
    )
    found = set(imported(module))
    assert {"torch.nn", "vitedge.pipeline", "vitedge.runtime.engine.x", "timm"} <= found and "cv2" not in found
    assert may_import("cli", "errors") and may_import("pipeline", "bench") and may_import("specs", "errors")
    for importer, name in (("compiler", "runtime"), ("runtime", "compiler"), ("backends", "runtime"), ("bench", "pipeline")):
        assert not may_import(importer, name)


def test_what_a_device_needs_loads_without_any_heavy_package() -> None:
    """Every module outside the compiler, imported in a fresh interpreter: only its functions need the heavy packages."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if name_of(path) not in ("compiler", NUMBA_CODE) and path.name not in WEB_CODE
    ]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(*sorted(sys.modules))"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert set(names) <= loaded
    assert not loaded & set(HEAVY)
    assert not any(name.startswith(("vitedge.compiler", f"vitedge.{NUMBA_CODE}")) for name in loaded)


def test_the_compiler_loads_without_a_camera_or_a_device_backend() -> None:
    pytest.importorskip("torch")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if name_of(path) == "compiler"]
    names = [name for name in names if not name.endswith("__init__")]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(*sorted(sys.modules))"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"torch", "onnx", "onnxruntime"} <= loaded
    assert not loaded & {"cv2", "openvino", "transformers", "timm", "torchvision"}
    assert not any(name.startswith(("vitedge.runtime", "vitedge.backends")) for name in loaded)
