"""What docs/jetson.md says to type: on the PC it runs, on the board it parses; the outcome it tells of is the one there is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from tests.engines import ROOT, run_python
from tests.test_readme import blocks
from vitedge import cli
from vitedge.specs import Target, from_dict
from vitedge.workspace import read_toml

PAGE = "docs/jetson.md"
VITEDGE = "import sys; from vitedge.cli import main; sys.argv[0] = 'vitedge'; main()"

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository, with the targets that the page prints."""
    folder = tmp_path_factory.mktemp("jetson")
    (folder / "engines" / "targets").mkdir(parents=True)
    (folder / "calibration").mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    for target in blocks(PAGE, "toml"):
        (folder / target.splitlines()[0].removeprefix("# ")).write_text(target)
    subprocess.run([sys.executable, ROOT / "examples/fashion_mnist/dataset.py"], check=True)
    return folder


def commands(language: str) -> list[str]:
    return [line for block in blocks(PAGE, language) for line in block.splitlines() if line]


def test_what_is_typed_on_the_pc_ends_in_bundles(workspace: Path) -> None:
    make, pack, build = commands("sh")
    done = run_python(VITEDGE, *shlex.split(make)[1:], folder=workspace)
    assert done.returncode == 0, done.stderr
    assert "bundle: bundles/fashion-vit-orin-nano-super.tar.gz" in done.stdout and "nothing was measured" in done.stderr
    assert done.stderr.count("\nprecision ") == 2 and "3 graphs, 64 images, for orin-nano-super" in done.stderr
    done = run_python(VITEDGE, *shlex.split(pack)[1:], folder=workspace)
    assert done.returncode == 0 and (workspace / "orin.tar.gz").is_file(), done.stderr
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    done = run_python(VITEDGE, *shlex.split(build)[1:], folder=workspace)
    assert done.returncode == 0 and (workspace / done.stdout.strip() / "model.engine").is_file(), done.stderr


def test_the_target_on_the_page_is_the_one_of_its_file(workspace: Path) -> None:
    printed = from_dict(Target, {"name": "orin-nano-super", **read_toml(workspace / "engines/targets/orin-nano-super.toml")})
    assert (printed.backend, printed.capability) == ("tensorrt", "8.7")
    path = ROOT / "engines" / "targets" / "orin-nano-super.toml"
    if path.is_file():
        kept = read_toml(path)
        assert {key: kept.get(key) for key in ("backend", "capability", "workspace_mib")} == {
            "backend": printed.backend,
            "capability": printed.capability,
            "workspace_mib": printed.workspace_mib,
        }


def test_what_is_typed_on_the_board_is_understood() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    typed = [shlex.split(line)[1:] for line in commands("bash") if line.startswith(".venv/bin/vitedge ")]
    assert len(typed) >= 2
    for name, *arguments in typed:
        group.commands[name].make_context(name, arguments)  # a UsageError where an option is unknown


def test_what_goes_wrong_is_said_in_the_words_of_the_code() -> None:
    """The first column quotes messages, up to NumPy's and the compiler's: what is fixed in them stands in the sources."""
    files = [*ROOT.glob("vitedge/**/*.py"), ROOT / "vitedge/bundle/build.sh"]
    sources = " ".join("".join(path.read_text("utf-8") for path in files).split())
    text = (ROOT / PAGE).read_text("utf-8")
    quoted = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(quoted) >= 7
    for message in quoted:
        for part in re.split(r"\.\.\.|[0-9][0-9.]*|tensorrt|Thor", message):
            if len(part.strip()) > 3 and not message.startswith("A module that was compiled"):
                assert part.strip(" ,:") in sources, part
    for step in ("checking the files", "making an environment in .venv", "installing packages", "examining this machine"):
        assert f"`{step}`" in text and f"step '{step}" in sources
    assert "**No engine of this repository has been built or run on a Jetson yet.**" in text
