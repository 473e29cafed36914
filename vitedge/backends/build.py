"""An ONNX file and a Target in, an engine directory out.

    engines/<model>/<variant>-<key>/   the plan as the backend wrote it, manifest.json, labels.txt, build.log

The key is a hash of the ONNX file, the target, the backend's version and the float type: a whole engine of that name is
current, unless this machine could run one and not that one. Whatever stops a build half-way, a directory of that name is
either whole or absent; of a build that failed, the vendor's log stays beside it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np

from vitedge.backends import BackendModule, Progress, Refitting, Session, load_backend, this_platform
from vitedge.backends.metadata import count_operators, read_metadata
from vitedge.errors import BuildError, EngineError, ModelError, VitEdgeError
from vitedge.specs import FloatType, Manifest, ModelCard, Recipe, Target, Work, from_dict, require_name, to_dict
from vitedge.workspace import content_key, read_json, sha256, short_path, staged, write_file, write_json


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What the metadata of an ONNX file says about it. float_type: of the types in its graph. work: None where not counted."""

    card: ModelCard
    variant: str
    recipe: Recipe | None
    float_type: FloatType
    work: Work | None = None


def read_source(onnx: Path) -> Source:
    """The card, variant, recipe and float type in an ONNX file; a ModelError where vitedge did not write it."""
    entries = read_metadata(onnx)
    try:
        card, variant = json.loads(entries["vitedge.card"]), entries["vitedge.variant"]
        recipe, work = (json.loads(entries.get(f"vitedge.{key}", "null")) for key in ("recipe", "work"))
    except (KeyError, ValueError) as error:
        raise ModelError(f"{onnx} was not exported by vitedge", hint="start from the model: vitedge export MODEL") from error
    try:
        require_name(variant)
    except VitEdgeError as error:
        raise ModelError(f"the variant in {onnx} is no name: {error}", hint="export and quantize it again") from error
    typed = cast(FloatType, entries.get("vitedge.float_type", "fp32"))
    return Source(
        from_dict(ModelCard, card),
        variant,
        from_dict(Recipe, recipe) if recipe else None,
        typed,
        from_dict(Work, work) if work else None,
    )


def is_readable(graph: Path) -> bool:
    """Whether an ONNX file is there and whole."""
    with suppress(VitEdgeError):
        read_source(graph)
        return True
    return False


@dataclasses.dataclass(frozen=True, slots=True)
class Build:
    """An engine that may be built: all that decides its name, and the directory of that name. target: as resolved here."""

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

    A precision that the graph or the device does not have is an EngineError: nothing is downgraded silently.
    """
    read_source(onnx)  # what is no graph of ours is said first
    backend = load_backend(target.backend)
    target, version = backend.resolve(target), backend.version()
    source, float_type = check_graph(onnx, target)
    digest = sha256(onnx)
    key = content_key(digest, to_dict(dataclasses.replace(target, peaks=None, streams=1)), version, float_type)
    folder = engines / source.card.name / f"{source.variant}-{key}"
    return Build(onnx, digest, source, target, backend, version, float_type, folder)


def check_graph(onnx: Path, target: Target) -> tuple[Source, FloatType]:
    """What an ONNX file is, and the float type that its engine for `target` computes in; EngineError where they do not fit."""
    source = read_source(onnx)
    _check_quantized(onnx, source)
    return source, _float_type(onnx, source, target)


def build_engine(onnx: Path, target: Target, engines: Path) -> Path:
    """Build the engine, unless it is there already and fresh, and return its directory."""
    build = prepare_build(onnx, target, engines)
    if is_fresh(build):
        update_target(build)
    else:
        run_build(build)
    return build.folder


def is_fresh(build: Build) -> bool:
    """Whether the engine is there and whole, and one that opens here, if any for its target does.

    On another platform, another model of GPU or an older driver, the same ONNX file and target have the same name.
    """
    whole = is_whole(build.folder)
    try:
        if whole and build.backend.runs_here(build.target):
            build.backend.check(read_manifest(build.folder))
    except EngineError:
        return False
    return whole


def update_target(build: Build) -> None:
    """Let a fresh engine's manifest tell the target as it is now: peaks may be others, which are no part of the engine."""
    manifest = read_manifest(build.folder)
    if manifest.target != build.target:
        with suppress(VitEdgeError):  # in a workspace that is not ours to write
            write_json(build.folder / "manifest.json", to_dict(dataclasses.replace(manifest, target=build.target)))


