"""A text model: prompts in, completions out, many at once over one decoder and one cache.

    model = load("out/bundle")
    for completion in model.generate(["def fib(n):", "The list type"], Sampling(max_new_tokens=64)):
        print(completion.text)
    for delta in model.stream("Once"):
        print(delta.text, end="")
    request = model.submit("Once"); ...; request.cancel()
    completions = await model.agenerate("Once")

All calls, from whatever thread or coroutine, are served by one engine, whose rows they share; docs/engine.md says how.
What a request draws depends on its own seed and position alone, never on its neighbours; docs/determinism.md says what
rounding can still change.
"""

from __future__ import annotations

import math
import operator
import time
import weakref
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.best_of import BestOf
from fmedge_runtimes.bundle import Bundle
from fmedge_runtimes.chat import ChatTemplate, Message
from fmedge_runtimes.completion import Completion, Delta
from fmedge_runtimes.constraint import Constraint, Constraints
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.engine import DEFAULTS, Engine, EngineOptions
from fmedge_runtimes.errors import BundleError, BundleFormatError, FmedgeError, RequestError
from fmedge_runtimes.generation import Generation, refuse
from fmedge_runtimes.plan import what_fits
from fmedge_runtimes.request import Request
from fmedge_runtimes.sampler import fresh_seed
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.session import Session
from fmedge_runtimes.tokenizer import TextStream, Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""


