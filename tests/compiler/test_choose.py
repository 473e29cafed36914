"""Statistics of channels are numpy's, and the smoothing that is chosen does to real activations what it says."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.compiler.conftest import Tiny
from vitedge.compiler import choose
from vitedge.compiler.activations import stream_activations
from vitedge.compiler.calibrate import AbsHistogram, AbsMax, calibrate
from vitedge.compiler.choose import Candidate, Channels, choose_smoothing, joined_weights, merged, output_errors
from vitedge.compiler.graph import load
from vitedge.compiler.quantize import prepare
from vitedge.compiler.rounding import Moments
from vitedge.compiler.smooth import sites
from vitedge.exact import MOST_PARTS, ExactSum
from vitedge.specs import Recipe

RECIPE = Recipe(min_images=1)


def images_of(seed: int, lengths: list[int], channels: int) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return [random.normal(3, 5, (1, length, channels)).astype(np.float32) for length in lengths]


# Channels


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(1, 7),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    data=st.data(),
)
def test_channels_are_numpys_however_tokens_are_split(seed: int, channels: int, lengths: list[int], data: st.DataObject) -> None:
    images = images_of(seed, lengths, channels)
    cut = data.draw(st.integers(1, len(images)))
    first, second, whole = Channels(), Channels(), Channels()
    for index, image in enumerate(images):
        (first if index < cut else second).add(image)
        whole.add(image)
    tokens = np.concatenate(images, axis=1)[0]
    for found in (whole, merged(first, second)):
        np.testing.assert_array_equal(found.low, tokens.min(axis=0))
        np.testing.assert_array_equal(found.high, tokens.max(axis=0))
        np.testing.assert_allclose(found.mean, tokens.mean(axis=0, dtype=np.float64), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.variance, tokens.var(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-9)
        assert found.count == len(tokens)


def test_channels_are_the_same_to_the_last_bit_in_any_order_and_from_any_parts() -> None:
    images = images_of(0, [11] * 30, 6)
    whole = Channels()
    for image in images:
        whole.add(image)
    for seed in range(5):
        random = np.random.default_rng(seed)
        parts = [Channels() for _ in range(4)]
        for index in random.permutation(len(images)).tolist():
            parts[random.integers(4)].add(images[index])
        total = Channels()
        for part in parts:
            total.merge(part)
        assert total.mean.tobytes() == whole.mean.tobytes() and total.variance.tobytes() == whole.variance.tobytes()
        assert (total.low.tobytes(), total.high.tobytes()) == (whole.low.tobytes(), whole.high.tobytes())


def size_of(collector: object) -> int:
    """Bytes of all that a collector holds on to."""
    return sum(value.nbytes if isinstance(value, np.ndarray) else sys.getsizeof(0) for value in vars(collector).values())


@pytest.mark.parametrize("make", [AbsMax, AbsHistogram, Channels, Moments])
def test_what_a_collector_holds_does_not_grow_with_the_number_of_images(make: Callable[[], Any]) -> None:
    collector = make()
    sizes = []
    for image in images_of(0, [20] * 50, 16):
        collector.add(image)
        sizes.append(size_of(collector))
    assert len(set(sizes)) == 1
    sums = [value for value in vars(collector).values() if isinstance(value, ExactSum)]
    assert all(len(total._parts) <= MOST_PARTS for total in sums)


# Candidates


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), amax=st.floats(0.1, 10))
def test_a_candidate_errs_by_half_a_step_inside_its_range_and_by_what_is_clipped_outside(seed: int, amax: float) -> None:
    random = np.random.default_rng(seed)
    scale, shift = np.exp(random.normal(size=6)), random.normal(0, 3, 6)
    rows = random.normal(shift, 3 * scale, (50, 6)).astype(np.float32)
    error = Candidate(scale, shift, amax).error(rows)
    smoothed = (rows - shift) / scale
    allowed = np.maximum(amax / 127 / 2, np.abs(smoothed) - amax)
    assert np.all(np.abs(error / scale) <= allowed * 1.001 + 1e-4)
    outside = np.abs(smoothed) > amax * 1.01
    np.testing.assert_allclose((error / scale)[outside], (np.sign(smoothed) * amax - smoothed)[outside], atol=1e-3)


def test_errors_are_those_of_every_second_token_at_the_outputs(tiny: Tiny) -> None:
    model = load(tiny.onnx)
    site = sites(model)[0]
    weights = {site.tensor: joined_weights(model, site.linears)}
    assert weights[site.tensor].shape == (32, 96)  # Q, K and V, side by side
    width = np.ones(32)
    judges = [{site.tensor: [Candidate(width, 0 * width, amax) for amax in amaxes]} for amaxes in ((1.0, 4.0), (2.0, 8.0))]
    found = output_errors(model, weights, judges, tiny.files[:5], lambda: None)[site.tensor]
    expected, tokens = np.zeros(2), 0
    for index, (_, activations) in enumerate(stream_activations(model, [site.tensor], tiny.files[:5], [])):
        rows = activations[site.tensor][0][index // 2 % 2 :: 2]
        tokens += len(rows)
        for position, candidate in enumerate(judges[index % 2][site.tensor]):
            levels = np.clip(np.rint(rows / (candidate.amax / 127)), -127, 127)
            lost = (levels * candidate.amax / 127 - rows) @ weights[site.tensor]
            expected[position] += np.square(lost, dtype=np.float64).sum()
    np.testing.assert_allclose(found, expected / tokens, rtol=1e-3)


# What is chosen


def ranges(tiny: Tiny, recipe: Recipe) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """The smallest and largest value of each channel of each smoothed tensor."""
    model = load(tiny.onnx)
    smoothing = choose_smoothing(model, tiny.files, recipe, lambda: None)
    smoothed = prepare(model, recipe, smoothing)
    channels = {f"{name}.smooth": Channels() for name in smoothing}
    for _, activations in stream_activations(smoothed, list(channels), tiny.files, []):
        for name, array in activations.items():
            channels[name].add(array)
    return {name: (found.low, found.high) for name, found in channels.items()}


def test_at_exponent_one_all_channels_have_one_range_around_zero(tiny: Tiny) -> None:
    found = ranges(tiny, dataclasses.replace(RECIPE, smoothing="fixed", exponent=1.0))
    assert len(found) == len(sites(load(tiny.onnx))) == 9
    for low, high in found.values():
        assert np.abs(low + high).max() < 0.1 * high.max()  # a shift is written in three digits
        assert high.max() < 1.1 * high.min()


def test_without_shift_the_middle_stays_where_it_is(tiny: Tiny) -> None:
    recipe = dataclasses.replace(RECIPE, shift=False)
    assert all(not any(found.shift) for found in calibrate(tiny.onnx, tiny.files, recipe).table.smoothing.values())
    for low, high in ranges(tiny, dataclasses.replace(recipe, smoothing="fixed", exponent=1.0)).values():
        reach = np.maximum(high, -low)
        assert reach.max() < 1.02 * reach.min() and np.abs(low + high).max() > 0.1 * reach.max()


def test_each_tensor_gets_the_exponent_of_the_smallest_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = calibrate(tiny.onnx, tiny.files, RECIPE).table.smoothing
    fixed = {
        exponent: calibrate(
            tiny.onnx, tiny.files, dataclasses.replace(RECIPE, smoothing="fixed", exponent=exponent)
        ).table.smoothing
        for exponent in choose.EXPONENTS
    }
    for name, found in chosen.items():
        assert any(found == fixed[exponent][name] for exponent in choose.EXPONENTS)
    for exponent in (0.5, 0.9):
        favourite = {name: np.array([float(e != exponent) for e in choose.EXPONENTS]) for name in chosen}
        monkeypatch.setattr(choose, "output_errors", lambda *_, errors=favourite: {n: 1e9 * e for n, e in errors.items()})
        assert calibrate(tiny.onnx, tiny.files, RECIPE).table.smoothing == fixed[exponent]


def test_one_image_is_enough_where_the_recipe_says_so(tiny: Tiny) -> None:
    for method in ("max", "percentile", "mse", "entropy", "auto"):
        recipe = dataclasses.replace(RECIPE, method=method)
        table = calibrate(tiny.onnx, tiny.files[:1], recipe).table
        assert table.images == 1 and all(amax > 0 for amax in table.amax.values()) and len(table.smoothing) == 9
