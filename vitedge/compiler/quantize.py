"""A float ONNX model, a ScaleTable and where it asks for them the calibration images in, explicit symmetric INT8 Q/DQ out.

    model.onnx -> prepare: exact rewrites -> round_weights -> Q/DQ on Linears, attention -> bounded -> int8.onnx

One scale per activation, one per output channel of a weight; one Q/DQ serves all readers of a tensor (Q, K and V). The
residual stream, LayerNorm and the inputs of softmax and GELU stay in floating point. The patch GEMM's input is int8 already
and exact. Knows nothing of how ranges were found: that is calibrate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnx import ModelProto

from vitedge.compiler import graph
from vitedge.compiler.activations import images_sha256
from vitedge.compiler.attention import attentions, quantize_attention, scale_queries
from vitedge.compiler.qdq import quantize_activation, quantize_weight
from vitedge.compiler.select import chosen_linears, integer_tensors, quantized_activations
from vitedge.compiler.sensitivity import bounded, costs_path, recipe_of
from vitedge.compiler.smooth import smooth
from vitedge.compiler.weights import needs_images, round_weights
from vitedge.compiler.work import save_counted
from vitedge.errors import ModelError
from vitedge.images import ImageFile, sample
from vitedge.specs import Recipe, ScaleTable, Smoothing, reduction_of
from vitedge.workspace import sha256

INT4_OPSET = 21  # the first whose DequantizeLinear takes 4 bits


def quantize(
    model_path: Path,
    table: ScaleTable,
    path: Path,
    files: Sequence[ImageFile] = (),
    *,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Write the INT8 form of the float model to `path`; returns how many Linears were quantized.

    files: where the calibration images were drawn from, for a recipe that looks at them again (see weights.py), or that
    bounds the error: costs of Linears are then kept beside `path`, so that what is interrupted goes on (see sensitivity.py).
    progress: called with (images done, images in all, over all passes), and under a bound with Linears in their place after that.
    A table that was calibrated on another model or on other images, or that lacks a tensor, is a ModelError.
    """
    recipe = table.recipe
    if table.model_sha256 != sha256(model_path):
        raise ModelError(f"these scales were calibrated on another model than {model_path}", hint="calibrate again")
    drawn = _calibration_images(table, files) if needs_images(recipe) or recipe.min_sqnr_db else []
    prepared = prepare(graph.load(model_path), recipe, table.smoothing)
    model = graph.copy_of(prepared) if recipe.min_sqnr_db else prepared
    count = quantize_linears(model, table, drawn, progress)
    if recipe.attention:
        quantize_attention(model, table.amax)
    if recipe.int4:
        model.opset_import[0].version = max(model.opset_import[0].version, INT4_OPSET)
    _name(model, recipe)
    if recipe.min_sqnr_db:
        model = bounded(model, prepared, drawn, costs_path(path), progress)
        count -= len(recipe_of(model).skip) - len(recipe.skip)
    save_counted(model, path)
    return count


def prepare(original: ModelProto, recipe: Recipe, smoothing: Mapping[str, Smoothing]) -> ModelProto:
    """A copy of the float model after the exact rewrites that come before quantizing."""
    model = graph.copy_of(original)
    if recipe.attention:
        scale_queries(model, attentions(model))
    smooth(model, smoothing)
    return model


def leave_float(model_path: Path, recipe: Recipe, path: Path) -> None:
    """Write the float model under another recipe, which changes nothing but the float type that it asks for."""
    model = graph.load(model_path)
    _name(model, recipe)
    save_counted(model, path)


def quantize_linears(
    model: ModelProto,
    table: ScaleTable,
    files: Sequence[ImageFile] = (),
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Put Q/DQ around the chosen Linears of a prepared model in place; returns their number."""
    recipe = table.recipe
    chosen, integer = chosen_linears(model, recipe), integer_tensors(model)
    tensors = [name for name in dict.fromkeys(linear.input for linear in chosen) if name not in integer]
    for name in quantized_activations(model, recipe):
        if name not in table.amax:
            raise ModelError(f"the scale table has no range for {name!r}", hint="calibrate again with this recipe")
    rounded = round_weights(model, table, files, progress)
    for linear in chosen:
        quantize_weight(model, linear, rounded[linear.name])
    for name in tensors:
        quantize_activation(model, name, table.amax[name], [linear.node for linear in chosen if linear.input == name])
    graph.prune(model)
    return len(chosen)


def _name(model: ModelProto, recipe: Recipe) -> None:
    """Let the metadata tell the recipe, and the name of the variant that and what else has been changed of the model."""
    variant = recipe.name + reduction_of(graph.metadata(model).get("vitedge.variant", ""))
    graph.set_metadata(model, card=graph.model_card(model), variant=variant, recipe=recipe)


def _calibration_images(table: ScaleTable, files: Sequence[ImageFile]) -> list[ImageFile]:
    """The images that the table was made from, drawn again; a ModelError where they cannot be."""
    if not files:
        hint = "give the folder of the calibration images with --images"
        raise ModelError(f"the recipe {table.recipe.name!r} looks at the calibration images once more", hint=hint)
    drawn = sample(files, table.recipe.images, table.recipe.seed)
    if images_sha256(drawn) != table.images_sha256:
        raise ModelError(
            "these are other images than the scales were calibrated on", hint="give the same folder, or calibrate again"
        )
    return drawn
