"""The weights of the resampling, against Pillow bit for bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vitedge.preprocess import resize
from vitedge.resampling import PRECISION_BITS, Taps, resampling
from vitedge.specs import Preprocess

SIDES = st.integers(1, 600)
SPECS = st.builds(
    Preprocess,
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    mean=st.just((0.5,) * 3),
    std=st.just((0.5,) * 3),
    resize=st.sampled_from(["crop", "squash"]),
    crop_pct=st.sampled_from([1.0, 0.95, 0.9, 0.875]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)


def apply(picture: NDArray[np.uint8], taps: Taps) -> NDArray[np.uint8]:
    """The rows of `picture` resampled by the formula in `Taps`."""
    sums = np.full((len(taps.first), *picture.shape[1:]), 1 << (PRECISION_BITS - 1), np.int64)
    for tap, weights in enumerate(taps.weights.T):
        sums += picture[taps.first + tap].astype(np.int64) * weights.reshape(-1, *[1] * (picture.ndim - 1))
    assert abs(sums).max() < 2**31  # what 32 bits hold
    return np.clip(sums >> PRECISION_BITS, 0, 255).astype(np.uint8)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, SPECS, st.integers(0, 99))
def test_the_weights_are_pillows(height: int, width: int, spec: Preprocess, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    found = resampling(height, width, spec)
    narrow = apply(image.transpose(1, 0, 2), found.across).transpose(1, 0, 2)
    np.testing.assert_array_equal(apply(narrow, found.down), resize(image, spec))


def test_a_frame_that_fits_is_copied() -> None:
    spec = Preprocess((4, 6), (0.5,) * 3, (0.5,) * 3)
    found = resampling(4, 6, spec)
    assert found.across.first.tolist() == list(range(6)) and found.down.weights.tolist() == [[1 << PRECISION_BITS]] * 4
    assert resampling(4, 6, spec) is found
