"""What the facts about a machine hold, and what they must not."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vitedge.bench import environment as module
from vitedge.bench.environment import environment


def test_the_environment_says_where_and_with_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/vitedge", "bench", "my engine", "\udcff"])
    facts = environment()
    assert {"machine", "cores", "system", "python", "numpy", "date", "command"} <= facts.keys()
    assert all(facts.values())
    assert facts["command"] == "vitedge bench 'my engine' '?'"
    assert facts["system"] == f"{platform.system()} {platform.machine()}"  # not the build of the kernel


def test_the_clock_is_told_where_linux_tells_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CPUFREQ", tmp_path)
    assert "clock" not in environment()
    (tmp_path / "scaling_max_freq").write_text("2900000\n")
    (tmp_path / "scaling_governor").write_text("schedutil\n")
    assert environment()["clock"] == "up to 2900 MHz, schedutil"


def test_the_commit_is_that_of_the_folder_and_says_where_files_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "commit" not in environment()
    (tmp_path / "model.py").write_text("1")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "model.py"), (*who, "commit", "-q", "-m", "x")):
        subprocess.run(["git", *words], check=True)
    clean = environment()["commit"]
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "model.py").write_text("2")
    assert environment()["commit"] == f"{clean}+"
