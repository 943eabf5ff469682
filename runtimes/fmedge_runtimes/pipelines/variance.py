"""Whether a scheduler wants the variance that a denoiser predicts beside the noise: Nichol and Dhariwal 2021."""

from __future__ import annotations

from fmedge_runtimes.schedulers import SchedulerConfig

LEARNED = ("learned", "learned_range")


def learns_variance(config: SchedulerConfig) -> bool:
    """Whether it does; if not, the channels behind the noise are dropped."""
    return getattr(config.settings, "variance_type", None) in LEARNED
