"""What the denoiser predicts, turned into the clean sample or into the noise.

A noisy sample is alpha * clean + sigma * noise. The network predicts the noise (epsilon: Ho et al. 2020, arXiv
2006.11239), the clean sample, or v = alpha * noise - sigma * clean (Salimans and Ho 2022, arXiv 2202.00512).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from fmedge_runtimes.schedulers.scheduler import Array, Scalar, combine

Prediction = Literal["epsilon", "sample", "v_prediction"]
Limit = Callable[[Array], Array]


def clean_of(kind: str, output: Array, sample: Array, alpha: Scalar, sigma: Scalar) -> Array:
    """The clean sample [B, ...]; the output itself if the network predicts that."""
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return combine((alpha, sample), (-sigma, output))
    clean = output * np.float32(-sigma)
    clean += sample
    clean /= np.float32(alpha)
    return clean


def noise_of(kind: str, output: Array, sample: Array, alpha: Scalar, sigma: Scalar) -> Array:
    """The noise [B, ...]; the output itself if the network predicts that."""
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return combine((alpha, output), (sigma, sample))
    return between(sample, output, alpha, sigma)


def between(sample: Array, clean: Array, alpha: Scalar, sigma: Scalar) -> Array:
    """The noise [B, ...] that lies between a sample and its clean form."""
    noise = clean * np.float32(-alpha)
    noise += sample
    noise /= np.float32(sigma)
    return noise


def clean_of_unscaled(kind: str, output: Array, sample: Array, sigma: Scalar) -> Array:
    """The clean sample [B, ...] where samples are clean + sigma * noise, scaled only for the denoiser."""
    if kind in ("sample", "original_sample"):
        return output
    if kind == "v_prediction":
        power = np.float32(sigma) ** 2 + np.float32(1)
        clean = sample / power
        clean += output * (-sigma / np.sqrt(power))
        return clean
    return combine((1.0, sample), (-sigma, output))


def limiter(*, clip: float | None, threshold: tuple[float, float] | None) -> Limit:
    """What bounds a clean sample: thresholding by (ratio, maximum) goes before clipping; neither leaves it as it is."""
    if threshold is not None:
        ratio, maximum = threshold
        return lambda clean: dynamically_thresholded(clean, ratio, maximum)
    if clip is not None:
        bound = np.float32(clip)
        return lambda clean: np.clip(clean, -bound, bound)
    return lambda clean: clean


def dynamically_thresholded(clean: Array, ratio: float, maximum: float) -> Array:
    """Each row [B, ...] clipped to its own quantile of |value|, 1 at least and `maximum` at most, and divided by it.

    Saharia et al. 2022 (Imagen), arXiv 2205.11487, section 2.3.
    """
    rows = np.abs(clean).reshape(len(clean), -1)  # [B, n]
    rank = np.float32(ratio) * np.float32(rows.shape[1] - 1)
    low = int(rank)
    high = min(low + 1, rows.shape[1] - 1)
    rows.partition((low, high), axis=1)
    weight = rank - np.float32(low)
    quantile = rows[:, low] + weight * (rows[:, high] - rows[:, low])
    bound = np.clip(quantile, np.float32(1), np.float32(maximum))
    bound = bound.reshape(-1, *(1,) * (clean.ndim - 1))  # [B, 1, ...]
    limited: Array = np.clip(clean, -bound, bound)
    limited /= bound
    return limited
