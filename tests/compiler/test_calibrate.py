"""Ranges are those of the activations that torch computes, whatever the order of the images, and nothing is passed over."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tests.compiler.conftest import Tiny
from tests.models import PLAIN, engine_rows, random_images, run_graph, tiny_preprocess, torch_input, write_noise
from vitedge.compiler.activations import images_sha256, stream_activations
from vitedge.compiler.calibrate import (
    BINS,
    AbsHistogram,
    AbsMax,
    calibrate,
    load_table,
    save_table,
)
from vitedge.compiler.export import export
from vitedge.compiler.graph import linears, load
from vitedge.errors import ModelError, VitEdgeError
from vitedge.images import LOOK_AHEAD, ImageFile, decode, list_images
from vitedge.preprocess import resize
from vitedge.specs import Method, ModelCard, Recipe, ScaleTable, SmoothingMethod
from vitedge.workspace import sha256

Values = NDArray[np.float32]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = hnp.arrays(np.float32, st.integers(1, 60), elements=FINITE)
ORDINARY = hnp.arrays(np.float32, st.integers(1, 400), elements=st.floats(-100, 100, width=32))

POWERS = st.lists(st.integers(-30, 3), min_size=1, max_size=4).map(lambda powers: np.exp2(powers).astype(np.float32))  # bin edges

# The statistics


def exact_percentile(values: Values, percentile: float) -> float:
    """The smallest magnitude that at least `percentile` percent of the values do not exceed."""
    magnitudes = np.sort(np.abs(values.astype(np.float64)))
    return float(magnitudes[max(math.ceil(percentile / 100 * len(magnitudes) - 1e-9), 1) - 1])


@settings(deadline=None, max_examples=200)
@given(values=ORDINARY | ARRAYS, percentile=st.sampled_from([0.1, 1, 25, 50, 99, 99.9, 99.99, 100]))
@example(values=np.zeros(5, np.float32), percentile=99.0)
@example(values=np.float32([1, 2, 4, 8]), percentile=75.0)
@example(values=np.float32([np.finfo(np.float32).max, 1]), percentile=100.0)
@example(values=np.float32([1e-45, -1e-45]), percentile=100.0)
def test_a_percentile_is_that_of_the_sorted_values_within_one_bin(values: Values, percentile: float) -> None:
    histogram = AbsHistogram()
    histogram.add(values)
    exact, bin_width = exact_percentile(values, percentile), histogram.limit / BINS
    assert exact <= histogram.amax("percentile", percentile) <= exact + bin_width
    assert histogram.counts.sum() == len(values)
    assert histogram.limit <= max(2.0**-24, 2 * float(np.abs(values).max()))  # so a bin is at most 1/2048 of the largest value


@settings(deadline=None, max_examples=100)
@given(batches=st.lists(ORDINARY | ARRAYS | POWERS, min_size=1, max_size=5), data=st.data())
def test_statistics_are_the_same_in_any_order_and_in_any_pieces(batches: list[Values], data: st.DataObject) -> None:
    order = data.draw(st.permutations(batches))
    for make in (AbsHistogram, AbsMax):
        forward, shuffled, at_once = make(), make(), make()
        for batch in batches:
            forward.add(batch)
        for batch in order:
            shuffled.add(batch)
        at_once.add(np.concatenate(batches))
        merged = make()
        for batch in order:
            alone = make()
            alone.add(batch)
            merged.merge(alone)
        for other in (shuffled, at_once, merged):
            assert vars(forward).keys() == vars(other).keys()
            assert all(np.array_equal(value, vars(other)[key]) for key, value in vars(forward).items())


SKEWED = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sampled_from([0.0, 0.01]))  # seed, degrees of freedom, zeros


def skewed(seed: int, freedom: int, zeros: float) -> Values:
    """Values with the long tails of activations, some of them exactly 0."""
    random = np.random.default_rng(seed)
    values = random.standard_t(freedom, 3000)
    return np.where(random.random(3000) < zeros, 0, values).astype(np.float32)


def streamed(values: Values) -> AbsHistogram:
    histogram = AbsHistogram()
    for piece in np.array_split(values, 7):
        histogram.add(piece)
    return histogram


def tried(values: Values, histogram: AbsHistogram) -> list[float]:
    """The ranges that are worth trying: 97 bin edges from the 128th to the one above the largest value."""
    last = int(np.abs(values).max() * BINS / histogram.limit) + 1
    return [int(edge) * histogram.limit / BINS for edge in np.linspace(min(128, last), last, 97)]


@settings(deadline=None, max_examples=25)
@given(case=SKEWED)
def test_the_mse_range_changes_the_values_themselves_least(case: tuple[int, int, float]) -> None:
    values = skewed(*case)
    histogram = streamed(values)

    def error(amax: float) -> float:
        step = amax / 127
        return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values, dtype=np.float64).sum())

    assert error(histogram.amax("mse")) <= 1.02 * min(map(error, tried(values, histogram)))


@settings(deadline=None, max_examples=15)
@given(case=SKEWED)
def test_the_entropy_range_diverges_least_as_its_inventor_wrote_it(case: tuple[int, int, float]) -> None:
    values = skewed(*case)
    histogram = streamed(values)
    counts, _ = np.histogram(np.abs(values.astype(np.float64)), BINS, (0, histogram.limit))
    np.testing.assert_array_equal(histogram.counts, counts)

    def divergence(amax: float) -> float:
        edge = math.ceil(amax * BINS / histogram.limit - 1e-6)  # a range ends at the largest value, if that comes first
        reference = counts[:edge].astype(np.float64)
        reference[-1] += counts[edge:].sum()
        spread = np.zeros(edge)
        for level in range(128):
            inside = [i for i in range(-(-level * edge // 128), -(-(level + 1) * edge // 128)) if counts[i]]
            if inside:
                spread[inside] = counts[inside].sum() / len(inside)
        p, q = reference / reference.sum(), np.maximum(spread / spread.sum(), 1e-12)
        return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a))

    assert divergence(histogram.amax("entropy")) <= min(map(divergence, tried(values, histogram)[::4])) + 1e-9


@given(values=ORDINARY)
def test_no_method_goes_beyond_the_largest_value(values: Values) -> None:
    histogram = AbsHistogram()
    histogram.add(values)
    assert histogram.amax("max") == float(np.abs(values).max())
    for method in ("percentile", "mse", "entropy"):
        assert 0 <= histogram.amax(method, 99.9) <= histogram.amax("max")


def test_an_outlier_is_worth_clipping_to_mse_entropy_and_a_percentile_and_not_to_max() -> None:
    values = np.append(np.random.default_rng(0).normal(size=100_000), [40]).astype(np.float32)
    histogram = streamed(values)
    assert histogram.amax("max") == 40
    for method in ("percentile", "mse", "entropy"):
        assert 2 < histogram.amax(method, 99.99) < 30


def test_doubling_the_range_adds_up_neighbouring_bins() -> None:
    histogram = AbsHistogram()
    histogram.add(np.linspace(0, 0.999, 1000, dtype=np.float32))
    before = histogram.counts
    assert histogram.limit == 1
    histogram.add(np.float32([3.5]))
    assert histogram.limit == 4 and histogram.counts.sum() == 1001
    np.testing.assert_array_equal(histogram.counts[: BINS // 4], before.reshape(-1, 4).sum(axis=1))
    assert histogram.counts[BINS * 7 // 8] == 1


@given(batches=st.lists(ARRAYS, min_size=1, max_size=5))
def test_the_maximum_is_that_of_all_magnitudes(batches: list[Values]) -> None:
    collector = AbsMax()
    for batch in batches:
        collector.add(batch)
    assert collector.amax() == float(np.abs(np.concatenate(batches)).max())


def test_statistics_take_arrays_of_any_shape() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    for make in (AbsHistogram, AbsMax):
        one, other = make(), make()
        one.add(values)
        other.add(values.ravel())
        assert one.amax("max") == other.amax("max") > 0
        assert vars(one).keys() == vars(other).keys()
        assert all(np.array_equal(value, vars(other)[key]) for key, value in vars(one).items())


# A model

RECIPE = Recipe(min_images=4)


def linear_inputs(tiny: Tiny, files: list[ImageFile]) -> dict[str, NDArray[np.float32]]:
    """What torch feeds each Linear over all images, by the Linear's name."""
    seen: dict[str, list[NDArray[Any]]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].numpy()))
        for name, module in tiny.module.named_modules()
        if isinstance(module, nn.Linear)
    ]
    images = np.stack([resize(decode(file.path), tiny_preprocess()) for file in files])
    with torch.inference_mode():
        tiny.module(torch_input(images, tiny_preprocess()))
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(arrays) for name, arrays in seen.items()}


