"""One sequence while it is generated: its tokens, its text, and how it ends. It knows nothing of caches or threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fmedge_runtimes import sampler
from fmedge_runtimes.best_of import BestOf
from fmedge_runtimes.completion import Completion, Delta, FinishReason, Stats, TokenLogprob
from fmedge_runtimes.constraint import Constraint
from fmedge_runtimes.errors import FmedgeError
from fmedge_runtimes.manifest import TextFacts
from fmedge_runtimes.prompt_lookup import PromptLookup
from fmedge_runtimes.request import Request
from fmedge_runtimes.sampler import NO_TOKEN
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.summary import LogitsRow, logprob_from
from fmedge_runtimes.tokenizer import TextStream


@dataclass(slots=True, eq=False)
class Generation:
    """A sequence that is being generated for a request."""

    request: Request
    facts: TextFacts
    prompt_index: int
    index: int
    """Which of the prompt's n completions."""
    prompt: Sequence[int]
    sampling: Sampling
    text: TextStream | None
    started: float
    constraint: Constraint | None = None
    rivals: BestOf | None = None
    """The sequences that this one competes with; shared by those of a prompt that has best_of."""
    order: int = 0
    """Its place among all that ever came to the engine: the latest one gives way when memory is short."""
    state: sampler.Row | None = None
    """Made when it is first needed: it can be as large as the vocabulary, and thousands may wait."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reused: int = 0
    """Tokens of the prompt that were cached already."""
    first_token: float = 0.0
    lookup: PromptLookup = field(default_factory=PromptLookup)

    @property
    def cached(self) -> list[int]:
        """The tokens to prefill: the prompt, and what was generated before it had to wait again."""
        return [*self.prompt, *self.tokens]

    @property
    def room(self) -> int:
        """Tokens that can still come."""
        return min(
            self.sampling.max_new_tokens - len(self.tokens), self.facts.context - len(self.prompt) - len(self.tokens)
        )

    @property
    def sampler_row(self) -> sampler.Row:
        """What the sampler keeps between steps."""
        if self.state is None:
            self.state = sampler.Row(
                self.sampling,
                vocabulary=self.facts.vocabulary,
                seed=self.sampling.seed or 0,
                index=self.index,
                prompt=self.prompt,
                eos=self.facts.eos_token_ids,
                constraint=self.constraint,
            )
        return self.state

    def take(self, token: int, logits: LogitsRow, now: float) -> bool:
        """Take the token chosen from logits [V] and give out what text is certain; whether that was the last one.

        All logits are fetched only where they are needed: they may be on a device.
        """
        if token == NO_TOKEN:
            self.finish("error", sampler.fault(logits.whole(), self.sampler_row))
            return True
        if self.sampling.logprobs is not None or self.rivals is not None:
            top = self.sampling.logprobs or 0
            known = None if logits.summary is None else logprob_from(logits.summary, token, top)
            self.logprobs.append(known or sampler.logprob_of(logits.whole(), token, top))
        ended = self.sampler_row.ends(token)
        self.sampler_row.record(token)
        self.tokens.append(token)
        self.first_token = self.first_token or now
        text = self.text.push(token) if self.text is not None and ended is None else ""
        reason = ended or self._finish_reason()
        if reason is not None:
            self.finish(reason, None, text)
        elif text and self.rivals is None:
            self.request.put(Delta(self.prompt_index, self.index, text))
        return reason is not None

    def _finish_reason(self) -> FinishReason | None:
        if self.sampler_row.complete or (self.text is not None and self.text.stopped):
            return "stop"
        if len(self.tokens) >= self.sampling.max_new_tokens:
            return "length"
        if len(self.prompt) + len(self.tokens) >= self.facts.context:
            return "context"
        return None

    def finish(self, reason: FinishReason, error: FmedgeError | None = None, text: str = "") -> None:
        """End it: give out what text was held back, and the completion."""
        if self.text is not None:
            text += self.text.flush()
            if self.text.stopped and reason in ("eos", "length", "context"):
                reason = "stop"  # found in the text that was held back
        now = time.perf_counter()
        first = self.first_token or now
        later = len(self.tokens) - 1
        stats = Stats(
            prompt_tokens=len(self.prompt),
            new_tokens=len(self.tokens),
            first_token_seconds=first - self.started,
            seconds=now - self.started,
            decode_tokens_per_second=later / (now - first) if later > 0 and now > first else 0.0,
            reused_tokens=self.reused,
            drafted_tokens=self.lookup.drafted,
            accepted_tokens=self.lookup.accepted,
        )
        completion = Completion(
            prompt_index=self.prompt_index,
            index=self.index,
            text=self.text.text if self.text is not None else "",
            tokens=tuple(self.tokens),
            finish_reason=reason,
            seed=self.sampling.seed or 0,
            stats=stats,
            error=light(error) if error is not None else None,
            logprobs=None if self.sampling.logprobs is None else tuple(self.logprobs),
            cumulative_logprob=sum(one.logprob for one in self.logprobs) if self.logprobs else None,
        )
        self.request.row_finished()
        if self.rivals is None:
            self.request.put(Delta(self.prompt_index, self.index, text, completion))
            return
        for best in self.rivals.add(completion):
            self.request.put(Delta(best.prompt_index, best.index, best.text, best))


def refuse(request: Request, number: int, sampling: Sampling, started: float, error: FmedgeError) -> None:
    """Give a request the completion of a prompt that cannot be served."""
    seconds = time.perf_counter() - started
    stats = Stats(0, 0, seconds, seconds, 0.0)
    completion = Completion(number, 0, "", (), "error", sampling.seed or 0, stats, light(error))
    request.put(Delta(number, 0, "", completion))


def light(error: FmedgeError) -> FmedgeError:
    """The error without its traceback, whose frames would keep the cache alive as long as the completion."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
