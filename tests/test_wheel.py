"""The wheel holds the package and nothing beside it."""

from __future__ import annotations

import email
import re
import zipfile
from pathlib import Path

import pytest

import vitedge
from tests.engines import ROOT

PACKAGE = ROOT / "vitedge"


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    info = f"vitedge-{vitedge.__version__}.dist-info/METADATA"
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(info))


def test_it_is_pure_python_and_named_after_the_version(wheel: Path) -> None:
    assert wheel.name == f"vitedge-{vitedge.__version__}-py3-none-any.whl"


def test_it_holds_vitedge_alone(names: set[str]) -> None:
    """A top-level calibration/, engines/ or tests/ would overwrite other people's in site-packages."""
    assert {name.partition("/")[0] for name in names} == {"vitedge", f"vitedge-{vitedge.__version__}.dist-info"}


def test_it_holds_every_file_of_the_package_unchanged(wheel: Path, names: set[str]) -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    packaged = {path.relative_to(ROOT).as_posix(): path for path in files}
    assert {name for name in names if name.startswith("vitedge/")} == set(packaged)
    assert {"vitedge/py.typed", "vitedge/doctor.onnx", "vitedge/template/engines/targets/cpu.toml"} <= set(packaged)
    assert "vitedge/backends/kernels/patchify.cu" in packaged
    archive = zipfile.ZipFile(wheel)
    assert [name for name, path in packaged.items() if archive.read(name) != path.read_bytes()] == []


def test_it_brings_the_command_and_the_licence(wheel: Path, names: set[str]) -> None:
    info = f"vitedge-{vitedge.__version__}.dist-info"
    assert "vitedge = vitedge.cli:main" in zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in names


def test_without_an_extra_it_asks_for_no_heavy_package(metadata: email.message.Message) -> None:
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">")[0].strip() for line in always} == {"numpy", "pillow", "typer", "rich", "tomli"}


def test_every_extra_that_an_error_names_exists(metadata: email.message.Message) -> None:
    """The hint of a MissingPackageError is a command that has to work."""
    sources = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"vitedge\\*\[(\w+)\]", sources))
    named |= set(re.findall(r'(?:MissingPackageError|import_package)\("[\w-]+", "(\w+)"\)', sources))
    named |= set(re.findall(r'PACKAGE, EXTRA = "\w+", "(\w+)"', sources))
    assert {"cpu", "compile", "camera", "hf", "timm", "torchvision"} <= named <= set(metadata.get_all("Provides-Extra", []))


def test_the_python_it_asks_for_is_the_one_the_tools_check(metadata: email.message.Message) -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert metadata["Requires-Python"] == ">=3.10"
    assert 'python_version = "3.10"' in text and 'target-version = "py310"' in text