class TextModel:
    """A decoder with its tokenizer; `load` makes it. May be called from several threads."""

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        options: EngineOptions = DEFAULTS,
        candidates: Session | None = None,
        prefill: Session | None = None,
        *,
        batches: bool = False,
    ) -> None:
        """`candidates` summarises logits on the device of `session`; without it they come to the host.

        `prefill` is the graph for prompts, and with `batches` for steps of many rows.
        """
        facts = bundle.manifest.text
        self.bundle = bundle
        self.context = facts.context
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
        template = bundle.chat_template()
        self._template = None if template is None else ChatTemplate(template, facts.special_tokens)
        self._constraints = Constraints(self.tokenizer, facts.vocabulary) if self.tokenizer else None
        self._decoder = Decoder(session, facts, candidates, prefill, batches=batches)
        self.options = self._within(options)

        def said(rows: int, cache_bytes: int) -> str:
            free = session.free_memory()
            return what_fits(bundle, rows, None if free is None else free + cache_bytes + bundle.nbytes)

        # Not a method: the engine's thread must not keep the model.
        self._engine = Engine(self._decoder, self.options, said)
        # The engine's thread ends with the model, closed or forgotten, and before the interpreter does.
        self._end = weakref.finalize(self, self._engine.close)

    def _within(self, options: EngineOptions) -> EngineOptions:
        """The options, with no more rows than the graph takes. Raises RequestError if more were asked for."""
        most = self._decoder.most_rows
        if most is None or options.max_batch <= most:
            return options
        if options.max_batch != DEFAULTS.max_batch:
            raise RequestError(
                f"max_batch is {options.max_batch}, and the engine was built for {most} rows; "
                f"build it for more: fmedge build {self.bundle.folder} --rows {options.max_batch}"
            )
        return replace(options, max_batch=most)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Completion]:
        """Complete prompts; results are in the order of the prompts, n for each.

        `sampling` is for all prompts, or one for each; None takes the bundle's recommended one. A prompt that cannot be
        served gives a completion with finish_reason "error" and its reason; the others complete all the same. What is
        unfinished after `timeout` seconds ends with finish_reason "timeout" and the text so far.

        Raises RequestError when the call itself is wrong, QueueFullError when too many wait already, BackendError when
        the graph fails.
        """
        request = self.submit(prompts, sampling, timeout=timeout)
        try:
            return request.result()
        finally:
            request.cancel()

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        timeout: float | None = None,
    ) -> Generator[Delta, None, None]:
        """Like generate, but yields text as it comes; the last delta of each completion carries the completion.

        Nothing runs before the first delta is asked for. Close the generator, or read it to its end, to have its rows
        used by others.
        """
        asked = self._asked(prompts, sampling)

        def deltas() -> Generator[Delta, None, None]:
            request = self._submit(asked, timeout)
            try:
                yield from request
            finally:
                request.cancel()

        return deltas()

    def submit(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        timeout: float | None = None,
    ) -> Request:
        """Start what generate does and return at once: iterate the request, ask for its result, or cancel it."""
        return self._submit(self._asked(prompts, sampling), timeout)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Completion]:
        """Like generate, for coroutines; one that is cancelled cancels its request."""
        return await self.submit(prompts, sampling, timeout=timeout).wait()

    async def astream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Like stream, for coroutines: `async for delta in model.astream("Once")`."""
        request = self.submit(prompts, sampling, timeout=timeout)
        try:
            async for delta in request:
                yield delta
        finally:
            request.cancel()

    def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """A conversation as token ids, by the model's own template, ready to be completed.

        `tools` are JSON schemas of functions that the model may call. Raises RequestError when the model has no chat
        template, the template has no place for tools, or it refuses the messages.
        """
        if self._template is None or self.tokenizer is None:
            raise RequestError(
                f"{self.bundle.folder} has no chat template: this model completes text, it does not chat."
            )
        if tools is not None and not self._template.takes_tools:
            raise RequestError(f"the chat template of {self.bundle.folder} has no place for tools; leave them out.")
        # The template writes the special tokens itself.
        return self.tokenizer.encode(self._template.render(messages, tools=tools), special=False)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.floating]:
        """The logits [S, V] behind every token of a text, computed beside what the engine does. Raises RequestError."""
        self._check_open()
        tokens = _ids(tokens)
        self._check_tokens(tokens, room=0)
        return self._decoder.score(self._decoder.new_cache(self.options.cache_bytes), tokens)

    def close(self) -> None:
        """End what is unfinished, and give the model's memory back; it cannot be used afterwards."""
        self._end()
        self._decoder.close()

    def _check_open(self) -> None:
        if not self._end.alive:
            raise RequestError(f"the model of {self.bundle.folder} is closed; load it again.")

    def __enter__(self) -> TextModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _asked(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None
    ) -> list[tuple[Prompt, Sampling]]:
        self._check_open()
        listed: list[Prompt]
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            listed = [prompts]  # type: ignore[list-item]  # a single prompt, by the check
        else:
            listed = list(prompts)  # type: ignore[arg-type]  # several, by the check
        if sampling is None:
            sampling = self.default_sampling
        each = [sampling] * len(listed) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(listed):
            raise RequestError(f"{len(listed)} prompts with {len(each)} Samplings; give one for all, or one for each.")
        return list(zip(listed, each, strict=True))

    def _submit(self, asked: Sequence[tuple[Prompt, Sampling]], timeout: float | None) -> Request:
        started = time.perf_counter()
        request = Request(self._cancel)
        generations: list[Generation] = []
        refused: list[tuple[int, Sampling, FmedgeError]] = []
        for number, (prompt, sampling) in enumerate(asked):
            try:
                generations += self._generations(request, number, prompt, sampling, started)
            except FmedgeError as error:
                refused.append((number, sampling, error))
        # Of rivals the best n become completions.
        rivals = {id(one.rivals): one.sampling for one in generations if one.rivals is not None}
        dropped = sum(sampling.rows - sampling.n for sampling in rivals.values())
        request.expect(len(generations) - dropped + len(refused), len(generations))
        for number, sampling, why in refused:
            refuse(request, number, sampling, started, why)
        self._engine.submit(request, generations, math.inf if timeout is None else started + timeout)
        return request

    def _cancel(self, request: Request) -> None:
        # Bound to the model, which therefore lives as long as somebody holds a request of it.
        self._engine.cancel(request)

    def _generations(
        self, request: Request, number: int, prompt: Prompt, sampling: Sampling, started: float
    ) -> list[Generation]:
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
        sampling = replace(sampling, seed=fresh_seed() if sampling.seed is None else sampling.seed)
        rivals = None if sampling.best_of is None else BestOf(sampling)
        return [
            Generation(
                request=request,
                facts=self.bundle.manifest.text,
                prompt_index=number,
                index=index,
                prompt=tokens,
                sampling=sampling,
                text=TextStream(self.tokenizer, sampling.stop, continues=True) if self.tokenizer else None,
                started=started,
                constraint=self._constraint(sampling),
                rivals=rivals,
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


def _ids(prompt: Sequence[int]) -> list[int]:
    """Token ids as plain numbers, whatever integer type they have."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise RequestError(f"a prompt is neither text nor token ids ({error}); give a str or whole numbers.") from error
