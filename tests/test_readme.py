"""Every command and every Python example in the READMEs runs, in a copy of the repository's workspace."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ELSEWHERE = ("make ", "pip ", ". .venv/bin/activate")  # what leads to the environment that the tests run in


def blocks(readme: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.DOTALL)


def commands(readme: str) -> list[str]:
    """The lines of all shell blocks but those that other checks run."""
    lines = [line for block in blocks(readme, "sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository, in which engines are built afresh."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "engines").mkdir()
    (folder / "calibration").mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def run(arguments: list[str], workspace: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(arguments, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readmes_work_as_they_are_written(workspace: Path) -> None:
    subprocess.run([sys.executable, ROOT / "examples/fashion_mnist/dataset.py"], check=True)
    shell = commands("README.md")
    assert len(shell) >= 6
    for command in [*commands("examples/fashion_mnist/README.md"), *shell, *commands("docs/cameras.md")]:
        run(shlex.split(command), workspace)
    for document in ("README.md", "docs/runtime.md"):
        (example,) = blocks(document, "python")
        assert "Bag" in run([sys.executable, "-c", example], workspace)
    (example,) = blocks("docs/cameras.md", "python")
    said = run([sys.executable, "-c", example], workspace)
    assert len(re.findall(r"^synthetic \d+ \('", said, re.MULTILINE)) == 40 and "processed=40" in said


def test_the_command_table_names_every_command() -> None:
    from vitedge.cli import app

    named = set(re.findall(r"^\| `vitedge (\w+)` \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    assert named == {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def test_every_local_link_leads_somewhere() -> None:
    for readme in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", readme.read_text("utf-8")):
            assert (readme.parent / target).exists(), f"{readme.relative_to(ROOT)} links to {target}"