def run_build(build: Build, progress: Progress = lambda phase, fraction: None) -> None:
    """Build the engine in place of what its directory may hold.

    An engine for this machine answers once before it is kept. progress: told the phase, and how much of the build is done.
    """
    _write(build, lambda folder: build.backend.build(build.onnx, build.target, build.float_type, folder, progress))


def refit_engine(engine: Path, onnx: Path, engines: Path) -> Path:
    """The engine in the directory `engine` with the weights of `onnx`, a graph of the same structure, as a new directory.

    Takes seconds where a build takes minutes. An EngineError where the backend or the engine's target does not allow it, or
    where the plan is damaged. Whether the new engine's weights can be replaced in turn, its target says.
    """
    manifest = read_manifest(engine)
    backend = load_backend(manifest.backend)
    if not isinstance(backend, Refitting):
        hint = "build it: vitedge build takes seconds there"
        raise EngineError(f"{manifest.backend} cannot replace the weights of an engine", hint=hint)
    if not manifest.target.refit:
        hint = "set refit = true in its target, and build it once more"
        raise EngineError(f"the weights of {engine} cannot be replaced: its target did not ask for that", hint=hint)
    if plan_sha256(engine, backend.PLAN) != manifest.plan_sha256:
        what = f"{engine} is damaged: its plan is not the one that its manifest describes"
        raise EngineError(what, hint="it was cut short or changed; build it again, or copy it again")
    build = prepare_build(onnx, dataclasses.replace(manifest.target, refit=backend.refits_again()), engines)
    if (build.source.variant, build.float_type) != (manifest.variant, manifest.float_type):
        given, wanted = f"{build.source.variant} in {build.float_type}", f"{manifest.variant} in {manifest.float_type}"
        raise EngineError(f"{onnx} is {given}, but the engine is {wanted}", hint="make the graph with the same recipe")
    backend.check(manifest)
    _write(build, lambda folder: backend.refit(engine, manifest.target, onnx, folder))
    return build.folder


def _write(build: Build, make_plan: Callable[[Path], str]) -> None:
    """Put an engine in place once `make_plan`, which returns the vendor's log, has written its plan."""
    failed = build.folder.with_name(f"{build.folder.name}.failed.log")
    try:
        with staged(build.folder) as temporary:
            temporary.mkdir()
            started = time.perf_counter()
            _describe(temporary, build, make_plan(temporary), started)
    except BuildError as error:
        write_file(failed, error.log)
        raise EngineError(str(error), hint=f"{error.hint}; all that was said is in {short_path(failed)}") from error
    failed.unlink(missing_ok=True)