def test_ranges_are_the_largest_magnitudes_that_torch_feeds_each_linear(tiny: Tiny) -> None:
    table = calibrate(tiny.onnx, tiny.files, PLAIN).table
    expected = linear_inputs(tiny, tiny.files)
    found = {linear.name: linear.input for linear in linears(load(tiny.onnx))}
    assert set(found) == {"patch_embed", *expected}
    assert set(table.amax) == {found[name] for name in expected}  # the patches are int8 already
    for name, activations in expected.items():
        assert table.amax[found[name]] == pytest.approx(np.abs(activations).max(), rel=1e-4)
    assert found["blocks.0.attention.q"] == found["blocks.0.attention.k"] == found["blocks.0.attention.v"]
    assert (table.images, table.model_sha256, table.recipe) == (20, sha256(tiny.onnx), PLAIN)


def test_a_percentile_cuts_off_that_part_of_what_torch_feeds_each_linear(tiny: Tiny) -> None:
    table = calibrate(tiny.onnx, tiny.files, dataclasses.replace(PLAIN, method="percentile", percentile=97.0)).table
    found = {linear.name: linear.input for linear in linears(load(tiny.onnx))}
    for name, activations in linear_inputs(tiny, tiny.files).items():
        exact = exact_percentile(activations.ravel(), 97)
        assert table.amax[found[name]] == pytest.approx(exact, rel=1e-3, abs=float(np.abs(activations).max()) / 1000)
        assert table.amax[found[name]] < 0.95 * np.abs(activations).max()


