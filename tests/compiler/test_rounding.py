"""Moments are numpy's, and GPTQ is held against the algorithm as its paper writes it and against what it is to make small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vitedge.compiler import rounding
from vitedge.compiler.rounding import DAMPING, Moments, round_by_covariance, round_to_nearest
from vitedge.compiler.weights import weight_scales

Float64 = NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)


def problem(seed: int, inputs: int = 24, outputs: int = 10, qmax: int = 127) -> tuple[Float64, Float64, Float64]:
    """A weight, its scales and the covariance of inputs that a few hidden causes move together."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(inputs, outputs))
    tokens = random.normal(size=(200, inputs // 3)) @ random.normal(size=(inputs // 3, inputs))
    tokens += random.normal(0, 0.3, tokens.shape)
    return weight, weight_scales(weight, qmax, per_channel=True).astype(np.float64), np.cov(tokens.T, bias=True)


def energy(weight: Float64, integers: NDArray[np.int8], scales: Float64, covariance: Float64) -> float:
    """tr(dW^T C dW): the mean squared error a token at the outputs."""
    lost = weight - integers * scales
    return float(np.trace(lost.T @ covariance @ lost))


def by_the_paper(weight: Float64, scales: Float64, qmax: int, covariance: Float64, noise: float) -> NDArray[np.int8]:
    """Frantar et al., input after input, with the inverse of what is left computed anew at each."""
    damped = covariance + np.eye(len(covariance)) * (noise + DAMPING * np.diagonal(covariance).mean())
    order = list(np.argsort(-np.diagonal(covariance), kind="stable"))
    rest, rounded = weight.copy(), np.zeros(weight.shape, np.int8)
    while order:
        inverse = np.linalg.inv(damped[np.ix_(order, order)])
        first = order[0]
        rounded[first] = np.clip(np.rint(rest[first] / scales), -qmax, qmax)
        error = (rest[first] - rounded[first] * scales) / inverse[0, 0]
        rest[order] -= np.outer(inverse[:, 0], error)
        order = order[1:]
    return rounded


# Moments


@settings(deadline=None, max_examples=100)
@given(seed=SEEDS, channels=st.integers(1, 7), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_moments_are_numpys_however_tokens_are_split_into_images(seed: int, channels: int, lengths: list[int]) -> None:
    random = np.random.default_rng(seed)
    middle, spread = random.normal(0, 10, channels), np.exp(random.normal(0, 2, channels))
    images = [random.normal(middle, spread, (1, length, channels)).astype(np.float32) for length in lengths]
    moments, mean_alone = Moments(), Moments(covariance=False)
    for image in images:
        moments.add(image)
        mean_alone.add(image)
    tokens = np.concatenate(images, axis=1)[0].astype(np.float64)
    scale = np.abs(tokens).max(axis=0)
    assert np.all(np.abs(moments.mean - tokens.mean(axis=0)) <= 1e-6 * scale)
    assert np.all(np.abs(moments.covariance - np.cov(tokens.T, bias=True)) <= 1e-5 * np.outer(scale, scale))
    np.testing.assert_array_equal(mean_alone.mean, moments.mean)
    assert moments.count == len(tokens) and mean_alone.scatter is None


def test_a_mean_far_from_zero_takes_nothing_from_the_covariance() -> None:
    """The sum of squares less the square of the sum would be off by more than it is."""
    random = np.random.default_rng(0)
    tokens = (1e3 + random.normal(size=(64, 50, 3))).astype(np.float32)
    moments = Moments()
    for image in tokens:
        moments.add(image)
    np.testing.assert_allclose(moments.covariance, np.cov(tokens.reshape(-1, 3).T.astype(np.float64), bias=True), atol=1e-4)


# GPTQ


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, inputs=st.integers(3, 30), qmax=st.sampled_from([7, 127]), noise=st.sampled_from([0.0, 0.5]))
def test_rounding_is_that_of_the_paper(seed: int, inputs: int, qmax: int, noise: float) -> None:
    weight, scales, covariance = problem(seed, inputs, 4, qmax)
    found = round_by_covariance(weight, scales, qmax, covariance, noise)
    assert found.dtype == np.int8 and np.abs(found.astype(int)).max() <= qmax
    np.testing.assert_array_equal(found, by_the_paper(weight, scales, qmax, covariance, noise))


@pytest.mark.parametrize("qmax", [7, 127])
def test_the_error_is_smaller_than_that_of_rounding_to_nearest(qmax: int) -> None:
    ratios = []
    for seed in range(40):
        weight, scales, covariance = problem(seed, qmax=qmax)
        found, nearest = round_by_covariance(weight, scales, qmax, covariance), round_to_nearest(weight, scales, qmax)
        ratios.append(energy(weight, found, scales, covariance) / energy(weight, nearest, scales, covariance))
    assert np.mean(ratios) < 0.5 and max(ratios) < 1


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, noise=st.sampled_from([0.0, 1.0]))
def test_where_no_two_inputs_are_alike_it_is_rounding_to_nearest(seed: int, noise: float) -> None:
    weight, scales, _ = problem(seed)
    covariance = np.diag(np.random.default_rng(seed).exponential(size=len(weight)))
    np.testing.assert_array_equal(
        round_by_covariance(weight, scales, 127, covariance, noise), round_to_nearest(weight, scales, 127)
    )


def test_much_noise_makes_it_rounding_to_nearest() -> None:
    weight, scales, covariance = problem(1)
    nearest = round_to_nearest(weight, scales, 127)
    assert (round_by_covariance(weight, scales, 127, covariance) != nearest).any()
    np.testing.assert_array_equal(round_by_covariance(weight, scales, 127, covariance, 1e9), nearest)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scales, covariance = problem(2, 150)
    expected = round_by_covariance(weight, scales, 127, covariance)
    monkeypatch.setattr(rounding, "BLOCK", block)
    assert (round_by_covariance(weight, scales, 127, covariance) != expected).mean() < 1e-3  # ties, by the last bits


@pytest.mark.parametrize("covariance", [np.zeros((24, 24)), np.ones((24, 24)), 1e-30 * np.eye(24), 1e12 * np.ones((24, 24))])
def test_inputs_that_say_nothing_or_all_the_same_are_taken(covariance: Float64) -> None:
    weight, scales, _ = problem(3)
    found = round_by_covariance(weight, scales, 127, covariance)
    assert np.abs(found.astype(int)).max() <= 127
    assert energy(weight, found, scales, covariance) <= energy(weight, round_to_nearest(weight, scales, 127), scales, covariance)
