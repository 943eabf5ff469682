"""The step of DDPM: mean and variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, arXiv 2006.11239, eqs. 6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fmedge_runtimes.schedulers.scheduler import Array

SMALLEST = np.float32(1e-20)


@dataclass(frozen=True, slots=True)
class Posterior:
    """For each step, float32 [N]: the mean is clean * x_0 + sample * x_t."""

    clean: Array
    sample: Array
    variance: Array
    beta: Array


def posterior(signal: Array, left: Array, kept: Array, beta: Array) -> Posterior:
    """From the cumulated alphas before and after each step, and the step's own alpha and beta; all float32 [N]."""
    noise, noise_left = np.float32(1) - signal, np.float32(1) - left
    variance = noise_left / noise * beta
    return Posterior(
        clean=np.sqrt(left) * beta / noise,
        sample=np.sqrt(kept) * noise_left / noise,
        variance=np.maximum(variance, SMALLEST),
        beta=beta,
    )


def deviation_between(found: Posterior, index: int, predicted: Array) -> Array:
    """Standard deviation [B, ...] where the network chooses, from -1 to 1, between the posterior's variance and beta.

    Interpolated in the logarithm (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15).
    """
    low, high = np.log(found.variance[index]), np.log(found.beta[index])
    exponent = predicted * np.float32((high - low) / 4)
    exponent += np.float32((high + low) / 4)
    np.exp(exponent, out=exponent)
    return exponent


def halves(output: Array, channels: int) -> tuple[Array, Array | None]:
    """The prediction and the predicted variance of a network that gives both, one after the other; or None."""
    if output.shape[1] == 2 * channels:
        return output[:, :channels], output[:, channels:]
    return output, None
