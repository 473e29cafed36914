"""An ONNX file and a Target in, an engine directory out.

    engines/<model>/<variant>-<key>/   the plan as the backend wrote it, manifest.json, labels.txt, build.log

The key is a hash of the ONNX file, the target, the backend's version and the float type: a whole engine of that name is
current.
Whatever stops a build half-way, a directory of that name is either whole or absent.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from vitedge.backends import BackendModule, Session, load_backend
from vitedge.backends.metadata import read_metadata
from vitedge.errors import EngineError, ModelError, VitEdgeError
from vitedge.specs import FloatType, Manifest, ModelCard, Recipe, Target, from_dict, to_dict
from vitedge.workspace import content_key, read_json, sha256, staged, write_json


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What the metadata of an ONNX file says about it."""

    card: ModelCard
    variant: str
    recipe: Recipe | None


def read_source(onnx: Path) -> Source:
    """The card, variant and recipe in an ONNX file; a ModelError where vitedge did not write it."""
    entries = read_metadata(onnx)
    try:
        card, variant = json.loads(entries["vitedge.card"]), entries["vitedge.variant"]
        recipe = json.loads(entries.get("vitedge.recipe", "null"))
    except (KeyError, ValueError) as error:
        raise ModelError(f"{onnx} was not exported by vitedge", hint="start from the model: vitedge export MODEL") from error
    return Source(from_dict(ModelCard, card), variant, from_dict(Recipe, recipe) if recipe else None)


@dataclasses.dataclass(frozen=True, slots=True)
class Build:
    """An engine that may be built: all that decides its name, and the directory of that name."""

    onnx: Path
    onnx_sha256: str
    source: Source
    target: Target
    backend: BackendModule
    backend_version: str
    float_type: FloatType
    folder: Path


def prepare_build(onnx: Path, target: Target, engines: Path) -> Build:
    """What the engine of `onnx` for `target` is made from, and where it belongs under the folder `engines`.

    A float type that the device cannot compute in is an EngineError: nothing is downgraded silently.
    """
    source, backend = read_source(onnx), load_backend(target.backend)
    digest, version, float_type = sha256(onnx), backend.version(), _float_type(source, backend, target)
    key = content_key(digest, to_dict(target), version, float_type)
    folder = engines / source.card.name / f"{source.variant}-{key}"
    return Build(onnx, digest, source, target, backend, version, float_type, folder)


def build_engine(onnx: Path, target: Target, engines: Path) -> Path:
    """Build the engine, unless it is there already and whole, and return its directory."""
    build = prepare_build(onnx, target, engines)
    if not is_whole(build.folder):
        run_build(build)
    return build.folder


def run_build(build: Build) -> None:
    """Build the engine in place of what its directory may hold."""
    source, target, backend = build.source, build.target, build.backend
    with staged(build.folder) as temporary:
        temporary.mkdir()
        started = time.perf_counter()
        backend.build(build.onnx, target, build.float_type, temporary)
        _check_answer(backend.open(temporary, source.card, target, build.float_type), target, build.onnx)
        seconds = time.perf_counter() - started
        manifest = Manifest(
            card=source.card, variant=source.variant, recipe=source.recipe, target=target, float_type=build.float_type,
            onnx_sha256=build.onnx_sha256, plan_sha256=plan_sha256(temporary, backend.PLAN), backend=target.backend,
            backend_version=build.backend_version, device=backend.device(), built_at=_now(),
        )  # fmt: skip
        write_json(temporary / "manifest.json", to_dict(manifest))
        (temporary / "labels.txt").write_text("".join(f"{label}\n" for label in source.card.labels), "utf-8")
        made_by = f"{target.backend} {build.backend_version} on {manifest.device}"
        log = f"{build.onnx.name} by {made_by}: {seconds:.1f} s, float type {build.float_type}\n"
        (temporary / "build.log").write_text(log, "utf-8")


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds an engine whose plan is the one that its manifest describes."""
    try:
        manifest = from_dict(Manifest, read_json(folder / "manifest.json"))
        return plan_sha256(folder, load_backend(manifest.backend).PLAN) == manifest.plan_sha256
    except VitEdgeError:
        return False


def plan_sha256(folder: Path, names: tuple[str, ...]) -> str:
    """One hash over the files of a plan."""
    return hashlib.sha256("".join(sha256(folder / name) for name in names).encode()).hexdigest()


def _float_type(source: Source, backend: BackendModule, target: Target) -> FloatType:
    """What the layers that stay in floating point will compute in."""
    wanted = source.recipe.float_type if source.recipe else "fp32"
    native = backend.float_types()
    if wanted == "auto":
        return native[0]
    if wanted not in native:
        raise EngineError(
            f"the recipe {source.variant!r} asks for {wanted}, which {target.backend} on {backend.device()} does not compute in",
            hint=f"it computes in {' and '.join(native)}; set float_type in the recipe",
        )
    return wanted


def _check_answer(session: Session, target: Target, onnx: Path) -> None:
    """Run the new plan once: what the device cannot run, and weights that are not numbers, are found before it is kept."""
    answer = session.run(target.batch[1])
    finite = bool(np.isfinite(answer).all())
    session.close()
    if not finite:
        hint = "is the checkpoint whole? Weights that are NaN, or that overflow, give this"
        raise EngineError(f"the engine of {onnx} answers a blank image with NaN or infinity", hint=hint)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