def test_skipped_linears_need_no_range(tiny: Tiny) -> None:
    everything = calibrate(tiny.onnx, tiny.files[:4], PLAIN).table.amax
    fewer = calibrate(tiny.onnx, tiny.files[:4], dataclasses.replace(PLAIN, skip=("blocks.0.*", "head"))).table.amax
    found = {linear.name: linear.input for linear in linears(load(tiny.onnx))}
    gone = {name for linear, name in found.items() if linear == "head" or linear.startswith("blocks.0.")}
    assert fewer == {name: amax for name, amax in everything.items() if name not in gone}


def test_the_order_of_files_does_not_matter_and_the_seed_and_number_do(tiny: Tiny) -> None:
    recipe = dataclasses.replace(RECIPE, images=8)
    table = calibrate(tiny.onnx, tiny.files, recipe).table
    assert table.images == 8
    assert calibrate(tiny.onnx, tiny.files[::-1], recipe).table == table
    other = calibrate(tiny.onnx, tiny.files, dataclasses.replace(recipe, seed=1)).table
    assert other.images_sha256 != table.images_sha256 and other.amax != table.amax


@pytest.mark.parametrize(
    ("method", "smoothing", "passes"), [("max", "none", 1), ("max", "fixed", 2), ("mse", "auto", 3), ("auto", "none", 2)]
)
def test_progress_runs_to_the_number_of_images_in_all_passes(
    method: Method, smoothing: SmoothingMethod, passes: int, tiny: Tiny
) -> None:
    told: list[tuple[int, int]] = []
    calibrate(
        tiny.onnx,
        tiny.files,
        dataclasses.replace(RECIPE, method=method, smoothing=smoothing),
        progress=lambda *step: told.append(step),
    )
    assert told == [(done, 20 * passes) for done in range(1, 20 * passes + 1)]


