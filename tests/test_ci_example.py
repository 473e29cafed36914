"""The workflow for other people's CI: it parses, and its commands are ones that this command line takes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.engines import ROOT
from vitedge import cli

WORKFLOW = ROOT / "docs" / "ci" / "github-actions.yml"


def workflow() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    parsed: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    return parsed


def commands() -> list[list[str]]:
    """Every command line of every step, its continuations joined."""
    steps = workflow()["jobs"]["gate"]["steps"]
    lines = "\n".join(step["run"] for step in steps if "run" in step).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def test_it_has_what_a_workflow_needs() -> None:
    parsed = workflow()
    assert parsed["name"] and parsed[True] == "pull_request"  # YAML 1.1 takes `on` for a truth
    steps = parsed["jobs"]["gate"]["steps"]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    assert all("@v" in step["uses"] for step in steps if "uses" in step)


def test_its_commands_are_taken_as_they_are() -> None:
    typed = [command[1:] for command in commands() if command[0] == "vitedge"]
    assert [name for name, *_ in typed] == ["init", "make", "init", "make", "bench"]
    group = typer.main.get_command(cli.app)
    for name, *arguments in typed:
        command = group.commands[name]  # type: ignore[attr-defined]
        context = command.make_context(name, list(arguments))
        assert context.params, arguments


def test_what_it_names_of_the_environment_is_set() -> None:
    names = {part[1:] for command in commands() for part in command if part.startswith("$") and part[1:].isupper()}
    assert names == set(workflow()["env"])


def test_it_keeps_what_the_last_command_wrote() -> None:
    bench = next(command for command in commands() if command[:2] == ["vitedge", "bench"])
    written = [Path(bench[bench.index(option) + 1]).name for option in ("--report", "--json")]
    kept = workflow()["jobs"]["gate"]["steps"][-1]["with"]["path"].split()
    assert kept == written
