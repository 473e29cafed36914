"""Engines in, where their time goes out: layer by layer, by what a layer is for, and what kept INT8 from being faster.

    engine  ->  Profile of its backend  ->  every layer placed in a block of the model  ->  findings
    two explanations  ->  what the second gains or loses against the first, part by part

Where a layer belongs is read off the names of the ONNX nodes that it was made from, which are those of the torch modules, and
off the order: in a block, Linears before the attention are q/k/v, the first one behind it is the projection and the last one
fc2. Knows nothing of vendors and prints nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitedge.backends import load_backend
from vitedge.backends.layers import QDQ, Layer, Profile, is_merge, merges, module, operator
from vitedge.errors import EngineError
from vitedge.runtime.engine import open_engine
from vitedge.specs import Manifest

PARTS = ("patch embedding", "q/k/v", "attention", "proj", "merging", "norm", "fc1", "gelu", "fc2", "head", "decoder", "other")
BETWEEN = "between layers"
WEIGHTED = ("linear", "convolution")
INTEGER = ("linear", "convolution", "attention", "product")  # kinds that an integer input makes faster
ROUNDS = 3  # of the measurement, engines in turns; the quietest of each is kept
NAMED = 5  # of several, so many are named
COSTLIEST = 5


@dataclass(frozen=True, slots=True)
class Placed:
    """A layer, the block of the model it belongs to ("blocks.3", or what comes before or behind all), and its part in it."""

    layer: Layer
    block: str
    part: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where the time of an engine goes, at a batch size. between_ms and the times of all layers add up to profiled_ms.

    profiled_ms: of a call whose layers are timed. plain_ms: of a call as it is. findings: sentences, the weightiest first.
    """

    name: str
    variant: str
    backend: str
    device: str
    float_type: str
    batch: int
    calls: int
    profiled_ms: float
    plain_ms: float
    between_ms: float
    layers: tuple[Placed, ...]
    findings: tuple[str, ...]

    def total_ms(self, wanted: Callable[[Placed], bool]) -> float:
        """What the layers that are `wanted` take together."""
        return sum(placed.layer.ms for placed in self.layers if wanted(placed))

    def share(self, ms: float) -> float:
        """Percent of the call."""
        return 100 * ms / self.profiled_ms


@dataclass(frozen=True, slots=True)
class Difference:
    """One part of the model in two engines: milliseconds, and the precisions of its layers there."""

    part: str
    first_ms: float
    second_ms: float
    first_precision: str
    second_precision: str

    @property
    def saved_ms(self) -> float:
        """What the second engine gains; negative where it loses."""
        return self.first_ms - self.second_ms

    @property
    def ratio(self) -> float | None:
        """How many times faster the second is; None where it takes no time there."""
        return self.first_ms / self.second_ms if self.second_ms > 0 else None


def explain(
    folders: Sequence[Path], batch: int | None, seconds: float, progress: Callable[[float], object] = lambda done: None
) -> list[Explanation]:
    """Time the layers of each engine for `seconds` in all, in turns, at `batch` (default: what it was built for best).

    Raises EngineError where an engine does not open, does not take the batch, or its backend does not time layers.
    """
    engines = [_look(folder, batch) for folder in folders]
    if len(models := {manifest.card.name for manifest, _ in engines}) > 1:
        what = f"{' and '.join(sorted(models))} are different models, whose layers cannot be set side by side"
        raise EngineError(what, hint="explain them one by one, or two engines of one model")
    best: dict[int, Profile] = {}
    for turn in range(ROUNDS * len(engines)):
        index = turn % len(engines)
        manifest, rows = engines[index]
        profile = load_backend(manifest.backend).layers(
            folders[index], manifest.card, manifest.target, manifest.float_type, rows, seconds / ROUNDS
        )
        if index not in best or profile.profiled_ms < best[index].profiled_ms:
            best[index] = profile
        progress((turn + 1) / ROUNDS / len(engines))
    return [
        make_explanation(folder, manifest, len(rows), best[index])
        for index, (folder, (manifest, rows)) in enumerate(zip(folders, engines, strict=True))
    ]


def make_explanation(folder: Path, manifest: Manifest, batch: int, profile: Profile) -> Explanation:
    """What a profile of the engine in `folder` says."""
    placed = place(profile.layers)
    return Explanation(
        name=f"{manifest.card.name}/{folder.name}",
        variant=manifest.variant,
        backend=f"{manifest.backend} {manifest.backend_version}",
        device=manifest.device,
        float_type=manifest.float_type,
        batch=batch,
        calls=profile.calls,
        profiled_ms=profile.profiled_ms,
        plain_ms=profile.plain_ms,
        between_ms=profile.between_ms,
        layers=placed,
        findings=tuple(_findings(placed, profile)),
    )


