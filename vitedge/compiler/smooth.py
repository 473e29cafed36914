"""A float model and a Smoothing per activation in, the same function with activations that suit one INT8 scale out.

    LayerNorm -> x -> Linears      the norm's gain and bias make (x - shift) / scale, the Linears undo it
    V -> attention -> x -> proj    V's Linear makes it: the weights of a softmax sum to 1, so a shift passes through
    GELU -> x -> Linear            a Mul and an Add make it, which fuse with the GELU

The float function does not change but for rounding, which `prove` holds against real images. INT8 rounds in steps as large as
the widest channel asks for; here wide channels lend of their range to their weights, which have a scale per output channel
(SmoothQuant, Xiao et al. 2023), and lopsided ones are centered (Outlier Suppression+, Wei et al. 2023). What goes through a
graph unharmed is found by sending channel numbers through it, so no family of models is known by name.

A tensor keeps its name only where it keeps its meaning: the smoothed one is called NAME.smooth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from vitedge.compiler import graph
from vitedge.compiler.activations import run_once
from vitedge.compiler.graph import (
    Array,
    Linear,
    constant,
    consumers,
    linear_bias,
    linear_output,
    linear_weight,
    linears,
    producers,
    put_constant,
    put_nodes,
    rename_tensor,
    rewire,
    set_linear,
)
from vitedge.errors import ModelError
from vitedge.specs import Smoothing

POINTWISE = ("Gelu", "Relu", "Mul", "Sigmoid", "Tanh", "Erf", "Elu", "HardSwish", "LeakyRelu")  # a Mul and Add fuse with these
SUFFIX = ".smooth"
EXACT_DB = 80.0  # SQNR of the rewritten model against the original; float32 rounding alone gives 100 to 130
HINT = "calibrate again"
MERGED_ROWS = ".merged.rows"  # how the names of the choices of token merging end (see merging.py)
Sources = tuple[tuple[str, NDArray[np.int64]], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """An activation that can be smoothed.

    tensor: its name. linears: all that read it. how: who makes (x - shift) / scale. sources: for "values", the name of each
    Linear that makes the channels, and for each of its outputs which channel of the tensor it becomes, or -1.
    """

    tensor: str
    linears: tuple[str, ...]
    how: Literal["norm", "values", "pointwise"]
    sources: Sources = ()


def sites(model: ModelProto) -> list[Site]:
    """Every activation that can be smoothed, in execution order."""
    makers, readers, known = producers(model), consumers(model), graph.constants(model).keys()
    outputs = {output.name for output in model.graph.output}
    by_input: dict[str, list[Linear]] = {}
    for linear in linears(model):
        by_input.setdefault(linear.input, []).append(linear)
    values = _value_channels(model, [name for name in by_input if name in makers])
    found = []
    for tensor, reading in by_input.items():
        maker, names = makers.get(tensor), tuple(linear.name for linear in reading)
        alone = len(readers[tensor]) == len(reading) and tensor not in outputs
        if maker is None:
            continue
        if maker.op_type == "LayerNormalization" and alone and maker.input[1] in known:
            found.append(Site(tensor, names, "norm"))
        elif tensor in values and alone and not _passes_by(model, tensor, values[tensor]):
            found.append(Site(tensor, names, "values", values[tensor]))
        elif maker.op_type in POINTWISE:
            found.append(Site(tensor, names, "pointwise"))
    return found


def smooth(model: ModelProto, smoothing: Mapping[str, Smoothing]) -> None:
    """Rewrite the model in place so that every tensor of `smoothing` arrives at its Linears as (x - shift) / scale.

    A tensor that cannot be smoothed is a ModelError.
    """
    known = {site.tensor: site for site in sites(model)} if smoothing else {}
    by_name = {linear.name: linear for linear in linears(model)}
    for tensor, wanted in smoothing.items():
        if tensor not in known:
            raise ModelError(f"{tensor!r} cannot be smoothed in this model", hint=HINT)
        scale, shift = np.array(wanted.scale), np.array(wanted.shift)
        site = known[tensor]
        channels = len(linear_weight(model, by_name[site.linears[0]]))
        if len(scale) != channels:
            raise ModelError(f"the smoothing of {tensor!r} is for {len(scale)} channels, but it has {channels}", hint=HINT)
        {"norm": _into_norm, "values": _into_values, "pointwise": _into_pointwise}[site.how](model, site, by_name, scale, shift)
        for name in site.linears:
            _undo(model, by_name[name], scale, shift)
    graph.prune(model)


def prove(original: ModelProto, rewritten: ModelProto, feed: Array) -> None:
    """Run both models on the same input and hold them together; a rewrite that changed the function is a ModelError.

    feed: a batch as the model takes it, of real images. Tokens are merged in both as `original` does: between two tokens that
    are as near to a third, the last bit decides, and no rewrite keeps that.
    """
    outputs = [output.name for output in original.graph.output]
    choices = [name for node in original.graph.node for name in node.output if name.endswith(MERGED_ROWS)]
    answers = run_once(original, [*outputs, *choices], feed)
    rewritten_answers = run_once(_with_choices(rewritten, {name: answers[name] for name in choices}), outputs, feed)
    for name in outputs:
        before = answers[name]
        noise = float(np.square(rewritten_answers[name] - before, dtype=np.float64).sum())
        signal = float(np.square(before, dtype=np.float64).sum())
        if not noise <= signal * 10 ** (-EXACT_DB / 10):
            raise ModelError(
                f"smoothing changes the output {name!r} of this model, which it must not",
                hint='set smoothing = "none" in the recipe, and please report the model',
            )


def _with_choices(model: ModelProto, choices: Mapping[str, Array]) -> ModelProto:
    """The model with some of its tensors made constants; itself where there are none."""
    if not choices:
        return model
    probe = graph.copy_of(model)
    for name, value in choices.items():
        rewire(probe, name, put_constant(probe, f"{name}.chosen", value))
    return probe


def _into_norm(
    model: ModelProto, site: Site, by_name: dict[str, Linear], scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    """Let a LayerNormalization's own gain and bias do it."""
    norm = producers(model)[site.tensor]
    gain = constant(model, norm.input[1])
    bias = constant(model, norm.input[2]) if len(norm.input) > 2 and norm.input[2] else np.float32(0)
    assert gain is not None and bias is not None
    del norm.input[1:]
    norm.input.append(put_constant(model, f"{site.tensor}{SUFFIX}.gain", (gain / scale).astype(np.float32)))
    norm.input.append(put_constant(model, f"{site.tensor}{SUFFIX}.bias", ((bias - shift) / scale).astype(np.float32)))
    rename_tensor(model, site.tensor, f"{site.tensor}{SUFFIX}", norm)


