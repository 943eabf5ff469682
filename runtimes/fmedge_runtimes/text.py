"""A text model: prompts in, completions out, many at once over one decoder and one cache.

    model = load("out/bundle")
    for completion in model.generate(["def fib(n):", "The list type"], Sampling(max_new_tokens=64)):
        print(completion.text)
    for delta in model.stream("Once"):
        print(delta.text, end="")

Requests join the batch as rows become free and leave it when they finish. What a request draws depends on its own
seed and position alone, never on its neighbours; docs/determinism.md says what rounding can still change.
"""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from fmedge_runtimes import sampler
from fmedge_runtimes.best_of import BestOf
from fmedge_runtimes.bundle import Bundle
from fmedge_runtimes.chat import ChatTemplate, Message
from fmedge_runtimes.completion import Completion, Delta, FinishReason, Stats, TokenLogprob
from fmedge_runtimes.constraint import Constraint, Constraints
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import BundleError, BundleFormatError, CacheMemoryError, FmedgeError, RequestError
from fmedge_runtimes.row_cache import RowCache
from fmedge_runtimes.sampler import NO_TOKEN, choose, fresh_seed
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.session import Session
from fmedge_runtimes.tokenizer import TextStream, Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""

MAX_BATCH = 16
"""Rows that are decoded together unless the caller says otherwise."""


