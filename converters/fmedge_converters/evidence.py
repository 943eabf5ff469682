"""The proof that a bundle computes what its source computes.

`graph`: a small model of the same architecture with random weights goes through the same trace and passes in fp32, and
its greedy tokens are compared with PyTorch's. `full`: the written bundle is compared with PyTorch on the real weights.
What PyTorch means here is in reference.py.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.golden import continue_greedily, replay
from fmedge_runtimes.manifest import CacheFacts, Evidence, Golden, SamplingFacts, StateFacts, TextFacts
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.session import Session
from transformers import PretrainedConfig

from fmedge_converters.build import BuildOptions, BuiltDecoder, Progress, build_decoder, numpy_dtype
from fmedge_converters.checkpoint import Files
from fmedge_converters.degenerate import degeneration
from fmedge_converters.divergence import Divergence, pieces_of
from fmedge_converters.recording import LayerState
from fmedge_converters.reduced import reduced_config, write_random_model
from fmedge_converters.reference import Logits, Reference, ResidentReference, load_model
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.targets import Target
from fmedge_converters.tolerances import TOLERANCES, is_exact, tolerance_of

GRAPH_CONTEXT = 192
GRAPH_PROMPTS = (1, 50, 7, 23)
GRAPH_STEPS = (24, 9, 17, 24)
"""Lengths of the prompts, and of their continuations, so that rows finish at different times."""
FULL_STEPS = 64
GOLDEN_STEPS = 32
GOLDENS = 2
TEXT_TOKENS = 1024
TEXT_WINDOW = 256
"""Tokens of the evaluation text, and of the pieces that it is scored in."""
PROMPTS = (
    "The",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea, there lived",
    "Question: What is the capital of France?\nAnswer:",
    "1, 2, 3, 4,",
    "A list of things to bring on a hike through the mountains in late autumn, when days are short: ",
    '{"name": "sensor-7", "unit": "celsius", "values": [',
    "In mathematics, a prime number is a natural number greater than 1 that",
)


def text_facts(built: BuiltDecoder, context: int) -> TextFacts:
    """The facts that a decoder needs to run, without a tokenizer."""
    return TextFacts(
        context=context,
        vocabulary=built.vocabulary,
        cache_dtype=_cache_dtype(built),
        caches=tuple(
            CacheFacts(
                layer=cache.layer,
                kv_heads=cache.kv_heads,
                key_dim=cache.key_dim,
                value_dim=cache.value_dim,
                window=cache.window,
                rolling=cache.rolling,
                capacity=cache.capacity,
                in_place=cache.in_place,
            )
            for cache in built.caches
        ),
        states=tuple(
            StateFacts(name=state.name, shape=state.shape, dtype=_state_dtype(state), in_place=state.in_place)
            for state in built.states
        ),
        eos_token_ids=(),
        special_tokens={},
        tokenizer=None,
        chat_template=None,
        sampling=SamplingFacts(),
    )


def _cache_dtype(built: BuiltDecoder) -> Any:  # noqa: ANN401 - pydantic checks the literal
    pasts = (value for value in built.model.graph.inputs if str(value.name).startswith("past_"))
    dtype = next(pasts).dtype
    return "float32" if dtype is None else str(dtype.numpy())


def _state_dtype(state: LayerState) -> Any:  # noqa: ANN401 - pydantic checks the literal
    return str(numpy_dtype(state.dtype))


def graph_evidence(config: PretrainedConfig, target: Target, progress: Progress) -> Evidence:
    """Compare a small random model of the architecture with PyTorch, token for token in fp32, written as for a target.

    Raises SourceError when the architecture cannot be exported; a mismatch is in the result.
    """
    progress("checking the architecture", 0, 0)
    with tempfile.TemporaryDirectory(prefix="fmedge-") as name:
        folder = Path(name)
        small = reduced_config(config)
        write_random_model(small, folder / "model", seed=0)
        wide = replace(target, dtype=torch.float32)
        options = BuildOptions(wide, target.schemes[FLOATING.name], block_size=0, context=GRAPH_CONTEXT)
        built = build_decoder(small, Files(folder / "model"), folder, options, lambda *_: None)
        random = np.random.default_rng(0)
        prompts = [random.integers(1, built.vocabulary, length).tolist() for length in GRAPH_PROMPTS]
        tokens = _generate(built, prompts)
        # Only now, so that one of both models is in memory at a time.
        comparison = _Greedy(prompts, tokens, TOLERANCES["float32", "none"].near_tie)
        ResidentReference(load_model(folder / "model"), GRAPH_CONTEXT).each_logits(comparison.rows, comparison.add)
    return Evidence(
        name="graph",
        what=(
            f"greedy tokens of a random {len(built.caches)}-layer {config.model_type} in fp32 against PyTorch, "
            f"{len(prompts)} ragged prompts in one batch"
        ),
        passed=comparison.equal == comparison.tokens,
        figures={
            "tokens": comparison.tokens,
            "equal": comparison.equal,
            "near_ties": comparison.near_ties,
            "largest_logit_difference": comparison.worst,
        },
    )


def weights_evidence(built: BuiltDecoder, scheme: Scheme) -> Evidence:
    """What became of the matrices of a source that is quantized already."""
    count = built.quantization
    others = "stay floats" if scheme.name == FLOATING.name else f"are quantized by {scheme.name}"
    return Evidence(
        name="weights",
        what=f"matrices that keep the codes of the source ({built.source_format}); others, read exactly, {others}",
        passed=True,
        figures={"matrices": count.matrices, "kept": count.kept},
    )


def allocation_evidence(built: BuiltDecoder, tokens: int) -> Evidence:
    """What was expected of the roundings that were chosen, and of the scheme without a choice."""
    allocation = built.allocation
    if allocation is None:
        raise RuntimeError("a decoder that was built without a budget")
    return Evidence(
        name="allocation",
        what=(
            f"what the roundings that were chosen for {len(allocation.matrices)} matrices cost if no code is fitted to "
            f"text, to second order, on {tokens} tokens; beside it the scheme without --bits"
        ),
        passed=True,
        figures={
            "bits_per_weight": allocation.bits_per_weight,
            "estimated_kl": allocation.cost,
            "usual_bits_per_weight": allocation.usual.bits_per_weight,
            "usual_estimated_kl": allocation.usual.cost,
        },
    )


def _generate(built: BuiltDecoder, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What a graph continues the prompts with, in one ragged batch."""
    session = OnnxRuntimeSession(built.written.graph, "cpu", None)
    try:
        rows = continue_greedily(Decoder(session, text_facts(built, GRAPH_CONTEXT)), prompts, GRAPH_STEPS)
    finally:
        session.close()
    return [[step.token for step in row] for row in rows]


