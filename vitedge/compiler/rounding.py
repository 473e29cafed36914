"""A Linear's weight and the covariance of its input in, integers out, with the error where it does the least harm.

    images -> x -> Moments (mean, covariance)     W, covariance -> GPTQ -> int8 W'     mean (W - W') -> the bias

Rounding each weight to nearest is best only where no two inputs are alike. GPTQ (Frantar et al., ICLR 2023) rounds one input
after the other, those with the most energy first, and lets the inputs not yet rounded make up for what was lost. The input
that counts is the quantized one: its rounding noise, step^2 / 12 on the diagonal, keeps it from leaning on differences that
INT8 cannot tell apart. What is left of the mean error goes into the bias, which is why the covariance and not the second moment
decides. Knows nothing of graphs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DAMPING = 0.01  # of the mean diagonal, added to it: GPTQ's own choice
BLOCK = 64  # inputs rounded before the others hear of it
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class Moments:
    """Mean and covariance of the channels of a tensor, [..., channels], in one pass (Chan et al. 1979)."""

    def __init__(self, *, covariance: bool = True) -> None:
        self.count = 0
        self.mean: Float64 = np.zeros(0)
        self.scatter: Float64 | None = np.zeros((0, 0)) if covariance else None

    def add(self, x: Float32) -> None:
        """Take in the tokens of one image."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.count:
            self.mean = np.zeros(rows.shape[1])
            self.scatter = None if self.scatter is None else np.zeros((rows.shape[1],) * 2)
        mean = rows.mean(axis=0, dtype=np.float64)
        apart, total = mean - self.mean, self.count + len(rows)
        if self.scatter is not None:
            centered = rows - mean.astype(np.float32)
            self.scatter += centered.T @ centered
            self.scatter += np.outer(apart, apart * (self.count * len(rows) / total))
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Float64:
        """float64[channels, channels]; only where it was asked for."""
        assert self.scatter is not None
        return self.scatter / self.count


def round_to_nearest(weight: NDArray[np.floating], scales: NDArray[np.floating], qmax: int) -> NDArray[np.int8]:
    """`weight`, float[inputs, outputs], in steps of `scales`, one or one an output, half to even as QuantizeLinear rounds."""
    integers: NDArray[np.int8] = np.clip(np.rint(weight / scales), -qmax, qmax).astype(np.int8)
    return integers


def round_by_covariance(
    weight: NDArray[np.floating], scales: NDArray[np.floating], qmax: int, covariance: Float64, noise: float = 0.0
) -> NDArray[np.int8]:
    """`weight`, float[inputs, outputs], in steps of `scales`, so that the outputs change least for inputs of `covariance`.

    covariance: float64[inputs, inputs]. noise: the variance that quantizing adds to each input.
    """
    order = np.argsort(-np.diagonal(covariance), kind="stable")
    rest = weight[order].astype(np.float64)
    rounded = np.empty(rest.shape, np.int8)
    upper = _inverse_factor(covariance[np.ix_(order, order)], noise)
    for first in range(0, len(rest), BLOCK):
        block = slice(first, min(first + BLOCK, len(rest)))
        rounded[block], errors = _round_block(rest[block], scales, qmax, upper[block, block])
        rest[block.stop :] -= upper[block, block.stop :].T @ errors
    result = np.empty_like(rounded)
    result[order] = rounded
    return result


def _inverse_factor(covariance: Float64, noise: float) -> Float64:
    """The upper triangular U with U^T U = the inverse of the damped covariance."""
    diagonal = np.diagonal(covariance)
    damped = covariance + np.eye(len(covariance)) * (noise + max(DAMPING * float(diagonal.mean()), 1e-12))
    # with J the reversal: J C J = L L^T, so C = (J L J)(J L J)^T with an upper factor, whose inverse transposed is lower
    reversed_lower = np.linalg.cholesky(damped[::-1, ::-1])
    upper = reversed_lower[::-1, ::-1]
    inverse: Float64 = np.linalg.inv(upper)
    return inverse


def _round_block(block: Float64, scales: NDArray[np.floating], qmax: int, upper: Float64) -> tuple[NDArray[np.int8], Float64]:
    """The integers of a block of inputs, and what each leaves to the inputs behind, in units of its diagonal."""
    block, rounded, errors = block.copy(), np.empty(block.shape, np.int8), np.empty_like(block)
    for row in range(len(block)):
        rounded[row] = round_to_nearest(block[row], scales, qmax)
        errors[row] = (block[row] - rounded[row] * scales) / upper[row, row]
        block[row + 1 :] -= np.outer(upper[row, row + 1 :], errors[row])
    return rounded, errors
