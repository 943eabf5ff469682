"""What a bundle may differ from its source by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fmedge_runtimes.manifest import TextFacts


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a precision may differ by before the export stops."""

    near_tie: float
    """Two logits closer than this are level: fp32 kernels add in different orders."""
    mean_kl: float
    """Mean KL divergence to PyTorch's distribution, in nats per token."""
    perplexity_ratio: float
    """Perplexity of the bundle over perplexity of the source."""

    def excesses(self, mean_kl: float, perplexity: float, of_source: float) -> Iterator[str]:
        """What a divergence and a perplexity have beyond it, in words; nothing if they are within."""
        if not mean_kl <= self.mean_kl:
            yield f"the KL divergence is {mean_kl:.3g} nats per token, where {self.mean_kl:g} is the most"
        if not perplexity <= of_source * self.perplexity_ratio:
            yield f"the perplexity is {perplexity:.4g}, where {of_source * self.perplexity_ratio:.4g} is the most"


TOLERANCES = {
    ("float32", "none"): Tolerance(near_tie=1e-3, mean_kl=1e-5, perplexity_ratio=1.0005),
    ("float16", "none"): Tolerance(near_tie=5e-2, mean_kl=1e-3, perplexity_ratio=1.01),
    ("float32", "fp16"): Tolerance(near_tie=5e-2, mean_kl=1e-3, perplexity_ratio=1.01),
    ("float32", "bf16"): Tolerance(near_tie=0.1, mean_kl=5e-3, perplexity_ratio=1.02),
    ("float32", "int8"): Tolerance(near_tie=0.25, mean_kl=0.05, perplexity_ratio=1.05),
    ("float16", "int8"): Tolerance(near_tie=0.25, mean_kl=0.05, perplexity_ratio=1.05),
    ("float32", "w8a8"): Tolerance(near_tie=0.25, mean_kl=0.05, perplexity_ratio=1.05),
    ("float16", "w8a8"): Tolerance(near_tie=0.25, mean_kl=0.05, perplexity_ratio=1.05),
    ("float16", "fp8"): Tolerance(near_tie=0.25, mean_kl=0.1, perplexity_ratio=1.1),
    ("float32", "int4"): Tolerance(near_tie=0.25, mean_kl=0.35, perplexity_ratio=1.35),
    ("float16", "int4"): Tolerance(near_tie=0.25, mean_kl=0.35, perplexity_ratio=1.35),
}
"""By (compute type, quantization); int4-gptq and the like may differ by no more than int4."""


def tolerance_of(facts: TextFacts, quantize: str) -> Tolerance:
    """What a decoder with those weights and caches may differ by; a quantized cache is no better than int8 weights."""
    if quantize == "none" and _is_cache_quantized(facts):
        quantize = "int8"
    return TOLERANCES[facts.cache_dtype, quantize.split("-")[0]]


def is_exact(facts: TextFacts, quantize: str) -> bool:
    """Whether every greedy token must be PyTorch's own."""
    return (facts.cache_dtype, quantize) == ("float32", "none") and not _is_cache_quantized(facts)


def _is_cache_quantized(facts: TextFacts) -> bool:
    return any(cache.quantization is not None for cache in facts.caches)