def _look(folder: Path, batch: int | None) -> tuple[Manifest, NDArray[np.generic]]:
    """The manifest of an engine that opens here, and something to run it on: values spread like those of photographs."""
    with open_engine(folder) as engine:
        manifest, count = engine.manifest, batch or engine.manifest.target.batch[1]
        low, _, high = manifest.target.batch
        if not low <= count <= high:
            raise EngineError(f"{folder} was built for {low} to {high} images at once, not {count}", hint="give another --batch")
        shape, dtype = (count, *engine.input.shape[1:]), engine.input.dtype
    noise = np.random.default_rng(0).normal(0, 64, shape)
    return manifest, (np.clip(noise, -128, 127) + (128 if dtype == np.uint8 else 0)).astype(dtype)


# Where a layer belongs


def place(layers: Sequence[Layer]) -> tuple[Placed, ...]:
    """Every layer with its block and part, in the order they run."""
    blocks = _blocks(layers)
    inside = [_block(layer, blocks) for layer in layers]
    known = [index for index, block in enumerate(inside) if block]
    if not known:  # there is no attention to go by
        return tuple(Placed(layer, "model", "norm" if layer.kind == "norm" else "other") for layer in layers)
    first, last = known[0], known[-1]
    behind = [layer for layer in layers[last + 1 :] if layer.kind in WEIGHTED]
    end = "decoder" if len(behind) > 1 else "head"
    for index in range(len(layers)):
        if not inside[index]:  # made up by the backend, or named after a tensor: it belongs to what runs before it
            inside[index] = "patch embedding" if index < first else end if index > last else inside[index - 1]
    parts: dict[int, str] = {}
    for block in dict.fromkeys(inside):
        members = [index for index, name in enumerate(inside) if name == block]
        named = block in blocks
        parts.update(zip(members, _parts([layers[i] for i in members]) if named else [block] * len(members), strict=True))
    return tuple(
        Placed(layer, inside[index], "norm" if layer.kind == "norm" else parts[index]) for index, layer in enumerate(layers)
    )


def _blocks(layers: Iterable[Layer]) -> list[str]:
    """The modules that hold an attention each, such as "blocks.3": down to the last number in the name of the attention."""
    nodes = [node for layer in layers for node in layer.origins if operator(node) in ("Softmax", "Attention")]
    found = []
    for node in nodes:
        steps = module(node).split(".")
        numbered = [index for index, step in enumerate(steps) if re.search(r"\d$", step)]
        found.append(steps[: numbered[-1] + 1] if numbered else steps[:-1] or steps)
    while len(found) > 1 and len({steps[-1] for steps in found}) == 1 and min(map(len, found)) > 1:
        found = [steps[:-1] for steps in found]  # "layers.0.1", "layers.1.1", ...: the last number counts parts, not blocks
    return list(dict.fromkeys(".".join(steps) for steps in found))


def _block(layer: Layer, blocks: Sequence[str]) -> str:
    """The block that a layer's Linears, or else its other nodes, belong to; "" if to none.

    Nodes of a merge come last: what they find out, an attention of each later block reads.
    """
    for node in (*layer.linears, *sorted(layer.origins, key=is_merge)):
        for block in blocks:
            if node == block or node.startswith((f"{block}.", f"{block}/")):
                return block
    return ""


def _parts(layers: Sequence[Layer]) -> list[str]:
    """What each layer of a block is for."""
    linears = [index for index, layer in enumerate(layers) if layer.kind in WEIGHTED]
    core = [i for i, layer in enumerate(layers) if layer.kind in ("attention", "product", "softmax") and not merges(layer)]
    middle = core[0] if core else len(layers)
    ahead, behind = [i for i in linears if i < middle], [i for i in linears if i > middle]
    parts = dict.fromkeys(ahead, "q/k/v")
    if behind:
        parts |= dict.fromkeys(behind[1:-1], "fc1") | {behind[-1]: "fc2", behind[0]: "proj"}
    span = range(ahead[0] if ahead else middle, behind[0] if behind else (core[-1] + 1 if core else middle))
    return [
        "merging"
        if merges(layer)
        else parts.get(index) or ("attention" if index in span else "gelu" if layer.kind == "activation" else "other")
        for index, layer in enumerate(layers)
    ]


# What there is to say