def test_too_few_images_are_an_error_with_both_numbers(tiny: Tiny) -> None:
    with pytest.raises(
        VitEdgeError, match="only 3 images can be read, but the recipe 'int8' calibrates on at least 16"
    ) as caught:
        calibrate(tiny.onnx, tiny.files[:3], Recipe())
    assert "min_images" in str(caught.value.hint)


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_corrupt_images_are_left_out_and_counted(tiny: Tiny, tmp_path: Path) -> None:
    files = list_images(write_noise(tmp_path, 20))
    good = [file for index, file in enumerate(files) if index not in (3, 7, 19)]
    expected = calibrate(tiny.onnx, good, RECIPE).table
    for index in (3, 7, 19):
        spoil(files[index].path)
    found = calibrate(tiny.onnx, files, RECIPE)
    assert (found.table.images, found.table.amax) == (17, expected.amax)
    assert len(found.skipped) == 3
    assert all(any(files[index].path.name in message for message in found.skipped) for index in (3, 7, 19))
    with pytest.raises(VitEdgeError, match=r"only 17 images can be read, .* at least 18"):
        calibrate(tiny.onnx, files, dataclasses.replace(RECIPE, min_images=18))
    for file in files:
        spoil(file.path)
    with pytest.raises(VitEdgeError, match="none of 20 images could be decoded"):
        calibrate(tiny.onnx, files, RECIPE)


def test_a_recipe_that_quantizes_nothing_has_nothing_to_calibrate(tiny: Tiny) -> None:
    with pytest.raises(VitEdgeError, match="the recipe 'bf16' quantizes nothing"):
        calibrate(tiny.onnx, tiny.files, Recipe(name="bf16", method="none"))
    with pytest.raises(ModelError, match="the recipe skips every one of its 14 Linears"):
        calibrate(tiny.onnx, tiny.files, Recipe(skip=("*",)))


def test_a_recipe_of_the_patches_alone_has_a_table_without_ranges(tiny: Tiny) -> None:
    table = calibrate(tiny.onnx, tiny.files, dataclasses.replace(RECIPE, skip=("blocks.*", "head"))).table
    assert table.amax == {} and table.images == 20


# Activations that overflow