def _into_values(
    model: ModelProto, site: Site, by_name: dict[str, Linear], scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    """Let the Linears that make V do it, wherever in their outputs the channels of V lie."""
    for name, channels in site.sources:
        linear, ours = by_name[name], channels >= 0
        divisor, offset = np.where(ours, scale[channels], 1.0), np.where(ours, shift[channels], 0.0)
        bias = linear_bias(model, linear)
        set_linear(model, linear, linear_weight(model, linear) / divisor, ((0.0 if bias is None else bias) - offset) / divisor)
        output = linear_output(model, linear)
        if not output.endswith(SUFFIX):
            rename_tensor(model, output, f"{output}{SUFFIX}", producers(model)[output])
    makers = producers(model)
    if site.tensor in makers:  # else it is what one of these Linears makes, and has the new name
        rename_tensor(model, site.tensor, f"{site.tensor}{SUFFIX}", makers[site.tensor])


def _into_pointwise(
    model: ModelProto, site: Site, by_name: dict[str, Linear], scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    """Put a Mul and an Add behind the activation function, for its Linears alone."""
    new = f"{site.tensor}{SUFFIX}"
    factor = put_constant(model, f"{new}.factor", (1 / scale).astype(np.float32))
    offset = put_constant(model, f"{new}.offset", (-shift / scale).astype(np.float32))
    nodes = [helper.make_node("Mul", [site.tensor, factor], [f"{new}.scaled"], name=f"{new}/Mul")]
    nodes.append(helper.make_node("Add", [f"{new}.scaled", offset], [new], name=f"{new}/Add"))
    readers = [by_name[name].node for name in site.linears]
    put_nodes(model, nodes, before=readers[0])
    rewire(model, site.tensor, new, readers)


def _undo(model: ModelProto, linear: Linear, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> None:
    """x W + b = ((x - shift) / scale) (scale W) + (b + shift W)."""
    weight, bias = linear_weight(model, linear), linear_bias(model, linear)
    moved = shift @ weight
    set_linear(model, linear, weight * scale[:, None], (moved if bias is None else moved + bias) if shift.any() else None)


def _value_channels(model: ModelProto, tensors: list[str]) -> dict[str, Sources]:
    """For each of `tensors` whose channels are means over tokens of outputs of Linears: which outputs of which.

    Every output of every Linear is made a number of its own, whatever the input, and the graph run: a mean of equal numbers
    is that number, so what arrives says where it came from. So does a sum of several, falsely; numbered in another order, it
    would have to come from elsewhere. The numbers are negative: no activation function passes those.
    """
    numbered, total = [], 0
    for linear in linears(model):
        count = linear_weight(model, linear).shape[1]
        numbered.append((linear.name, total, count))
        total += count
    mixed = np.random.default_rng(0).permutation(total)
    first, second = (_run_numbered(model, tensors, numbers) for numbers in (np.arange(total), mixed))
    found = {}
    for tensor, numbers in first.items():
        distinct = tensor in second and numbers.max() < total and len(set(numbers)) == len(numbers)
        if distinct and np.array_equal(mixed[numbers], second[tensor]):
            found[tensor] = _sources(numbers, numbered)
    return found


def _passes_by(model: ModelProto, tensor: str, sources: Sources) -> bool:
    """Whether a Linear of `sources` reaches an output of the graph other than through `tensor`, so that it may not change."""
    names = {name for name, _ in sources}
    reached = {linear_output(model, linear) for linear in linears(model) if linear.name in names} - {tensor}
    for node in model.graph.node:
        if reached.intersection(node.input):
            reached.update(name for name in node.output if name != tensor)
    return any(output.name in reached for output in model.graph.output)


def _run_numbered(model: ModelProto, tensors: list[str], numbers: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """For those of `tensors` that carry a number from 0 on in each channel, the same in all tokens: these numbers."""
    probe, used = graph.copy_of(model), 0
    for linear in linears(probe):
        weight = linear_weight(probe, linear)
        set_linear(probe, linear, np.zeros_like(weight), -1.0 - numbers[used : used + weight.shape[1]])
        used += weight.shape[1]
    found = {}
    for tensor, array in run_once(probe, tensors).items():
        rows = array.reshape(-1, array.shape[-1])
        arrived = np.rint(-rows[0] - 1).astype(np.int64)
        if np.abs(rows + 1 + arrived).max() < 0.25 and arrived.min() >= 0:
            found[tensor] = arrived
    return found


def _sources(numbers: NDArray[np.int64], numbered: list[tuple[str, int, int]]) -> Sources:
    """Which channel of a tensor each output of a Linear becomes, given the outputs' numbers by channel."""
    found = []
    for name, first, count in numbered:
        channels = np.full(count, -1, np.int64)
        ours = (numbers >= first) & (numbers < first + count)
        channels[numbers[ours] - first] = np.flatnonzero(ours)
        if ours.any():
            found.append((name, channels))
    return tuple(found)