def _findings(placed: Sequence[Placed], profile: Profile) -> Iterable[str]:
    """One sentence a finding, with its numbers."""
    layers = [entry.layer for entry in placed]
    tell = _Teller(profile)
    yield from _linears(layers, tell)
    blind = [layer for layer in layers if layer.precision == "unknown"]
    if blind:
        yield f"Of {_count(blind, 'layer')} the backend does not tell in what they run: {tell(blind)}. Build the engine again."
    yield from _wasted(layers)
    yield from _lonely(placed, tell)
    yield from _attention(placed, tell)
    moves = [layer for layer in layers if layer.kind == "reformat"]
    if moves:
        yield f"{_count(moves, 'layer')} only {_verb(moves, 'changes', 'change')} a type or a layout: {tell(moves)}."
    rest = [layer for layer in layers if layer.kind != "linear"]
    if profile.between_ms > 0.1 * profile.profiled_ms:
        ms = profile.between_ms
        yield f"Between its layers the engine spends {tell.ms(ms)}: on starting them, or waiting for a processor that others use."
    yield (
        f"All but the Linears takes {tell.ms(sum(layer.ms for layer in rest) + profile.between_ms)}: "
        "what would be left if the Linears took no time at all."
    )
    costly = sorted(layers, key=lambda layer: -layer.ms)[:COSTLIEST]
    yield f"The {len(costly)} costliest: {', '.join(f'{title(layer)} {layer.ms:.3g} ms' for layer in costly)}."


class _Teller:
    """Says how long something takes, and which part of the call that is."""

    def __init__(self, profile: Profile) -> None:
        self._whole = profile.profiled_ms

    def ms(self, ms: float) -> str:
        return f"{ms:.3g} ms, {100 * ms / self._whole:.1f}%"

    def __call__(self, layers: Iterable[Layer]) -> str:
        return self.ms(sum(layer.ms for layer in layers))


def _linears(layers: Sequence[Layer], tell: _Teller) -> Iterable[str]:
    """In what the Linears and convolutions run, and whether that is what the graph says."""
    weighted = [layer for layer in layers if layer.kind in WEIGHTED]
    asked = [layer for layer in weighted if layer.quantized]
    integer = [layer for layer in asked if layer.precision == "int8"]
    refused = [layer for layer in asked if layer.precision != "int8"]
    if asked:
        what = f"All {len(asked)}" if not refused else f"{len(integer)} of the {len(asked)}"
        yield f"{what} Linears that the graph quantizes run in INT8: {tell(integer)}."
    if refused:
        yield (
            f"{_count(refused, 'Linear')} that the graph quantizes {_verb(refused, 'runs', 'run')} in {precisions(refused)}: "
            f"{_names(refused)}; {tell(refused)}. The backend has no INT8 kernel for them, or what they read is not quantized."
        )
    for kind, plural in (("linear", "Linear"), ("convolution", "convolution")):
        free = [layer for layer in weighted if not layer.quantized and layer.kind == kind]
        if free:
            count = _count(free, plural)
            verb, them = _verb(free, "runs", "run"), _verb(free, "it", "them")
            yield f"{count} {verb} in {precisions(free)} because the graph leaves {them} so: {_names(free)}; {tell(free)}."


def _wasted(layers: Sequence[Layer]) -> Iterable[str]:
    """Q/DQ pairs whose integers no integer kernel reads."""
    readers: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        for node in layer.origins:
            if operator(node) == "DequantizeLinear":
                readers[module(node)].append(layer)
    paired = {module(node) for layer in layers for node in layer.origins if operator(node) == "QuantizeLinear"}
    for tensor, reading in readers.items():
        floats = [layer for layer in reading if layer.kind not in INTEGER]
        if tensor in paired and floats:
            yield (
                f"The Q/DQ pair on {tensor!r} fuses with no INT8 kernel: {_names(floats)} {_verb(floats, 'reads', 'read')} its "
                "integers and must turn them back into floats. It costs accuracy and saves nothing: quantize the inputs of "
                "Linears alone, and leave the residual stream in float."
            )


def _lonely(placed: Sequence[Placed], tell: _Teller) -> Iterable[str]:
    """Q or DQ nodes that run as layers of their own."""
    indices = [index for index, entry in enumerate(placed) if entry.layer.kind == "quantize"]
    alone = [placed[index].layer for index in indices]
    tensors = list(dict.fromkeys(module(node) for layer in alone for node in layer.origins if operator(node) in QDQ))
    if alone:
        ahead = list(dict.fromkeys(_before(placed, index) for index in indices))
        yield (
            f"{_count(alone, 'Q/DQ')} did not fuse and {_verb(alone, 'runs', 'run')} as {_verb(alone, 'a layer', 'layers')} of "
            f"{_verb(alone, 'its', 'their')} own: {tell(alone)}, on {_listed(tensors) or _names(alone)}. The layer before, "
            f"{' or '.join(ahead)}, does not quantize what it writes."
        )


def _before(placed: Sequence[Placed], index: int) -> str:
    """What the nearest layer before this one does that computes something."""
    kinds = (entry.layer.kind for entry in reversed(placed[:index]))
    return next((kind for kind in kinds if kind not in ("reformat", "quantize")), "none but the input")