class OverflowsOnWhite(nn.Module):
    """Its second Linear is fed an infinity where a picture is nearly white."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(3, 8, 3, 2, padding=1), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(self.conv(x).flatten(2).transpose(1, 2))
        glare = torch.relu(x.mean((1, 2, 3), keepdim=True).squeeze(1) - 1.2)
        return self.second(tokens * torch.exp(1000 * glare))


def test_an_activation_that_is_infinite_names_the_tensor_and_the_image(tmp_path: Path) -> None:
    export(OverflowsOnWhite(), ModelCard("toy", "embed", tiny_preprocess()), tmp_path / "fp32.onnx")
    files = list_images(write_noise(tmp_path / "images", 12))
    assert calibrate(tmp_path / "fp32.onnx", files, RECIPE).table.images == 12
    white = files[10].path
    Image.new("RGB", (24, 32), "white").save(white)
    (second,) = [linear.input for linear in linears(load(tmp_path / "fp32.onnx")) if linear.name == "second"]
    for recipe in (RECIPE, PLAIN):
        with pytest.raises(ModelError) as caught:
            calibrate(tmp_path / "fp32.onnx", files, recipe)
        assert str(caught.value) == f"the activation {second!r} is NaN or infinite for {white}"


# Streaming


def test_activations_come_with_their_image(tiny: Tiny) -> None:
    model = load(tiny.onnx)
    tensors = [linear.input for linear in linears(model)][1:3]
    skipped: list[str] = []
    found = list(stream_activations(model, tensors, tiny.files, skipped))
    assert [file for file, _ in found] == tiny.files and not skipped
    assert all(len(array) == 1 for _, activations in found for array in activations.values())
    card_images = np.stack([resize(decode(file.path), tiny_preprocess()) for file in tiny.files])
    rows = engine_rows(card_images, ModelCard("tiny", "embed", tiny_preprocess(), patch=8))
    for index, name in enumerate(tensors):
        expected = run_graph(model, rows, tensors)[index]
        given = np.concatenate([activations[name] for _, activations in found])
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_neither_images_nor_activations_are_kept_longer_than_their_turn(tiny: Tiny, tmp_path: Path) -> None:
    files = list_images(write_noise(tmp_path, 4 * LOOK_AHEAD))
    model, skipped = load(tiny.onnx), list[str]()
    stream = stream_activations(model, [linears(model)[1].input], files, skipped)
    _, activations = next(stream)
    earlier = weakref.ref(next(iter(activations.values())))
    for file in files[2 * LOOK_AHEAD :]:
        file.path.unlink()  # had they been read already, they would not be missed
    del activations
    second, _ = next(stream)
    assert second == files[1] and earlier() is None
    assert [file for file, _ in stream] == files[2 : 2 * LOOK_AHEAD]
    assert len(skipped) == 2 * LOOK_AHEAD


# Tables


def test_a_table_is_saved_with_one_tensor_a_line_and_loaded_again(tiny: Tiny, tmp_path: Path) -> None:
    table = calibrate(tiny.onnx, tiny.files, RECIPE).table
    save_table(table, tmp_path / "scales.json")
    assert load_table(tmp_path / "scales.json") == table
    lines = (tmp_path / "scales.json").read_text().splitlines()
    for name, amax in table.amax.items():
        assert any(line.strip().rstrip(",") == f'"{name}": {amax}' for line in lines)
        assert float(f"{amax:.6g}") == amax


@pytest.mark.parametrize("content", ["", "{", "[]", '{"recipe": {}}', '{"amax": 3}'])
def test_a_damaged_table_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "scales.json").write_text(content)
    with pytest.raises(VitEdgeError):
        load_table(tmp_path / "scales.json")


@pytest.mark.parametrize("lost", ["smoothing", "rounding"])
def test_a_table_of_an_older_version_is_refused(lost: str, tmp_path: Path) -> None:
    save_table(ScaleTable(RECIPE, "", "", 1, {"a": 1.0}), tmp_path / "scales.json")
    content = json.loads((tmp_path / "scales.json").read_text())
    (content if lost == "smoothing" else content["recipe"]).pop(lost)
    (tmp_path / "scales.json").write_text(json.dumps(content))
    with pytest.raises(VitEdgeError, match="was written by an older version of vitedge") as caught:
        load_table(tmp_path / "scales.json")
    assert caught.value.hint == "calibrate again"


@pytest.mark.parametrize("amax", ["NaN", "Infinity", "-1.0", "1e60"])
def test_a_range_that_is_none_is_refused(amax: str, tmp_path: Path) -> None:
    table = ScaleTable(RECIPE, "", "", 1, {"a": 12345.0})
    save_table(table, tmp_path / "scales.json")
    text = (tmp_path / "scales.json").read_text().replace("12345.0", amax)
    (tmp_path / "scales.json").write_text(text)
    with pytest.raises(VitEdgeError, match="the range of 'a' must be a finite number"):
        load_table(tmp_path / "scales.json")


def test_the_hash_of_images_changes_with_a_byte_and_with_their_order(tmp_path: Path) -> None:
    files = list_images(write_noise(tmp_path, 3))
    first = images_sha256(files)
    assert images_sha256(files) == first != images_sha256(files[::-1])
    Image.fromarray(random_images(1, tiny_preprocess())[0]).save(files[1].path)
    assert images_sha256(files) != first
