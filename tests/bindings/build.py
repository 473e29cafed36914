"""Builds, in a process of its own, with whatever bindings are there: prints what came of it as JSON.

    python -m tests.bindings.build FOLDER TARGET ONNX...   ->  [{"plan": bytes of FOLDER/<name of ONNX>/model.engine, ...}, ...]

With STOP set, the first word of progress raises KeyboardInterrupt, as Ctrl-C does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.bindings import recorder
from vitedge.backends.tensorrt import TENSORRT
from vitedge.errors import BuildError, VitEdgeError
from vitedge.specs import Target, from_dict


def build(onnx: Path, target: Target, folder: Path) -> dict[str, Any]:
    """The outcome of one build: the plan's size, the log, each word of progress, the calls; or the error."""
    progress: list[tuple[str, float]] = []

    def tell(phase: str, fraction: float) -> None:
        progress.append((phase, fraction))
        if "STOP" in os.environ:
            raise KeyboardInterrupt

    folder.mkdir(parents=True)
    before = recorder.RELAY.relay_calls()
    outcome: dict[str, Any] = {"plan": None, "error": None, "hint": None, "log": ""}
    try:
        outcome["log"] = TENSORRT.build(onnx, target, "fp32", folder, tell)
        outcome["plan"] = (folder / TENSORRT.PLAN[0]).stat().st_size
    except KeyboardInterrupt:
        outcome["error"] = "KeyboardInterrupt"
    except VitEdgeError as error:
        outcome |= {"error": str(error), "hint": error.hint, "log": error.log if isinstance(error, BuildError) else ""}
    return outcome | {"version": TENSORRT.version(), "progress": progress, "calls": recorder.calls(before)}


if __name__ == "__main__":
    where, asked, *graphs = sys.argv[1:]
    wanted = from_dict(Target, json.loads(asked))
    print(json.dumps([build(path, wanted, Path(where) / path.stem) for path in map(Path, graphs)]))