def _attention(placed: Sequence[Placed], tell: _Teller) -> Iterable[str]:
    """Whether attention is one kernel, or products and a softmax."""
    entries = [one for one in placed if one.layer.kind in ("attention", "product", "softmax") and one.part == "attention"]
    fused = [entry.layer for entry in entries if entry.layer.kind == "attention"]
    loose = [entry.layer for entry in entries if entry.layer.kind != "attention"]
    blocks = len({entry.block for entry in entries})
    if fused:
        count = len({entry.block for entry in entries if entry.layer.kind == "attention"})
        yield f"Attention is one fused kernel in {count} of {blocks} blocks, in {precisions(fused)}: {tell(fused)}."
    if loose:
        count = len({entry.block for entry in entries if entry.layer.kind != "attention"})
        yield (
            f"Attention runs as products and softmaxes of their own in {count} of {blocks} blocks, in {precisions(loose)}: "
            f"{tell(loose)}. Its scores go through memory, which a fused kernel would spare."
        )


def title(layer: Layer) -> str:
    """A short name by what a layer was made from: its Linears, or its last node, how many more, and whether it quantizes."""
    if layer.linears:
        return " + ".join(layer.linears)
    if layer.kind == "attention":
        core = next((node for node in layer.origins if operator(node) in ("Softmax", "Attention")), "")
        return module(core) if core else layer.name
    nodes = [node for node in layer.origins if operator(node) not in QDQ] or list(layer.origins)
    if not nodes:
        return layer.name
    quantized = " +Q" if len(nodes) < len(layer.origins) and "QuantizeLinear" in map(operator, layer.origins) else ""
    return f"{nodes[-1]}{f' +{len(nodes) - 1}' if len(nodes) > 1 else ''}{quantized}"


def _names(layers: Sequence[Layer]) -> str:
    return _listed([title(layer) for layer in layers])


def _listed(names: Sequence[str]) -> str:
    """The names, or the first of them and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _count(layers: Sequence[Layer], noun: str) -> str:
    return f"{len(layers)} {noun}{'' if len(layers) == 1 or noun == 'Q/DQ' else 's'}"


def _verb(layers: Sequence[Layer], one: str, several: str) -> str:
    return one if len(layers) == 1 else several


def precisions(layers: Iterable[Layer]) -> str:
    """In what layers run, the precision with most time first."""
    spent: dict[str, float] = defaultdict(float)
    for layer in layers:
        spent[layer.precision] += layer.ms
    return ", ".join(sorted(spent, key=lambda name: -spent[name]))


# One engine, or two side by side


def by_part(found: Explanation) -> dict[str, list[Layer]]:
    """The layers of each part of the model that has any, in the order of the flow."""
    parts = {part: [entry.layer for entry in found.layers if entry.part == part] for part in PARTS}
    return {part: layers for part, layers in parts.items() if layers}


def compare(first: Explanation, second: Explanation, key: Callable[[Placed], str]) -> list[Difference]:
    """The parts, or blocks, or whatever `key` tells apart, by what the second engine gains in them, the most first."""
    groups: dict[str, tuple[list[Layer], list[Layer]]] = defaultdict(lambda: ([], []))
    for side, found in enumerate((first, second)):
        for entry in found.layers:
            groups[key(entry)][side].append(entry.layer)
    differences = [
        Difference(name, sum(x.ms for x in a), sum(x.ms for x in b), precisions(a), precisions(b))
        for name, (a, b) in groups.items()
    ]
    differences.append(Difference(BETWEEN, first.between_ms, second.between_ms, "", ""))
    return sorted(differences, key=lambda difference: -difference.saved_ms)


def verdict(first: Explanation, second: Explanation) -> str:
    """One sentence: how much faster the second engine is, where, and what its time goes to."""
    linear = [found.total_ms(lambda entry: entry.layer.kind == "linear") for found in (first, second)]
    rest = [found.profiled_ms - ms for found, ms in zip((first, second), linear, strict=True)]
    names = (first.variant, second.variant) if first.variant != second.variant else (first.name, second.name)
    types = f"all else ({second.float_type} against {first.float_type})" if second.float_type != first.float_type else "all else"
    parts = [_times(a, b, what) for what, (a, b) in (("Linears", linear), (types, rest)) if a > 0 and b > 0]
    whole = _times(first.profiled_ms, second.profiled_ms, f"{names[1]} is")
    return (
        f"{whole} than {names[0]} ({second.profiled_ms:.3g} against {first.profiled_ms:.3g} ms): {', '.join(parts)}; "
        f"{second.share(rest[1]):.0f}% of {names[1]}'s time is not in Linears."
    )


def _times(first_ms: float, second_ms: float, what: str) -> str:
    faster = first_ms >= second_ms
    ratio = first_ms / second_ms if faster else second_ms / first_ms
    return f"{what} {ratio:.1f} times {'faster' if faster else 'slower'}"