class _Greedy:
    """Whether PyTorch, given a prompt and our tokens so far, would choose each of our tokens.

    If it does at every position, its own greedy continuation is ours; one pass replaces one for each token.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], near_tie: float) -> None:
        self.tokens = 0
        self.equal = 0
        """Tokens that PyTorch would have chosen too, near ties included."""
        self.near_ties = 0
        self.worst = 0.0
        """The largest lead, in PyTorch's logits, of its own choice over ours."""
        self.leads: list[npt.NDArray[np.floating]] = [np.zeros(0)] * len(prompts)
        """Of each row: that of every token [T]."""
        self._prompts = prompts
        self._completions = completions
        self._near_tie = near_tie

    @property
    def rows(self) -> list[list[int]]:
        """What PyTorch is to compute logits of."""
        return [[*prompt, *tokens[:-1]] for prompt, tokens in zip(self._prompts, self._completions, strict=True)]

    def add(self, number: int, logits: Logits) -> None:
        """Compare a row, given PyTorch's logits [S, V]."""
        asked = logits[len(self._prompts[number]) - 1 :]  # [T, V]
        tokens = np.asarray(self._completions[number])  # [T]
        self.leads[number] = asked.max(-1) - asked[np.arange(len(tokens)), tokens]  # [T]
        for lead in self.leads[number].tolist():
            self.tokens += 1
            self.worst = max(self.worst, lead)
            if lead == 0.0:
                self.equal += 1
            elif lead < self._near_tie:
                self.equal += 1
                self.near_ties += 1


def estimate_seconds(parameters: int) -> float:
    """How long the full comparison will take: its floating-point operations over this machine's rate."""
    square = torch.randn(768, 768)
    started = time.perf_counter()
    for _ in range(4):
        square @ square
    rate = 4 * 2 * 768**3 / max(1e-6, time.perf_counter() - started)
    tokens = TEXT_TOKENS + len(PROMPTS) * (FULL_STEPS + 16)
    # PyTorch's pass, the bundle's pass, and the decoding, which is bound by memory and counts about as both.
    return 4 * 2 * parameters * tokens / (rate * 0.5)


@dataclass(frozen=True, slots=True)
class FullEvidence:
    """The comparison of a bundle with its source, and continuations for later runtimes to reproduce."""

    evidence: Evidence
    goldens: tuple[Golden, ...]


