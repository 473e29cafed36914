"""The work of a graph and the peaks of a device in, the time that no engine can beat out.

    Work + Peaks + batch  ->  bound     ->  Bound: milliseconds, and what binds
    Source + Target       ->  estimate  ->  Estimate: the bound of an engine that is not built, and what to expect of it

The roofline of Williams, Waterman and Patterson (Communications of the ACM 52, 2009): a batch takes as long as its
multiply-adds at the peak of their type, or as reading every weight once from memory, whichever is longer. Weights that fit
into the device's cache may stay there from batch to batch, and are not read. Activations, softmax, norms and launches come
on top, so real engines are slower; how much slower was measured by others on one board, and is an expectation, not a
bound. Knows nothing of ONNX and opens no engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from vitedge.backends import load_backend
from vitedge.backends.build import Source, wanted_float_type
from vitedge.errors import VitEdgeError
from vitedge.specs import Manifest, Peaks, Target, Work
from vitedge.workspace import BUILTIN_TARGETS, load_target

ALIKE = {"fp16": "bf16", "bf16": "fp16"}  # one peak for both
WIDER = {"int8": ("fp16", "bf16", "fp32"), "fp16": ("bf16", "fp32"), "bf16": ("fp16", "fp32"), "fp32": ()}
COMPARABLE = 10  # so many times more or less work than a published point's: beyond that, it tells nothing of a model
STREAMING = "weight streaming"


@dataclass(frozen=True, slots=True)
class Bound:
    """Milliseconds that a batch takes at least. binds: "INT8 compute" or the like, by the peak taken, or "weight streaming".

    notes: a sentence on each type whose peak is unknown, so that a wider one's was taken: then it is no strict bound.
    """

    ms: float
    binds: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an engine that is not built yet would do.

    images_per_s: at most, at the bound. expected_ms: of a batch; None where nothing is known.
    notes: sentences on how it would be built, and what the expectation is derived from.
    """

    target: str
    batch: int
    bound_ms: float
    binds: str
    images_per_s: float
    expected_ms: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """A latency that somebody published. capability: of the GPUs that it tells something about."""

    target: str
    capability: str
    type: str
    ms: float
    work: Work
    source: str


# ViT-B/16 at 224 x 224: of its 17.56 GMAC, 16.73 are in the 48 Linears of the encoder, the others in patches, attention, head.
_LINEARS, _OTHERS = 12 * 197 * 12 * 768**2, 196 * 768**2 + 12 * 2 * 197**2 * 768 + 768 * 1000
_LINEAR_WEIGHTS, _OTHER_WEIGHTS = 12 * 12 * 768**2, 768**2 + 768 * 1000
_README = "github.com/onnxsim/onnxsim, scripts/nvidia/README.md: ViT-B/16, batch 1, Jetson Orin Nano in MAXN_SUPER, TensorRT 10.3"
POINTS = (
    Point(
        "orin-nano-super", "8.7", "int8", 4.92,
        Work({"int8": _LINEARS, "fp16": _OTHERS}, {"int8": _LINEAR_WEIGHTS, "fp16": _OTHER_WEIGHTS}), _README,
    ),
    Point(
        "orin-nano-super", "8.7", "fp16", 5.68,
        Work({"fp16": _LINEARS + _OTHERS}, {"fp16": _LINEAR_WEIGHTS + _OTHER_WEIGHTS}), _README,
    ),
)  # fmt: skip


def bound(work: Work, peaks: Peaks, batch: int = 1) -> Bound:
    """The least time for `batch` images. A VitEdgeError where no peak is known of a type, nor of a wider one."""
    seconds, notes = defaultdict[str, float](float), []  # by the type whose peak is taken
    for kind, macs in ((kind, macs) for kind, macs in work.macs.items() if macs):
        taken = next((wider for wider in (kind, *WIDER[kind]) if wider in peaks.tops), None)
        if taken is None:
            raise VitEdgeError(f"the peak of {kind} is unknown, and of all wider types", hint="set it in [peaks] of the target")
        if taken != kind:
            notes.append(f"the peak of {kind} is unknown: that of {taken} was taken")
        seconds[taken] += 2 * macs * batch / (peaks.tops[taken] * 1e12)
    streamed = work.weight_bytes if work.weight_bytes > peaks.cache_mib * 2**20 else 0
    compute, streaming = sum(seconds.values()), streamed / (peaks.bandwidth_gb_s * 1e9)
    if streaming > compute:
        return Bound(streaming * 1e3, STREAMING, tuple(notes))
    longest = max(seconds, key=lambda kind: seconds[kind], default="no")
    return Bound(compute * 1e3, f"{longest.upper()} compute", tuple(notes))