@dataclass(slots=True)
class _Row:
    """A sequence that is being generated: one row of the batch."""

    prompt_index: int
    index: int
    prompt: Sequence[int]
    sampling: Sampling
    text: TextStream | None
    started: float
    rivals: BestOf | None
    """The completions that this one competes with; shared by the rows of a request that has best_of."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    state: sampler.Row | None = None
    """Made when the row joins the batch: it can be as large as the vocabulary, and thousands of rows may wait."""
    tokens: list[int] = field(default_factory=list)
    first_token: float = 0.0

    @property
    def cached(self) -> list[int]:
        """The tokens to prefill: the prompt, and what was generated before the row had to wait again."""
        return [*self.prompt, *self.tokens]


class TextModel:
    """A decoder with its tokenizer; `load` makes it. May be called from several threads."""

    def __init__(self, bundle: Bundle, session: Session, *, max_batch: int = MAX_BATCH) -> None:
        if max_batch < 1:
            raise RequestError(f"max_batch is {max_batch}; it must be at least 1.")
        facts = bundle.manifest.text
        self.bundle = bundle
        self.context = facts.context
        self.max_batch = max_batch
        self.tokenizer = Tokenizer(bundle.file(facts.tokenizer)) if facts.tokenizer else None
        # Added tokens may lie beyond the model; a prompt with one is refused.
        if self.tokenizer is not None and self.tokenizer.base_size > facts.vocabulary:
            raise BundleError(
                f"{bundle.folder}: the tokenizer has {self.tokenizer.base_size} tokens, the model {facts.vocabulary}; "
                "they do not belong together: export the bundle again."
            )
        try:
            self.default_sampling = Sampling(**facts.sampling.model_dump())
        except RequestError as error:
            raise BundleFormatError(f"{bundle.folder}: text.sampling: {error}") from error
        self._decoder = Decoder(session, facts)
        self._eos = frozenset(facts.eos_token_ids)
        self._constraints = Constraints(self.tokenizer, facts.vocabulary) if self.tokenizer else None
        self._template = (
            ChatTemplate(bundle.file(facts.chat_template).read_text("utf-8"), facts.special_tokens)
            if facts.chat_template
            else None
        )
        # The cache of the last call, kept for the next one; concurrent calls make their own.
        self._idle_caches: deque[RowCache] = deque(maxlen=1)
        self._closed = False

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Complete prompts in one batch; results are in the order of the prompts, n for each.

        `sampling` is for all prompts, or one for each; None takes the bundle's recommended one. A prompt that cannot be
        served gives a completion with finish_reason "error" and its reason; the others complete all the same.

        Raises RequestError when the call itself is wrong, BackendError when the graph fails.
        """
        completions = [delta.completion for delta in self.stream(prompts, sampling) if delta.completion]
        return sorted(completions, key=lambda completion: (completion.prompt_index, completion.index))

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Generator[Delta, None, None]:
        """Like generate, but yields text as it comes; the last delta of each completion carries the completion.

        Close the generator, or read it to its end, to have the memory of its cache used again.
        """
        self._check_open()
        return self._stream(self._requests(prompts, sampling))

    def _stream(self, requests: Sequence[tuple[Prompt, Sampling]]) -> Generator[Delta, None, None]:
        cache = self._take_cache()
        try:
            yield from self._run(requests, cache)
        finally:
            cache.clear()
            if not self._closed:
                self._idle_caches.append(cache)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as token ids, by the model's own template, ready to be completed.

        Raises RequestError when the model has no chat template, or the template refuses the messages.
        """
        if self._template is None or self.tokenizer is None:
            raise RequestError(
                f"{self.bundle.folder} has no chat template: this model completes text, it does not chat."
            )
        # The template writes the special tokens itself.
        return self.tokenizer.encode(self._template.render(messages), special=False)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.floating]:
        """The logits [S, V] behind every token of a text. Raises RequestError."""
        self._check_open()
        tokens = _ids(tokens)
        self._check_tokens(tokens, room=0)
        return self._decoder.score(self._decoder.new_cache(), tokens)

    def close(self) -> None:
        """Give the model's memory back; it cannot be used afterwards."""
        self._closed = True
        self._idle_caches.clear()
        self._decoder.session.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(f"the model of {self.bundle.folder} is closed; load it again.")

    def __enter__(self) -> TextModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None
    ) -> list[tuple[Prompt, Sampling]]:
        listed: list[Prompt]
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            listed = [prompts]  # type: ignore[list-item]  # a single prompt, by the check
        else:
            listed = list(prompts)  # type: ignore[arg-type]
        if sampling is None:
            sampling = self.default_sampling
        each = [sampling] * len(listed) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(listed):
            raise RequestError(f"{len(listed)} prompts with {len(each)} Samplings; give one for all, or one for each.")
        return list(zip(listed, each, strict=True))

    def _take_cache(self) -> RowCache:
        try:
            return self._idle_caches.pop()
        except IndexError:
            return self._decoder.new_cache()

    def _run(self, requests: Sequence[tuple[Prompt, Sampling]], cache: RowCache) -> Iterator[Delta]:
        """The loop: admit rows while there is room, decode all of them, choose tokens, let go of the finished."""
        started = time.perf_counter()
        waiting: deque[_Row] = deque()
        for number, (prompt, sampling) in enumerate(requests):
            try:
                waiting.extend(self._rows(number, prompt, sampling, started))
            except FmedgeError as error:
                yield _refused(number, sampling, started, error)
        live: list[_Row] = []
        while waiting or live:
            yield from self._admit(waiting, live, cache)
            if live:
                yield from self._step(waiting, live, cache)

    def _rows(self, number: int, prompt: Prompt, sampling: Sampling, started: float) -> list[_Row]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(f"{self.bundle.folder} has no tokenizer; give prompts as token ids.")
            if not prompt:
                raise RequestError(f"prompt {number} is empty; give it at least one character.")
            tokens: Sequence[int] = self.tokenizer.encode(prompt)
        else:
            tokens = _ids(prompt)
        if sampling.stop and self.tokenizer is None:
            raise RequestError(
                f"{self.bundle.folder} has no tokenizer, so stop strings cannot be found; leave them out."
            )
        self._check_tokens(tokens, room=1)
        sampling.check_vocabulary(self._decoder.facts.vocabulary)
        self._constraint(sampling)
        seed = fresh_seed() if sampling.seed is None else sampling.seed
        sampling = replace(sampling, seed=seed)
        rivals = None if sampling.best_of is None else BestOf(sampling)
        return [
            _Row(
                number,
                index,
                tokens,
                sampling,
                TextStream(self.tokenizer, sampling.stop, continues=True) if self.tokenizer else None,
                started,
                rivals,
            )
            for index in range(sampling.rows)
        ]

    def _constraint(self, sampling: Sampling) -> Constraint | None:
        if sampling.constraint is None:
            return None
        if self._constraints is None:
            raise RequestError(f"{self.bundle.folder} has no tokenizer, so its text cannot be constrained.")
        return self._constraints.compile(sampling)

    def _check_tokens(self, tokens: Sequence[int], room: int) -> None:
        vocabulary = self._decoder.facts.vocabulary
        if not tokens:
            raise RequestError("the prompt has no tokens.")
        if len(tokens) + room > self.context:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.context}, which leaves no room for a "
                "completion; shorten it, or export with a larger --context if the model allows it."
            )
        wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is outside the vocabulary of {vocabulary}.")

    def _admit(self, waiting: deque[_Row], live: list[_Row], cache: RowCache) -> Iterator[Delta]:
        """Prefill waiting rows while there is room for them; completions of one prompt share its prefill."""
        rows = min(self.max_batch, len(live) + len(waiting))
        last: tuple[list[int], int, npt.NDArray[np.floating]] | None = None
        while waiting and len(live) < rows:
            row = waiting[0]
            slot, tokens = len(live), row.cached
            try:
                cache.reserve(rows, len(tokens) + 1)
                if last is not None and last[0] == tokens:
                    logits = last[2]
                    # A row that ended with its first token has left the slot, and its cache in it.
                    if last[1] == slot:
                        cache.cut(slot, len(tokens))
                    else:
                        cache.copy(last[1], slot, len(tokens))
                else:
                    logits = self._decoder.prefill(cache, slot, tokens)
            except CacheMemoryError as error:
                if rows > slot + 1:
                    rows = (rows + slot + 1) // 2  # try with fewer
                    continue
                if live:
                    return  # rows that finish make room
                waiting.popleft()
                yield from self._finish(row, "error", error)
                rows, last = min(self.max_batch, len(waiting)), None
                continue
            waiting.popleft()
            live.append(row)
            if row.state is None:
                row.state = self._sampler_row(row)
            yield from self._take(live, cache, logits[None], first=slot)
            last = (tokens, slot, logits)

    def _sampler_row(self, row: _Row) -> sampler.Row:
        return sampler.Row(
            row.sampling,
            vocabulary=self._decoder.facts.vocabulary,
            seed=row.sampling.seed or 0,
            index=row.index,
            prompt=row.prompt,
            eos=self._eos,
            constraint=self._constraint(row.sampling),
        )

    def _step(self, waiting: deque[_Row], live: list[_Row], cache: RowCache) -> Iterator[Delta]:
        """One token for every live row; where memory does not suffice for all, the last requests wait again."""
        while live:
            try:
                logits = self._decoder.decode(cache, [row.tokens[-1] for row in live])  # [R, V]
            except CacheMemoryError:
                # A last row waits, too: into an empty cache it may still fit.
                latest = max(range(len(live)), key=lambda slot: (live[slot].prompt_index, live[slot].index))
                waiting.appendleft(live[latest])
                _drop(live, cache, latest)
                continue
            yield from self._take(live, cache, logits, first=0)
            return

    def _take(self, live: list[_Row], cache: RowCache, logits: npt.NDArray[np.floating], first: int) -> Iterator[Delta]:
        """Choose a token for the rows from `first` on, emit their text, drop those that finish."""
        states = [row.state for row in live[first:] if row.state is not None]  # a live row has one
        chosen = choose(logits, states)
        now = time.perf_counter()
        for slot in range(len(live) - 1, first - 1, -1):
            row, state, token = live[slot], states[slot - first], int(chosen[slot - first])
            if token == NO_TOKEN:
                yield from self._finish(row, "error", sampler.fault(logits[slot - first], state))
                _drop(live, cache, slot)
                continue
            if row.sampling.logprobs is not None or row.rivals is not None:
                row.logprobs.append(sampler.logprob_of(logits[slot - first], token, row.sampling.logprobs or 0))
            ended = state.ends(token)
            state.record(token)
            row.tokens.append(token)
            row.first_token = row.first_token or now
            text = row.text.push(token) if row.text is not None and ended is None else ""
            reason = ended or self._finish_reason(row, state)
            if reason is not None:
                yield from self._finish(row, reason, None, text)
                _drop(live, cache, slot)
            elif text and row.rivals is None:
                yield Delta(row.prompt_index, row.index, text)

    def _finish_reason(self, row: _Row, state: sampler.Row) -> FinishReason | None:
        if state.complete or (row.text is not None and row.text.stopped):
            return "stop"
        if len(row.tokens) >= row.sampling.max_new_tokens:
            return "length"
        if len(row.prompt) + len(row.tokens) >= self.context:
            return "context"
        return None

    def _finish(self, row: _Row, reason: FinishReason, error: FmedgeError | None, text: str = "") -> Iterator[Delta]:
        """The last delta of a row: what text was held back, and the completion. With best_of, once all are in."""
        if row.text is not None:
            text += row.text.flush()
            if row.text.stopped and reason != "error":
                reason = "stop"  # found in the text that was held back
        now = time.perf_counter()
        first = row.first_token or now
        later = len(row.tokens) - 1
        stats = Stats(
            prompt_tokens=len(row.prompt),
            new_tokens=len(row.tokens),
            first_token_seconds=first - row.started,
            seconds=now - row.started,
            decode_tokens_per_second=later / (now - first) if later > 0 and now > first else 0.0,
        )
        completion = Completion(
            prompt_index=row.prompt_index,
            index=row.index,
            text=row.text.text if row.text is not None else "",
            tokens=tuple(row.tokens),
            finish_reason=reason,
            seed=row.sampling.seed or 0,
            stats=stats,
            error=_light(error) if error is not None else None,
            logprobs=None if row.sampling.logprobs is None else tuple(row.logprobs),
            cumulative_logprob=sum(one.logprob for one in row.logprobs) if row.logprobs else None,
        )
        if row.rivals is None:
            yield Delta(row.prompt_index, row.index, text, completion)
        else:
            for best in row.rivals.add(completion):
                yield Delta(best.prompt_index, best.index, best.text, best)


def _drop(live: list[_Row], cache: RowCache, slot: int) -> None:
    """Let go of a row; the last one takes its place, in the cache and in the list alike."""
    last = len(live) - 1
    if slot != last:
        cache.copy(last, slot, int(cache.lengths[last]))
    cache.cut(last, 0)
    live[slot] = live[last]
    live.pop()


def _refused(number: int, sampling: Sampling, started: float, error: FmedgeError) -> Delta:
    seconds = time.perf_counter() - started
    stats = Stats(0, 0, seconds, seconds, 0.0)
    completion = Completion(number, 0, "", (), "error", sampling.seed or 0, stats, _light(error))
    return Delta(number, 0, "", completion)


def _light(error: FmedgeError) -> FmedgeError:
    """The error without its traceback, whose frames would keep the cache alive as long as the completion."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _ids(prompt: Sequence[int]) -> list[int]:
    """Token ids as plain numbers, whatever integer type they have."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise RequestError(f"a prompt is neither text nor token ids ({error}); give a str or whole numbers.") from error
