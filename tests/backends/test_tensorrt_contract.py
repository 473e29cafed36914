"""Every TensorRT name in the code exists in each release that gets to it: the code is walked as that release would run it.

tests/data/trt_api/*.json holds the public names of each release's Python bindings: {"version", "api": {class: [members]}}.
Where the releases differ, the code asks `hasattr`, and the walk knows the answer. What a variable is, it knows by its name.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.engines import ROOT

API = ROOT / "tests" / "data" / "trt_api"
RELEASES = ("8.6.1", "10.3.0", "10.7.0", "10.13.3.9", "10.16.1.11", "11.0.0", "11.4.0", "rtx-1.7.1")
SOURCES = sorted((ROOT / "vitedge" / "backends").glob("tensorrt*.py"))
MODULES = ("trt", "_trt")  # variables and attributes that are the module itself
OBJECTS = {  # variables and attributes, with or without an underscore, that are objects of TensorRT
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "entry": "ITensor",
    "error": "ParserError",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "plan": "ICudaEngine",
    "profile": "IOptimizationProfile",
    "reader": "OnnxParserRefitter",
    "refitter": "Refitter",
    "runtime": "Runtime",
    "serialization": "ISerializationConfig",
}
NEEDS = {  # functions, and what must be there to use them
    "_hold": "IAlgorithmSelector",  # which went in 11, together with ILayer.precision
    "make_monitor": "IProgressMonitor",
    "capabilities": "ComputeCapability",
    "serialized": "SerializationFlag",
}
KNOWN = {"anywhere": "ComputeCapability"}  # conditions that hold where TensorRT has a name: it is TensorRT-RTX
Names = dict[str, object]  # what local variables stand for: a kind, or the constants that a loop runs over
MODULE = "the module"


class Walk:
    """One release's way through a source file. used: the names it came by; missing: those that it does not have, with lines."""

    def __init__(self, api: dict[str, list[str]], tree: ast.Module) -> None:
        self.api, self.used, self.missing = api, set[str](), list[str]()
        self.properties = {
            function.name: function.body[-1].value
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and isinstance(function.body[-1], ast.Return)
        }
        self.block(tree.body, {})

    def block(self, statements: list[ast.stmt], names: Names) -> bool:
        """Walk statements; whether they always return or raise, so that what follows them is not reached."""
        return any(self.statement(statement, names) for statement in statements)

    def statement(self, node: ast.stmt, names: Names) -> bool:
        """Walk one statement, branches only where this release may take them."""
        if isinstance(node, ast.If):
            self.visit(node.test, names)
            truth = self.truth(node.test, names)
            ends = [
                self.block(block, names) for block, when in ((node.body, True), (node.orelse, False)) if truth in (None, when)
            ]
            return all(ends)
        if isinstance(node, ast.FunctionDef) and NEEDS.get(node.name, MODULE) not in (MODULE, *self.api):
            return False
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = dict(names)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Tuple):
            names[node.target.id] = [element.value for element in node.iter.elts if isinstance(element, ast.Constant)]
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = self.kind(node.value, names)
        for _, value in ast.iter_fields(node):
            parts = value if isinstance(value, list) else [value]
            if parts and isinstance(parts[0], ast.stmt):
                ended = self.block(parts, names)
                if ended and isinstance(node, (ast.With, ast.Try)):
                    return True
            else:
                for part in parts:
                    self.visit(part, names)
        return isinstance(node, (ast.Return, ast.Raise))

    def visit(self, node: object, names: Names) -> None:
        """Check every name in an expression."""
        if isinstance(node, ast.ExceptHandler):
            self.block(node.body, names)
            return
        if not isinstance(node, ast.AST):
            return
        if isinstance(node, ast.IfExp):
            truth = self.truth(node.test, names)
            self.visit(node.test, names)
            for branch, when in ((node.body, True), (node.orelse, False)):
                if truth in (None, when):
                    self.visit(branch, names)
            return
        if isinstance(node, (ast.Name, ast.Attribute)):
            needed = NEEDS.get(node.id if isinstance(node, ast.Name) else node.attr)
            self.check(MODULE if needed else None, needed or "", node)
        if isinstance(node, ast.Attribute):
            self.check(self.kind(node.value, names), node.attr, node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            self.check_each(node, names)
        for child in ast.iter_child_nodes(node):
            self.visit(child, names)

    def check_each(self, node: ast.Call, names: Names) -> None:
        """The names that a getattr() may take: a constant, or those of the loop around it."""
        name = node.args[1]
        values = names.get(name.id) if isinstance(name, ast.Name) else [name.value] if isinstance(name, ast.Constant) else None
        kind = self.kind(node.args[0], names)
        if kind is not None:
            assert isinstance(values, list), f"line {node.lineno}: getattr with a name that cannot be read here"
            for value in values:
                self.check(kind, str(value), node)

    def check(self, kind: str | None, name: str, node: ast.AST) -> None:
        """Note a name, and whether this release has it."""
        if kind is None or name.startswith("__"):
            return
        known = self.api if kind == MODULE else self.api.get(kind, [])
        full = name if kind == MODULE else f"{kind}.{name}"
        self.used.add(full)
        if name not in known:
            self.missing.append(f"line {getattr(node, 'lineno', 0)}: {full}")

    def kind(self, node: ast.AST, names: Names) -> str | None:
        """The class that an expression is, or is an object of; or the module; None for what is not TensorRT's."""
        if isinstance(node, ast.Name):
            if isinstance(local := names.get(node.id), str):
                return local
            return MODULE if node.id in MODULES else OBJECTS.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return MODULE if node.attr in MODULES else OBJECTS.get(node.attr.lstrip("_")) if node.attr[0] == "_" else None
            return node.attr if self.kind(node.value, names) == MODULE and not node.attr.startswith("__") else None
        if isinstance(node, ast.IfExp):
            return self.kind(node.body if self.truth(node.test, names) else node.orelse, names)
        return self.kind(node.func, names) if isinstance(node, ast.Call) else None

    def truth(self, node: ast.AST, names: Names) -> bool | None:
        """What a condition is for this release; None where it depends on something else."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            truth = self.truth(node.operand, names)
            return None if truth is None else not truth
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            kind, name = self.kind(node.args[0], names), node.args[1]
            assert kind and isinstance(name, ast.Constant), f"line {node.lineno}: hasattr of something that cannot be read here"
            return name.value in (self.api if kind == MODULE else self.api.get(kind, []))
        if isinstance(node, ast.Attribute) and node.attr in KNOWN:
            return KNOWN[node.attr] in self.api
        if isinstance(node, ast.Attribute) and node.attr in self.properties:
            value = self.properties[node.attr]
            return None if value is None else self.truth(value, {})
        return None


def walk(release: str, source: str) -> Walk:
    """A source as a release would run it."""
    return Walk(json.loads((API / f"{release}.json").read_text("utf-8"))["api"], ast.parse(source))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("release", RELEASES)
def test_a_release_has_every_name_that_it_gets_to(release: str, path: Path) -> None:
    assert not walk(release, path.read_text("utf-8")).missing


def test_the_walk_comes_by_what_a_build_and_a_session_need() -> None:
    used = set().union(*(walk(release, path.read_text("utf-8")).used for path in SOURCES for release in RELEASES))
    assert used >= {
        "Builder", "Builder.create_network", "Builder.build_serialized_network", "IBuilderConfig.set_timing_cache",
        "IBuilderConfig.progress_monitor", "IBuilderConfig.set_compute_capability", "BuilderFlag.INT8",
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
        "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", "INetworkDefinition.get_input", "ITensor.shape",
        "OnnxParser.parse", "ParserError.node_name", "IOptimizationProfile.set_shape", "ITimingCache.combine", "ILogger.INFO",
        "Runtime.deserialize_cuda_engine", "ICudaEngine.get_tensor_mode", "IExecutionContext.execute_async_v3", "nptype",
        "BuilderFlag.FP16", "INetworkDefinition.get_layer", "ILayer.precision", "LayerType.DEQUANTIZE",
        "OnnxParserRefitter.get_error", "SerializationFlag.INCLUDE_REFIT", "ISerializationConfig.set_flag",
        "ICudaEngine.serialize", "ICudaEngine.serialize_with_config",
        "IExecutionContext.profiler", "EngineInspector.execution_context", "Refitter.refit_cuda_engine", "IProgressMonitor",
    }  # fmt: skip
    assert len(used) > 50


@pytest.mark.parametrize(
    ("source", "without"),
    [
        ("config.set_flag(trt.BuilderFlag.INT8)", ("11.0.0", "11.4.0", "rtx-1.7.1")),
        ("config.precision_of_everything = 8", RELEASES),
        ("def f(self):\n    self._context.execute_async_v4(0)", RELEASES),
        ("x = trt.Invented(1)", RELEASES),
        ("def f(config):\n    return config.build_route", ("8.6.1", "10.3.0", "10.7.0", "10.13.3.9", "10.16.1.11", "11.0.0")),
        ("levels = trt.HardwareCompatibilityLevel\nlevels.SAME_COMPUTE_CAPABILITY", ("8.6.1", "10.3.0", "10.7.0")),
        ("if hasattr(trt.BuilderFlag, 'INT8'):\n    trt.BuilderFlag.INT8\nelse:\n    trt.BuilderFlag.TF32", ()),
        ("if not hasattr(trt.BuilderFlag, 'INT8'):\n    trt.BuilderFlag.INT8", ("11.0.0", "11.4.0", "rtx-1.7.1")),
        ("def f():\n    if not hasattr(trt, 'IProgressMonitor'):\n        return\n    trt.IProgressMonitor", ()),
        ("for name in ('TF32', 'INT8'):\n    getattr(trt.BuilderFlag, name)", ("11.0.0", "11.4.0", "rtx-1.7.1")),
        ("flag = trt.BuilderFlag.FP16 if 1 > 2 else trt.BuilderFlag.TF32", ("11.0.0", "11.4.0", "rtx-1.7.1")),
        ("with a:\n    try:\n        f()\n    except E:\n        trt.BuilderFlag.FP8", ("11.0.0", "11.4.0", "rtx-1.7.1")),
        ("make_monitor(trt)", ("8.6.1",)),
        ("if hasattr(trt, 'IProgressMonitor'):\n    make_monitor(trt)", ()),
    ],
)
def test_the_walk_itself_finds_names_that_a_release_lacks(source: str, without: tuple[str, ...]) -> None:
    assert tuple(release for release in RELEASES if walk(release, source).missing) == without