def _describe(folder: Path, build: Build, log: str, started: float) -> None:
    """Try the plan in `folder`, and write its manifest, labels and log beside it."""
    source, target, backend = build.source, build.target, build.backend
    runs = backend.runs_here(target)
    if runs:
        _check_answer(backend.open(folder, source.card, target, build.float_type), target, build.onnx)
    seconds = time.perf_counter() - started
    manifest = Manifest(
        card=source.card, variant=source.variant, recipe=source.recipe, target=target, float_type=build.float_type,
        onnx_sha256=build.onnx_sha256, plan_sha256=plan_sha256(folder, backend.PLAN), backend=target.backend,
        backend_version=build.backend_version, device=backend.device(target), built_at=_now(),
        platform=this_platform(), driver=backend.driver(), work=source.work,
    )  # fmt: skip
    write_json(folder / "manifest.json", to_dict(manifest))
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in source.card.labels), "utf-8")
    made_by = f"{target.backend} {build.backend_version} {'on' if runs else 'for'} {manifest.device}"
    untested = "" if runs else "; this machine cannot run it, so no answer of it was checked"
    summary = f"{build.onnx.name} by {made_by}: {seconds:.1f} s, float type {build.float_type}{untested}\n"
    (folder / "build.log").write_text(summary + log, "utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an engine directory."""
    if not (folder / "manifest.json").is_file():
        hint = "an engine is a directory such as engines/<model>/int8-0123456789ab, made by `vitedge build`"
        raise EngineError(f"{folder} is not an engine: it has no manifest.json", hint=hint)
    try:
        return from_dict(Manifest, read_json(folder / "manifest.json"))
    except VitEdgeError as error:
        raise EngineError(f"{folder}/manifest.json is not readable: {error}", hint="build the engine again") from error


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds an engine whose plan is the one that its manifest describes."""
    try:
        manifest = read_manifest(folder)
        return plan_sha256(folder, load_backend(manifest.backend).PLAN) == manifest.plan_sha256
    except VitEdgeError:
        return False


def plan_sha256(folder: Path, names: tuple[str, ...]) -> str:
    """One hash over the files of a plan."""
    return hashlib.sha256("".join(sha256(folder / name) for name in names).encode()).hexdigest()


def _check_quantized(onnx: Path, source: Source) -> None:
    """An ONNX file whose recipe quantizes must hold Q/DQ: INT8 is never made of a float graph by a builder's flag."""
    if source.recipe is None or source.recipe.method == "none" or source.recipe.skip:  # which may well name all of them
        return
    operators = count_operators(onnx)
    if not operators["QuantizeLinear"] and operators["DequantizeLinear"] < 2:  # the engine's own int8 input has one
        raise EngineError(
            f"{onnx} calls itself {source.variant}, but is a float graph: it holds no QuantizeLinear",
            hint="quantize it first: vitedge calibrate, then vitedge quantize",
        )


def _float_type(onnx: Path, source: Source, target: Target) -> FloatType:
    """What the layers that stay in floating point will compute in."""
    backend = load_backend(target.backend)
    native, where = backend.float_types(target), f"{target.backend} on {backend.device(target)}"
    wanted = wanted_float_type(source, native)
    check_untyped(onnx, source, target)
    if wanted not in native:
        raise EngineError(
            f"the recipe {source.variant!r} asks for {wanted}, which {where} does not compute in",
            hint=f"it computes in {' and '.join(native)}; set float_type in the recipe",
        )
    if backend.TYPED and source.float_type != wanted:
        raise EngineError(
            f"{target.backend} computes in the types of the graph, which are {source.float_type}, but the recipe wants {wanted}",
            hint=f'give real images with --images, to convert it on; or set float_type = "{source.float_type}" in the recipe',
        )
    return wanted


def check_untyped(onnx: Path, source: Source, target: Target) -> None:
    """Raise an EngineError where the graph has another float type than FP32, and the backend does not go by the graph's."""
    if not load_backend(target.backend).TYPED and source.float_type != "fp32":
        hint = f"{target.backend} takes the one that it was made from"
        raise EngineError(f"the graph {onnx} is in {source.float_type}, for GPUs", hint=hint)


def wanted_float_type(source: Source, native: tuple[FloatType, ...]) -> FloatType:
    """The float type that a recipe asks for, on a device that computes in those of `native`."""
    wanted = source.recipe.float_type if source.recipe else "fp32"
    return native[0] if wanted == "auto" else wanted


def _check_answer(session: Session, target: Target, onnx: Path) -> None:
    """Run the new plan once: what the device cannot run, and weights that are not numbers, are found before it is kept."""
    try:
        finite = bool(np.isfinite(session.run(target.batch[1])).all())
    finally:
        session.close()
    if not finite:
        hint = "is the checkpoint whole? Weights that are NaN, or that overflow, give this"
        raise EngineError(f"the engine of {onnx} answers a blank image with NaN or infinity", hint=hint)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