def full_evidence(
    decoder: Decoder,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    text: Sequence[int],
    quantize: str,
    progress: Progress,
    *,
    text_as: str | None = None,
) -> FullEvidence:
    """Compare the bundle's decoder with the source on the real weights.

    `text_as`: the quantization by which the text is judged, where given text goes through a graph of its own.

    In fp32 every greedy token must be PyTorch's own; otherwise the KL divergence and the perplexity must stay within
    TOLERANCES, and no continuation may degenerate where the source's would not (degenerate.py).
    """
    tolerance = tolerance_of(decoder.facts, quantize)
    steps = min(FULL_STEPS, decoder.facts.context - max(len(prompt) for prompt in prompts))
    progress("generating", 0, 0)
    found = continue_greedily(decoder, prompts, [steps] * len(prompts))
    tokens = [[step.token for step in row] for row in found]
    progress("comparing with PyTorch", 0, 0)
    exact = is_exact(decoder.facts, quantize)
    greedy = _Greedy(prompts, tokens, tolerance.near_tie)
    window = min(TEXT_WINDOW, decoder.facts.context)
    divergence = Divergence(decoder, prompts, pieces_of(text, window))
    texts = [*greedy.rows, *divergence.pieces]

    def compare(number: int, logits: Logits) -> None:
        if number >= len(prompts):
            divergence.add_piece(number - len(prompts), logits)
        else:
            divergence.add_prompt(number, logits)
            greedy.add(number, logits)
        progress("comparing with PyTorch", number + 1, len(texts))

    reference.each_logits(texts, compare)
    figures: dict[str, float | int | str | bool] = {}
    failures: list[str] = []
    if exact:
        figures |= {
            "greedy_tokens": greedy.tokens,
            "greedy_equal": greedy.equal,
            "greedy_near_ties": greedy.near_ties,
        }
        if greedy.equal < greedy.tokens:
            failures.append(f"{greedy.tokens - greedy.equal} of {greedy.tokens} greedy tokens are not PyTorch's")
    degenerate = degeneration(tokens, greedy.leads)
    figures |= divergence.figures()
    figures |= {
        "not_finite": divergence.not_finite,
        "loops": degenerate.loops,
        "loops_alone": degenerate.loops_alone,
        "constant": degenerate.constant,
    }
    if divergence.not_finite:
        failures.append(f"{divergence.not_finite} of {divergence.tokens} positions have logits that are not finite")
    else:
        of_text = tolerance if text_as is None else tolerance_of(decoder.facts, text_as)
        failures += of_text.excesses(divergence.mean_kl, divergence.perplexity, divergence.source_perplexity)
    failures += degenerate.reasons()
    # In a batch of their own, as they will be replayed: with int8 the rows of a batch influence each other.
    chosen = prompts[-GOLDENS:]
    rows = continue_greedily(decoder, chosen, [min(GOLDEN_STEPS, steps)] * len(chosen))
    goldens = tuple(
        Golden(prompt=tuple(prompt), steps=tuple(row), near_tie=tolerance.near_tie)
        for prompt, row in zip(chosen, rows, strict=True)
    )
    unlike = sum(result.mismatch is not None for result in replay(decoder, goldens))
    if unlike:
        failures.append(f"{unlike} of {len(goldens)} golden continuations differ when they are replayed")
    if failures:
        figures["failure"] = "; ".join(failures)
    what = f"the exported weights against {reference.how}: {len(prompts)} prompts, {divergence.tokens} tokens of text"
    return FullEvidence(Evidence(name="full", what=what, passed=not failures, figures=figures), goldens)


def output_evidence(decoder: Decoder, prompts: Sequence[Sequence[int]], progress: Progress) -> Evidence:
    """What the written graph says by itself: whether its logits are finite and depend on the prompt.

    Nothing is known of the source here, so loops prove nothing: small models repeat themselves.
    """
    progress("running the graph", 0, 0)
    cache = decoder.new_cache()
    logits = [decoder.score(cache, prompt)[-1] for prompt in prompts]  # [V] each
    not_finite = sum(not bool((row < np.inf).all()) for row in logits)
    different = len({tuple(prompt) for prompt in prompts}) > 1
    constant = different and all(np.array_equal(row, logits[0]) for row in logits)
    return Evidence(
        name="output",
        what=f"the written graph alone, {len(prompts)} prompts: logits that are finite and not the same for all",
        passed=not not_finite and not constant,
        figures={"not_finite": not_finite, "constant": constant},
    )


def layout_evidence(name: str, session: Session, facts: TextFacts, goldens: Sequence[Golden]) -> Evidence:
    """Whether the graph of a layout gives the golden continuations of the bundle's own graph. Closes the session."""
    results = replay(Decoder(session, facts), goldens)
    session.close()
    wrong = sum(result.mismatch is not None for result in results)
    return Evidence(
        name="layout",
        what=f"the graph of layout {name} against the bundle's own: {len(goldens)} golden continuations in one batch",
        passed=wrong == 0,
        figures={
            "tokens": sum(result.tokens for result in results),
            "continuations_that_differ": wrong,
            "near_ties": sum(result.near_ties for result in results),
        },
    )
