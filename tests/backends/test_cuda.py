"""vitedge's CUDA code on the real PyCUDA, cuda-bindings and NVRTC, with a driver that has no GPU (tests/driver/driver.cpp).

What tests/driver/cases.py checks runs in a process for each major release of CUDA, and is told here case by case. Says nothing
of what a real GPU computes, nor how fast: that is tests/gpu.
"""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import pytest

from tests.driver import build

CASES = build.ROOT / "tests" / "driver" / "cases.py"
SOURCES = sorted((build.ROOT / "vitedge" / "backends").glob("cu*.py"))
NAMES = [node.name for node in ast.parse(CASES.read_text("utf-8")).body if getattr(node, "name", "").startswith("test_")]


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    """The packages, fetched and built once."""
    try:
        build.prepare()
    except build.Unavailable as error:
        pytest.skip(str(error))


@cache
def outcomes(major: str, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """What became of every case, each time that it ran: "passed", "failed" or "skipped", and what was said."""
    report = folder / f"{major}.xml"
    done = build.run(major, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", CASES)
    assert report.is_file(), done.stdout + done.stderr
    assert "PyCUDA" not in done.stderr, done.stderr
    found: dict[str, list[tuple[str, str]]] = {}
    for case in ET.parse(report).iter("testcase"):
        bad = [child for kind in ("failure", "error", "skipped") for child in case.findall(kind)]
        state = "passed" if not bad else "skipped" if bad[0].tag == "skipped" else "failed"
        text = f"{bad[0].get('message')}\n{bad[0].text}" if bad else ""
        found.setdefault(case.get("name", "").partition("[")[0], []).append((state, text))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("major", build.BINDINGS)
def test_a_case(major: str, name: str, folder: Path) -> None:
    states = outcomes(major, folder)[name]
    failed = [text for state, text in states if state == "failed"]
    assert not failed, failed[0]
    if all(state == "skipped" for state, _ in states):
        pytest.skip(states[0][1].splitlines()[0])


@pytest.mark.parametrize("major", build.BINDINGS)
def test_every_name_exists(major: str) -> None:
    """Also those on a way that no case takes."""
    names = sorted({(module, name) for path in SOURCES for module, name in used(path.read_text("utf-8"))})
    assert {("driver", "cuGraphLaunch"), ("nvrtc", "nvrtcGetCUBIN"), ("pycuda.driver", "pagelocked_empty")} <= set(names)
    code = """if True:
        import sys, functools, importlib
        modules = {name: importlib.import_module(name if "." in name else f"cuda.bindings.{name}") for name in
                   ("driver", "nvrtc", "pycuda.driver", "pycuda.compiler")}
        def missing(module, name):
            try:
                functools.reduce(getattr, name.split("."), modules[module])
            except AttributeError:
                return f"{module}.{name}"
        print(*filter(None, (missing(*pair.split(":")) for pair in sys.argv[1:])))
    """
    done = build.run(major, "-c", code, *(f"{module}:{name}" for module, name in names))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def used(source: str) -> set[tuple[str, str]]:
    """(module, dotted name) for what a source takes from the packages: `_driver().X`, `driver.X`, and names as strings."""
    tree = ast.parse(source)
    ours = "cuda.bindings" in source
    found: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root = ast.unparse(node.value)
            if root in ("driver", "_driver()", "self._driver"):
                found.add(("driver" if ours else "pycuda.driver", node.attr))
            elif root in ("nvrtc", "_nvrtc()"):
                found.add(("nvrtc", node.attr))
            elif root == "compiler":
                found.add(("pycuda.compiler", node.attr))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_checked" and isinstance(node.args[0], ast.Constant):
            name = str(node.args[0].value)
            found.add(("nvrtc" if name.startswith("nvrtc") else "driver", name))
    return found


def test_the_walk_itself_finds_names() -> None:
    source = 'm = "cuda.bindings.driver"\ndriver.cuA(1)\n_checked("nvrtcB", 2)\n_driver().C.D\ncompiler.compile(3)'
    assert used(source) == {("driver", "cuA"), ("nvrtc", "nvrtcB"), ("driver", "C"), ("pycuda.compiler", "compile")}
