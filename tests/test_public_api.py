"""What users may rely on: the public names, a docstring on each, and an import that costs next to nothing."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitedge
from tests.engines import ROOT, run_python

PACKAGE = ROOT / "vitedge"
MODULES = sorted(PACKAGE.rglob("*.py"))
PUBLIC = [
    "Batcher",
    "CameraOptions",
    "Engine",
    "Frame",
    "Manifest",
    "ModelCard",
    "Prediction",
    "Predictor",
    "Preprocess",
    "Recipe",
    "ScaleTable",
    "Stream",
    "Target",
    "TensorSpec",
    "Timing",
    "VitEdgeError",
    "open_engine",
    "stream",
]
NOT_AT_IMPORT = ("torch", "onnx", "onnxruntime", "openvino", "cv2", "PIL", "numpy", "typer", "rich")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def test_the_public_names_are_these() -> None:
    assert vitedge.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves_and_is_documented(name: str) -> None:
    thing = getattr(vitedge, name)
    assert thing.__name__ == name and thing.__module__.startswith("vitedge.")
    documentation = inspect.getdoc(thing)
    assert documentation and not documentation.startswith(f"{name}(")  # which is what a dataclass makes up for itself


def test_a_star_import_brings_the_public_names_alone() -> None:
    names: dict[str, object] = {}
    exec("from vitedge import *", names)
    assert set(names) - {"__builtins__"} == set(PUBLIC)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        importlib.import_module("vitedge").nonsense  # noqa: B018


def test_the_version_is_that_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert vitedge.__version__ == project["version"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = set(run_python("import sys, vitedge; print(*sys.modules)").stdout.split())
    assert "vitedge.specs" in loaded
    assert not loaded & set(NOT_AT_IMPORT)


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_class_function_and_method_says_what_it_does(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    bare = [name for name, node in definitions(tree) if not ast.get_docstring(node)]
    assert not bare, f"without a docstring: {', '.join(bare)}"
    assert ast.get_docstring(tree) or not tree.body, "the module has no docstring"


def definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """The public functions and classes of a module, and the methods of these, that have to be documented.

    Not: a method that a base class in the same module documents, and the members of a Protocol that are a bare `...`.
    """
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in public(tree):
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            inherited = {method.name for base in bases(node, classes) for method in public(base)}
            own = (method for method in public(node) if method.name not in inherited and not is_bare(method))
            yield from ((f"{node.name}.{method.name}", method) for method in own)


def public(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    return (member for member in node.body if isinstance(member, Definition) and not member.name.startswith("_"))


def bases(node: Definition, classes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    for base in node.bases if isinstance(node, ast.ClassDef) else ():
        if isinstance(base, ast.Name) and base.id in classes:
            yield classes[base.id]
            yield from bases(classes[base.id], classes)


def is_bare(node: Definition) -> bool:
    return len(node.body) == 1 and isinstance(node.body[0], ast.Expr) and ast.unparse(node.body[0]) == "..."


def test_the_docstring_rule_finds_what_is_missing() -> None:
    base, derived = 'class A:\n    "Doc."\n    def f(self): pass\n', 'class B(A):\n    "Doc."\n    def f(self): pass\n'
    tree = ast.parse(f"{base}{derived}def g(): pass\ndef _h(): pass\n")
    assert [name for name, node in definitions(tree) if not ast.get_docstring(node)] == ["A.f", "g"]
