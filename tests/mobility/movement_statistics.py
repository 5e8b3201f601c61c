"""Plain statistics for the tests: distances of distributions, and how large they may be."""

import numpy as np


def ks(sample, cdf) -> float:
    """Kolmogorov-Smirnov distance times sqrt(n): above 1.95 in one of 1,000 true samples."""
    ordered = np.sort(np.asarray(sample))
    told = cdf(ordered)
    n = len(ordered)
    up = np.arange(1, n + 1) / n - told
    down = told - np.arange(n) / n
    return float(np.sqrt(n) * max(up.max(), down.max()))


def ks_two(a, b) -> float:
    """The same for two samples, scaled by sqrt(n m / (n + m))."""
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    far = np.abs(
        np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)
    ).max()
    return float(np.sqrt(len(a) * len(b) / (len(a) + len(b))) * far)


ALLOWED = 1.95
