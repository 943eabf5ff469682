"""How the next token is chosen: the options of a request. `sampler.py` applies them.

Sampling(max_new_tokens=64, temperature=0.7, top_p=0.9, seed=1)
"""

from __future__ import annotations

from dataclasses import dataclass

from fmedge_runtimes.errors import RequestError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of one request; the defaults are greedy decoding.

    Raises RequestError when a value is outside its range.
    """

    max_new_tokens: int = 128
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0 draws from softmax(logits / temperature)."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities sum to top_p; 1 is off."""
    min_p: float = 0.0
    """Draw from tokens at least min_p times as likely as the most likely one; 0 is off."""
    repetition_penalty: float = 1.0
    """Divide (multiply, if negative) the logits of tokens seen in prompt or completion; 1 is off."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens seen in the completion."""
    frequency_penalty: float = 0.0
    """Subtract, once per occurrence, from the logits of tokens seen in the completion."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; they are not part of its text."""
    ignore_eos: bool = False
    """Go on past end-of-sequence tokens (for measurements)."""
    n: int = 1
    """Completions for each prompt."""
    seed: int | None = None
    """Draws depend on (seed, completion index, position) alone; None takes a fresh seed."""

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (0.0 <= self.temperature < float("inf"), "temperature", "0 or more"),
            (self.top_k >= 0, "top_k", "0 (off) or more"),
            (0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1 (off)"),
            (0.0 <= self.min_p <= 1.0, "min_p", "from 0 (off) to 1"),
            (0.0 < self.repetition_penalty < float("inf"), "repetition_penalty", "above 0 (1 is off)"),
            (abs(self.presence_penalty) < float("inf"), "presence_penalty", "finite"),
            (abs(self.frequency_penalty) < float("inf"), "frequency_penalty", "finite"),
            (not isinstance(self.stop, str), "stop", "a tuple of strings"),
            (all(isinstance(text, str) and text for text in self.stop), "stop", "non-empty strings"),
            (self.n >= 1, "n", "at least 1"),
            (self.seed is None or 0 <= self.seed < 2**64, "seed", "from 0 to 2**64 - 1"),
        )
        for valid, name, wanted in checks:
            if not valid:
                raise RequestError(f"Sampling.{name} is {getattr(self, name)!r}; it must be {wanted}.")
