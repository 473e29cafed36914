"""A prepared float model and its ScaleTable in, the rounded weights of every Linear out.

    images -> inputs of the Linears -> Moments  ->  rounding.py  ->  Rounded (integers, scales, bias)

The statistics are those of the float model. Taking them from the layers already quantized, one layer after the other, was
measured to gain 0.2 dB on a ViT-S, and aiming at the outputs of the float model from there to fit the calibration images at
the expense of all others (docs/quantization.md).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch

import numpy as np
from onnx import ModelProto

from vitedge.compiler.activations import stream_activations
from vitedge.compiler.graph import Array, Linear, linear_bias, linear_weight
from vitedge.compiler.qdq import QMAX, TINY, Rounded
from vitedge.compiler.rounding import Moments, round_by_covariance, round_to_nearest
from vitedge.compiler.select import chosen_linears
from vitedge.images import ImageFile
from vitedge.specs import Recipe, ScaleTable

MOMENTS_BYTES = 2**30  # of covariances held at once; a model that needs more is run more often


def needs_images(recipe: Recipe) -> bool:
    """Whether rounding looks at the calibration images once more."""
    return recipe.method != "none" and (recipe.rounding == "gptq" or recipe.bias_correction)


def round_weights(
    model: ModelProto, table: ScaleTable, files: Sequence[ImageFile], progress: Callable[[int, int], object]
) -> dict[str, Rounded]:
    """The rounded weights of the chosen Linears of a prepared model, by name.

    Statistics of the inputs are taken in as many passes over the images as `MOMENTS_BYTES` asks for.
    """
    recipe = table.recipe
    by_input = defaultdict[str, list[Linear]](list)
    for linear in chosen_linears(model, recipe):
        by_input[linear.input].append(linear)
    if not needs_images(recipe):
        return {linear.name: _round(model, linear, table, None) for reading in by_input.values() for linear in reading}
    groups = _groups({name: len(linear_weight(model, reading[0])) for name, reading in by_input.items()})
    steps, total, rounded = itertools.count(1), len(files) * len(groups), dict[str, Rounded]()
    for group in groups:
        moments = {name: Moments(covariance=recipe.rounding == "gptq") for name in group}
        for _, activations in stream_activations(model, group, files, []):
            for name, array in activations.items():
                moments[name].add(array)
            progress(min(next(steps), total), total)
        for name in group:
            found = moments.pop(name)
            rounded |= {linear.name: _round(model, linear, table, found) for linear in by_input[name]}
    return rounded


def _round(model: ModelProto, linear: Linear, table: ScaleTable, moments: Moments | None) -> Rounded:
    """One Linear's weight by the recipe; without moments to nearest and with its own bias."""
    recipe = table.recipe
    bits = 4 if any(fnmatch(linear.name, pattern) for pattern in recipe.int4) else 8
    qmax = 2 ** (bits - 1) - 1
    weight, bias = linear_weight(model, linear), linear_bias(model, linear)
    scales = weight_scales(weight, qmax, recipe.per_channel)
    if moments is None or recipe.rounding == "nearest":
        integers = round_to_nearest(weight, scales, qmax)
    else:
        noise = (table.amax.get(linear.input, 0.0) / QMAX) ** 2 / 12
        integers = round_by_covariance(weight, scales, qmax, moments.covariance, noise)
    if moments is not None and recipe.bias_correction:
        lost = moments.mean @ (weight - integers * scales.astype(np.float64))
        bias = (lost if bias is None else bias + lost).astype(np.float32)
    return Rounded(integers, scales, bits, bias)


def weight_scales(weight: Array, qmax: int, per_channel: bool) -> Array:
    """float32[outputs] (or a scalar) such that the largest magnitude of each output, float[inputs, outputs], becomes `qmax`."""
    amax = np.abs(weight).max(axis=0) if per_channel else np.abs(weight).max()
    scales: Array = np.maximum(amax / qmax, TINY).astype(np.float32)
    return scales


def _groups(widths: Mapping[str, int]) -> list[list[str]]:
    """Tensors in order, as many together as `MOMENTS_BYTES` holds covariances of."""
    groups, used = [list[str]()], 0
    for name, width in widths.items():
        size = 8 * width * width
        if groups[-1] and used + size > MOMENTS_BYTES:
            groups, used = [*groups, []], 0
        groups[-1].append(name)
        used += size
    return groups
