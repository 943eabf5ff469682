"""What the schedulers share that walk over the table of the training timesteps."""

from __future__ import annotations

from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.schedulers.scheduler import Array, Scalar, combine


def diffused(original: Array, noise: Array, alpha: Scalar, sigma: Scalar) -> Array:
    """The forward process: alpha * clean + sigma * noise. [B, ...]."""
    return combine((alpha, original), (sigma, noise))


def check_signal(signal: Array, prediction: str) -> None:
    """Raise RequestError where the clean sample cannot be recovered from noise: a timestep without signal."""
    if prediction == "epsilon" and not signal.all():
        raise RequestError(
            "with rescale_betas_zero_snr the first timestep is noise alone, from which a prediction of noise recovers "
            "nothing; use a model with v_prediction, timestep_spacing leading, or the scheduler euler."
        )
