"""An INT8 graph in, what each of its Linears costs out, and graphs in which the costliest compute in float again.

    one Linear in INT8, all else float -> its noise at the output  ->  Cost  (a file keeps each, so work can be resumed)
    Costs, most noise per MAC first    -> frontier  ->  Points: what freeing the first k should give
    Points and a bound                 -> meet      ->  the smallest k that was measured to hold it
    names                              -> free      ->  the INT8 graph with those Linears as in the prepared float graph

Quantization errors of different Linears are nearly independent, so their energies add up. That is a prediction: it says where
to look first, and nothing is decided by it. Nothing is quantized again: a weight is rounded for its own Linear alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from vitedge.compiler.activations import open_session, read_inputs, run_once
from vitedge.compiler.attention import attentions
from vitedge.compiler.graph import (
    Linear,
    bias_slot,
    consumers,
    copy_of,
    linear_weight,
    linears,
    metadata,
    model_card,
    producers,
    prune,
    rewire,
    set_metadata,
)
from vitedge.errors import VitEdgeError
from vitedge.images import ImageFile
from vitedge.specs import Recipe, from_dict, to_dict
from vitedge.workspace import content_key, read_json, write_json

FLOAT_COST = 2.0  # of a MAC in floating point, in MACs of INT8: a model, near what VNNI gains over FP32 in whole networks
COST_IMAGES = 16  # that a Cost is measured on
BOUND_IMAGES = 32  # that a recipe's bound is held against
TINY = float(np.finfo(np.float64).tiny)
SILENT = 2.0**-48  # noise below this part of the signal is float32 rounding
Rows = NDArray[Any]
Progress = Callable[[int, int], object]


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What quantizing one Linear, and nothing else, does.

    noise: the energy of the error at the model's outputs, as a part of theirs. macs: multiply-accumulates per image.
    """

    name: str
    noise: float
    macs: int

    @property
    def sqnr_db(self) -> float:
        """10 log10 of the outputs' energy over that of the error."""
        return decibels(self.noise)


@dataclasses.dataclass(frozen=True, slots=True)
class Sensitivity:
    """The Costs of all quantized Linears in execution order. rest: noise that remains when all are freed, of attention."""

    costs: tuple[Cost, ...]
    rest: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """The INT8 graph with the `freed` costliest Linears in float, the last of them `name`.

    predicted_db: SQNR if noise energies add up. latency: of the Linears against all in INT8, modelled by FLOAT_COST.
    """

    freed: int
    name: str
    predicted_db: float
    latency: float


class Judge:
    """Holds graphs against the float graph on a few images, one at a time."""

    def __init__(self, prepared: ModelProto, rows: Rows) -> None:
        self._rows, self._outputs = rows, [output.name for output in prepared.graph.output]
        self._expected = list(self._run(prepared))

    def noise(self, model: ModelProto) -> float:
        """The energy of the error of all outputs, as a part of theirs."""
        noise = signal = 0.0
        for wanted, given in zip(self._expected, self._run(model), strict=True):
            noise += sum(float(np.square(g - w, dtype=np.float64).sum()) for w, g in zip(wanted, given, strict=True))
            signal += sum(float(np.square(w, dtype=np.float64).sum()) for w in wanted)
        return noise / max(signal, TINY)

    def sqnr_db(self, model: ModelProto) -> float:
        """10 log10 of the outputs' energy over that of the error."""
        return decibels(self.noise(model))

    def _run(self, model: ModelProto) -> Iterable[list[NDArray[Any]]]:
        session = open_session(model, self._outputs)
        feed = session.get_inputs()[0].name
        return (session.run(self._outputs, {feed: row[None]}) for row in self._rows)


def decibels(noise: float) -> float:
    """The SQNR of a noise that is given as a part of the signal; float32 rounding ends it at 144.5 dB."""
    return -10 * math.log10(max(noise, SILENT))