def engine_bound_ms(manifest: Manifest, batch: int) -> float | None:
    """The bound of an engine on the device that it was built for; None where its work, or a peak of its types, is unknown."""
    if manifest.work is None:
        return None
    backend = load_backend(manifest.backend)
    peaks = manifest.target.peaks or backend.peaks(manifest.target)
    work = manifest.work if backend.TYPED else manifest.work.floats_in(manifest.float_type)
    if peaks is None or any(macs and not {kind, ALIKE.get(kind)} & peaks.tops.keys() for kind, macs in work.macs.items()):
        return None  # a wider type's peak is lower, and would give no bound
    return bound(work, peaks, batch).ms


def estimate(source: Source, work: Work, target: Target, batch: int = 1) -> Estimate:
    """What an engine of the graph `source` with the work `work` would do on `target`, its floats as a build would have them.

    A VitEdgeError where nothing is known of the device.
    """
    backend = load_backend(target.backend)
    peaks = target.peaks or backend.peaks(target)
    if peaks is None:
        raise VitEdgeError(f"no peaks are known of the target {target.name!r}", hint="give it a table [peaks]; engines/README.md")
    wanted = wanted_float_type(source, backend.float_types(target))
    built = work if backend.TYPED and wanted == source.float_type else work.floats_in(wanted)
    typed: tuple[str, ...] = () if built == work else (f"{target.name}: as it would be built, with floats in {wanted}",)
    if backend.TYPED and wanted == "fp32":
        typed = (f"{target.name}: floats are in fp32, as nothing asks for another type; a recipe does, such as fp16",)
    least = bound(built, peaks, batch)
    if least.ms <= 0:
        what = f"there is no bound for {source.card.name}/{source.variant}: no matrix product of it was counted"
        raise VitEdgeError(what, hint="export the model again with this vitedge")
    if batch > target.batch[2]:
        typed += (f"{target.name}: its engines take at most {target.batch[2]} images at once; set batch in it for {batch}",)
    expected, why = _expectation(built, target, least, batch)
    return Estimate(target.name, batch, least.ms, least.binds, batch / least.ms * 1e3, expected, (*typed, *least.notes, why))


def estimate_table(estimates: Sequence[Estimate]) -> Table:
    """One line a target; what is expected stands apart from what is certain."""
    result = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("target", "batch", "bound ms", "bound by", "images/s at most", "expected ms"):
        result.add_column(head, justify="left" if head in ("target", "bound by") else "right")
    for one in estimates:
        expected = "–" if one.expected_ms is None else f"≈ {one.expected_ms:.3g}"
        result.add_row(one.target, str(one.batch), f"{one.bound_ms:.3g}", one.binds, f"{one.images_per_s:,.0f}", expected)
    return result


def _expectation(work: Work, target: Target, least: Bound, batch: int) -> tuple[float | None, str]:
    """The expected milliseconds, if anything was published that tells of them, and a sentence on it."""
    main = max(work.macs, key=lambda kind: work.macs[kind], default="")
    point = next((p for p in POINTS if p.capability == target.capability and p.type == main), None)
    if batch != 1 or point is None:
        return None, f"{target.name}: no expectation, as no measurement of this kind on such a device is published"
    peaks = load_target(str(BUILTIN_TARGETS / f"{point.target}.toml")).peaks  # not a file of the user's by that name
    assert peaks is not None
    published = bound(point.work, peaks).ms
    if not published / COMPARABLE <= least.ms <= published * COMPARABLE:
        return None, (
            f"{target.name}: no expectation, as the bound of {least.ms:.2g} ms is far from the {published:.2g} ms of the model "
            f"that was measured on {point.target}: launches and the layers between products weigh otherwise there"
        )
    factor = point.ms / published
    other = "" if point.target == target.name else ", which is another board of this GPU generation, so take it as rough"
    said = (
        f"{target.name}: expected, not measured: {factor:.2f} × the bound, which is what others measured for "
        f"{main.upper()} on {point.target}{other} ({point.ms} ms; {point.source})"
    )
    return least.ms * factor, said
