"""Options and arguments that several commands take, what they say in --help, and what is refused before any work is done."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vitedge.errors import VitEdgeError
from vitedge.workspace import known_recipes, known_targets, writing


def complete_recipe(typed: str) -> list[str]:
    """For the shell: the recipes of the workspace."""
    return [name for name in known_recipes() if name.startswith(typed)]


def complete_target(typed: str) -> list[str]:
    """For the shell: the targets of the workspace."""
    return [name for name in known_targets() if name.startswith(typed)]


MODEL = "path/file.py:factory, hf:ORG/NAME, timm:NAME or torchvision:NAME."
Model = Annotated[str, typer.Argument(help=MODEL, show_default=False)]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights to load: .safetensors, or .pth holding a state dict.")]
Preparation = Annotated[Path | None, typer.Option("--preprocess", help="TOML: size, mean, std, ... in place of the model's own.")]
Images = Annotated[
    Path,
    typer.Option(
        help="Folder of real images, searched at any depth, sub-folders are labels; or tar or parquet files.",
        show_default=False,
    ),
]
JudgeImages = Annotated[
    Path | None,
    typer.Option("--judge", help="Images to measure accuracy on, if not those of --images; --labels is then of these."),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="Table of labels, CSV or JSON, that goes before the sub-folders; or the column of labels in parquet files. "
        "\\[default: labels.csv, labels.json, ... in the folder]",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(help="A recipe: int8, bf16, calibration/recipes/NAME.toml, or a .toml file.", autocompletion=complete_recipe),
]
TargetName = Annotated[
    str, typer.Option(help="A target: cpu, engines/targets/NAME.toml, or a .toml file.", autocompletion=complete_target)
]
Backend = Annotated[
    str | None, typer.Option(help="A backend in place of the target's own: openvino, onnxruntime, tensorrt, tensorrt-rtx.")
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE",
        help="Spread the images over Ray workers: `local` for one a core, a number of them, or the address of a cluster.",
        show_default=False,
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the measurements to this file.")]


def some_seconds(given: float) -> float:
    """A time that something can be measured for; any other is a VitEdgeError."""
    if not 0 < given < math.inf:
        raise VitEdgeError(f"engines are timed for some seconds, not for {given:g}", hint="give --seconds a number above 0")
    return given


def some_tolerance(given: float) -> float:
    """A difference that may be asked for; any other is a VitEdgeError, before minutes are spent on an export."""
    if not given >= 0:  # also when it is NaN
        raise VitEdgeError(f"no difference is within {given:g}", hint="give --tolerance 0, or more")
    return given


def require_other(*outputs: Path | None, of: Sequence[Path | None]) -> None:
    """Refuse an output that is one of the inputs, lies in a folder that is one, is named twice or cannot be written."""
    inputs = [path.resolve() for path in of if path and path.exists()]
    places = set[Path]()
    for output in filter(None, outputs):
        with writing(output):
            place, there = output.resolve(), output.exists()
        if there and any(path in (place, *place.parents) for path in inputs):
            raise VitEdgeError(
                f"{output} is an input of this command and would be overwritten", hint="give another file to write"
            )
        if place in places and (output.is_file() or not there):  # a device takes several
            raise VitEdgeError(f"{output} is to hold two outputs", hint="give each its own file to write")
        places.add(place)
        _require_writable(output)


def _require_writable(output: Path) -> None:
    """Raise VitEdgeError where a file certainly cannot be written: worth knowing before anything is measured."""
    hint = "give another file to write"
    if output.is_dir():
        raise VitEdgeError(f"cannot write {output}: it is a folder", hint=hint)
    folder = next((parent for parent in output.absolute().parents if parent.exists()), Path())
    if not folder.is_dir():
        raise VitEdgeError(f"cannot write {output}: {folder} is not a folder", hint=hint)
    if not os.access(output if output.exists() and not output.is_file() else folder, os.W_OK):
        raise VitEdgeError(f"cannot write {output}: {folder} is not yours to write to", hint=hint)