def free(int8: ModelProto, prepared: ModelProto, names: Collection[str]) -> ModelProto:
    """A copy of the INT8 graph in which the Linears `names` compute as in `prepared`, the float graph it was made from.

    An input that ends a quantized attention keeps its Q/DQ, which that attention needs: see attention.py.
    """
    model = copy_of(int8)
    nodes = {node.name: node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")}
    fused = {attention.result for attention in attentions(prepared)} if _attention_is_quantized(int8) else set[str]()
    for linear in linears(prepared):
        if linear.name in names:
            _free(model, nodes[linear.name], prepared, linear, keep_input=linear.input in fused)
    prune(model)
    return model


def leave_out(int8: ModelProto, prepared: ModelProto, names: Collection[str], *, fp32: bool = False) -> ModelProto:
    """What `free` gives, with `names` added to `skip` of the recipe in its metadata: what a manifest will tell.

    fp32: ask for floats in FP32, whatever the recipe says.
    """
    model = free(int8, prepared, names)
    recipe = recipe_of(int8)
    freed = [linear.name for linear in quantized(int8, prepared) if linear.name in names]
    changed = dataclasses.replace(recipe, skip=(*recipe.skip, *freed), float_type="fp32" if fp32 else recipe.float_type)
    set_metadata(model, card=model_card(model), variant=metadata(int8)["vitedge.variant"], recipe=changed)
    return model


def quantized(int8: ModelProto, prepared: ModelProto) -> list[Linear]:
    """The Linears of the prepared graph that are quantized in the INT8 graph, in execution order."""
    makers = producers(int8)
    weights = {node.name: node.input[1] for node in int8.graph.node if node.op_type in ("MatMul", "Gemm")}
    return [linear for linear in linears(prepared) if weights[linear.name] in makers]


def recipe_of(model: ModelProto) -> Recipe:
    """The recipe in the metadata of a graph; the default where there is none."""
    return from_dict(Recipe, json.loads(metadata(model).get("vitedge.recipe", "{}")))


def sensitivity(
    int8: ModelProto, prepared: ModelProto, rows: Rows, path: Path, progress: Progress = lambda done, total: None
) -> Sensitivity:
    """The Cost of every quantized Linear on `rows`, a batch of the model's input.

    path: a JSON file that each Cost is added to as soon as it is known. What it holds of the same graph and images is taken
    from it; anything else there, damaged or of others, is overwritten. progress: called with (Linears done, Linears in all).
    """
    key = content_key(hashlib.sha256(int8.SerializeToString()).hexdigest(), hashlib.sha256(rows.tobytes()).hexdigest())
    known, found = _read(path, key), quantized(int8, prepared)
    judge = None if all(name in known for name in ("", *(linear.name for linear in found))) else Judge(prepared, rows)
    macs = _macs(prepared, found, rows[:1])
    for done, linear in enumerate([None, *found]):
        name = "" if linear is None else linear.name  # without a name: what is left when all are freed
        if name not in known and judge is not None:
            known[name] = Cost(name, judge.noise(_alone(int8, prepared, linear)), macs.get(name, 0))
            write_json(path, {"key": key, "costs": [to_dict(cost) for cost in known.values()]})
        progress(done, len(found))
    return Sensitivity(tuple(known[linear.name] for linear in found), known[""].noise)


def frontier(measured: Sensitivity) -> list[Point]:
    """Point k has the k Linears of the most noise per MAC freed, 0 to all of them."""
    total = sum(cost.macs for cost in measured.costs)
    noise, macs = measured.rest + sum(cost.noise for cost in measured.costs), float(total)
    points = [Point(0, "", decibels(noise), 1.0)]
    for freed, cost in enumerate(sorted(measured.costs, key=lambda cost: -cost.noise / cost.macs), 1):
        noise, macs = noise - cost.noise, macs + (FLOAT_COST - 1) * cost.macs
        points.append(Point(freed, cost.name, decibels(max(noise, measured.rest)), macs / total))
    return points


def names_of(points: Sequence[Point], freed: int) -> frozenset[str]:
    """The Linears that are free at a Point."""
    return frozenset(point.name for point in points[1 : freed + 1])


def meet(points: Sequence[Point], holds: Callable[[frozenset[str]], bool], wanted_db: float) -> int:
    """The smallest number of freed Linears that `holds`, which measures; by bisection, which takes it that more never hurt.

    wanted_db: the search begins where this SQNR is predicted. It is a VitEdgeError if not even freeing all of them holds.
    """
    count = len(points) - 1
    if holds(frozenset()):
        return 0
    if not holds(names_of(points, count)):
        raise impossible(count)
    low, high, step = 0, count, 1  # low does not hold, high does
    probe = next((point.freed for point in points if point.predicted_db >= wanted_db), count)
    while high - low > 1:
        probe = min(max(probe, low + 1), high - 1)
        if holds(names_of(points, probe)):
            high, probe = probe, probe - step
        else:
            low, probe = probe, probe + step
        step *= 2  # ever further from where it was predicted, until it lies between two that were measured
        probe = (low + high) // 2 if low > 0 and high < count else probe
    return high


def impossible(count: int) -> VitEdgeError:
    """The error for a bound that no choice of Linears meets."""
    return VitEdgeError(
        f"the bound on accuracy is missed even with all {count} Linears in floating point",
        hint="loosen the bound, or take a recipe that leaves attention in floating point",
    )


def costs_path(path: Path) -> Path:
    """Where the costs of the Linears of the INT8 file `path` are kept."""
    return path.with_name(f"{path.stem}.costs.json")


def bounded(int8: ModelProto, prepared: ModelProto, files: Sequence[ImageFile], path: Path, progress: Progress) -> ModelProto:
    """The INT8 graph with as few Linears in float as `min_sqnr_db` of its recipe asks for on some of the images `files`.

    path: keeps the costs, as in `sensitivity`. It is a VitEdgeError if the bound cannot be met.
    """
    rows, wanted = read_inputs(prepared, files, BOUND_IMAGES), recipe_of(int8).min_sqnr_db
    judge = Judge(prepared, rows)
    every = frozenset(linear.name for linear in quantized(int8, prepared))
    known = {names: judge.sqnr_db(free(int8, prepared, names)) for names in (frozenset[str](), every)}

    def holds(names: frozenset[str]) -> bool:
        if names not in known:
            known[names] = judge.sqnr_db(free(int8, prepared, names))
        return known[names] >= wanted

    if holds(frozenset()):
        return int8
    if not holds(every):  # said before minutes are spent on the costs
        raise impossible(len(every))
    points = frontier(sensitivity(int8, prepared, rows[:COST_IMAGES], path, progress))
    return leave_out(int8, prepared, names_of(points, meet(points, holds, wanted)))


def _free(model: ModelProto, node: NodeProto, prepared: ModelProto, linear: Linear, *, keep_input: bool) -> None:
    """Give `node` the input, weight and bias of `linear`, and drop a bias that quantizing brought."""
    paired, before = str(node.input[0]), bias_slot(prepared, linear)
    after = bias_slot(model, dataclasses.replace(linear, node=node))
    wanted = [str(name) for name in linear.node.input[1:]]
    if before is None:
        brought = [other for other in model.graph.node if other.name == f"{linear.name}/bias"]
        for other in brought:
            model.graph.node.remove(other)
    elif after is not None and before[0] is not linear.node:
        after[0].input[after[1]] = before[0].input[before[1]]
        wanted.append(str(before[0].input[before[1]]))
    node.CopyFrom(linear.node)
    if keep_input:
        node.input[0] = paired
    _take_constants(model, prepared, wanted)


def _take_constants(model: ModelProto, prepared: ModelProto, names: Collection[str]) -> None:
    """Copy initializers over, in place of what has the same name: a corrected bias, which this Linear alone read."""
    there = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in prepared.graph.initializer:
        if tensor.name in names:
            (there.get(tensor.name) or model.graph.initializer.add()).CopyFrom(tensor)


def _alone(int8: ModelProto, prepared: ModelProto, linear: Linear | None) -> ModelProto:
    """The graph in which one Linear is quantized and nothing else is; None: no Linear, but attention as in `int8`."""
    others = {other.name for other in quantized(int8, prepared)} - ({linear.name} if linear else set())
    model = free(int8, prepared, others)
    if linear is None:
        return model
    node = next(node for node in model.graph.node if node.name == linear.name)
    readers = consumers(model)
    for quantizer in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        for dequantizer in readers[quantizer.output[0]]:
            if dequantizer.output[0] != node.input[0]:
                rewire(model, dequantizer.output[0], quantizer.input[0], readers[dequantizer.output[0]])
    prune(model)
    return model


def _attention_is_quantized(model: ModelProto) -> bool:
    """Whether a softmax has a Q/DQ, which no Linear brings."""
    makers = producers(model)
    read = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return any(name in makers and makers[name].op_type == "Softmax" for name in read)


def _macs(prepared: ModelProto, found: Sequence[Linear], row: Rows) -> dict[str, int]:
    """Rows x inputs x outputs of each Linear for one image, the rows counted in a run."""
    values = run_once(prepared, [linear.input for linear in found], row)
    tokens = {name: value.size // value.shape[-1] for name, value in values.items()}
    return {linear.name: tokens[linear.input] * linear_weight(prepared, linear).size for linear in found}


def _read(path: Path, key: str) -> dict[str, Cost]:
    """The costs that a file holds of this very graph and these images."""
    try:
        content = read_json(path)
        costs = [from_dict(Cost, entry) for entry in content["costs"]]
        whole = all(0 <= cost.noise < math.inf and (cost.macs > 0 or not cost.name) for cost in costs)
        return {cost.name: cost for cost in costs} if content["key"] == key and whole else {}
    except (VitEdgeError, KeyError, TypeError):  # missing, damaged, or of another make: measured anew
        return {}
