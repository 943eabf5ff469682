"""What a request gives back: deltas while it runs, a completion at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fmedge_runtimes.errors import FmedgeError

FinishReason = Literal["eos", "stop", "length", "context", "cancelled", "timeout", "error"]
"""eos: an end-of-sequence token. stop: a stop string, a stop token, or a constraint that allows nothing more.
length: max_new_tokens reached. context: the model's context is full. cancelled: by the caller, or because the model was
closed. timeout: the request's own. error: see Completion.error.
A constrained text that ended by eos or stop is complete; one that ended otherwise may not be."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts and wall-clock times of one completion."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    """From the call of generate to the first token of this completion."""
    seconds: float
    """From the call of generate to the end of this completion."""
    decode_tokens_per_second: float
    """Tokens after the first one per second, while other rows of the batch were served too."""
    reused_tokens: int = 0
    """Tokens of the prompt that were not computed: another row had them in its cache."""
    drafted_tokens: int = 0
    """Tokens that prompt lookup guessed."""
    accepted_tokens: int = 0
    """Those of them that were right, and so needed no step of their own."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model held a generated token: natural logarithms, before any option of Sampling changed them."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens in its place and their log-probabilities, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The result of one prompt (or of one of its n completions)."""

    prompt_index: int
    index: int
    """Which of the prompt's n completions; with best_of, its rank among them."""
    text: str
    tokens: tuple[int, ...]
    """Generated token ids, the end-of-sequence or stop token included."""
    finish_reason: FinishReason
    seed: int
    stats: Stats
    error: FmedgeError | None = None
    """Why the prompt was refused or stopped, with finish_reason "error"."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each token, if Sampling.logprobs asked for them."""
    cumulative_logprob: float | None = None
    """The sum of the tokens' log-probabilities, if logprobs or best_of needed it."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a completion's text; the last one carries the completion."""

    prompt_index: int
    index: int
    text: str
    completion: Completion | None = None
