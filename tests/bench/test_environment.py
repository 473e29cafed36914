"""What the facts about a machine hold, and what they must not."""

import platform

import pytest

from vitedge.bench.environment import environment


def test_the_environment_says_where_and_with_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/vitedge", "bench", "my engine", "\udcff"])
    facts = environment()
    assert {"machine", "cores", "system", "python", "numpy", "date", "command"} <= facts.keys()
    assert all(facts.values())
    assert facts["command"] == "vitedge bench 'my engine' '?'"
    assert facts["system"] == f"{platform.system()} {platform.machine()}"  # not the build of the kernel
