"""Doubly stochastic mixing of histograms: the paper's Sinkhorn fit, and the exact test of whether a mixing exists."""

import numpy as np

from corey._check import bad_value
from corey.entropy import widened_range

TEMPERATURE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # times the squared bin spacing, as published


def shared_histograms(before: np.ndarray, after: np.ndarray, num_bins: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the values of `before` and `after` in `num_bins` common bins, over their joint range widened by 5 %."""
    lo, hi = widened_range(min(before.min(), after.min()), max(before.max(), after.max()))
    counts = [np.histogram(values, bins=num_bins, range=(lo, hi))[0] for values in (before, after)]
    return counts[0] / before.size, counts[1] / after.size


def mixing_matrix(num_bins: int, temperature_factor: float, sweeps: int = 200) -> np.ndarray:
    """B (num_bins, num_bins): the Gaussian kernel exp(-(i - j)^2 / factor) scaled to unit row and column sums.

    Rows, then columns, `sweeps` times, so column sums are exact and row sums nearly so. In units of the bin spacing the
    kernel does not depend on the data.
    """
    if num_bins < 2:
        raise bad_value("num_bins", num_bins, "at least 2")
    if not temperature_factor > 0:
        raise bad_value("temperature_factor", temperature_factor, "a positive number")
    if sweeps < 1:
        raise bad_value("sweeps", sweeps, "at least 1")
    bins = np.arange(num_bins)
    mixing = np.exp(-((bins[:, None] - bins[None, :]) ** 2) / temperature_factor)
    for _ in range(sweeps):
        mixing /= mixing.sum(axis=1, keepdims=True)
        mixing /= mixing.sum(axis=0, keepdims=True)
    return mixing


def mixing_error(p: np.ndarray, q: np.ndarray, mixing: np.ndarray) -> float:
    """The L1 distance between B p and q."""
    return float(np.abs(mixing @ p - q).sum())


def best_factor(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The published temperature factor with the lowest mean L1 error over `pairs` of (p, q)."""
    if not pairs:
        raise bad_value("pairs", "none", "at least one (p, q)")
    num_bins = pairs[0][0].size
    matrices = {factor: mixing_matrix(num_bins, factor) for factor in TEMPERATURE_FACTORS}
    return min(matrices, key=lambda factor: np.mean([mixing_error(p, q, matrices[factor]) for p, q in pairs]))


def majorises(p: np.ndarray, q: np.ndarray, tolerance: float = 1e-12) -> bool:
    """Whether some doubly stochastic B gives q = B p: every partial sum of p's largest shares is at least q's.

    The theorem of Hardy, Littlewood and Polya. Where it fails, no mixing, of any kernel, turns p into q.
    """
    return bool((np.cumsum(np.sort(p)[::-1]) >= np.cumsum(np.sort(q)[::-1]) - tolerance).all())


def share_entropy(p: np.ndarray) -> float:
    """-sum p ln p in nats."""
    filled = p[p > 0]
    return float(-(filled * np.log(filled)).sum())
