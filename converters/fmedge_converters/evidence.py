"""The proof that a bundle computes what its source computes.

`graph`: a small model of the same architecture with random weights goes through the same trace and passes in fp32, and
its greedy tokens are compared with PyTorch's. `full`: the written bundle is compared with PyTorch on the real weights.
PyTorch is transformers' own eager model, loaded the ordinary way, so a wrong reading of the weights shows too.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import set_module_tensor_to_device
from fmedge_runtimes.bundle import CacheFacts, Evidence, Golden, SamplingFacts, StateFacts, TextFacts
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.golden import continue_greedily, replay
from fmedge_runtimes.memory import available_bytes
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.session import Session
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fmedge_converters.build import BuildOptions, BuiltDecoder, Progress, build_decoder, numpy_dtype
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import empty_model, quiet_libraries
from fmedge_converters.recording import LayerState
from fmedge_converters.reduced import reduced_config, write_random_model
from fmedge_converters.rope import freeze_rope
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.source import Source
from fmedge_converters.targets import TARGETS

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


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a precision may differ by before the export stops."""

    near_tie: float
    """Two logits closer than this are level: fp32 kernels add in different orders."""
    mean_kl: float
    """Mean KL divergence to PyTorch's distribution, in nats per token."""
    perplexity_ratio: float
    """Perplexity of the bundle over perplexity of the source."""


TOLERANCES = {
    ("float32", "none"): Tolerance(near_tie=1e-3, mean_kl=1e-5, perplexity_ratio=1.0005),
    ("float16", "none"): Tolerance(near_tie=5e-2, mean_kl=1e-3, perplexity_ratio=1.01),
    ("float32", "int8"): Tolerance(near_tie=0.25, mean_kl=0.05, perplexity_ratio=1.05),
    ("float16", "int8"): Tolerance(near_tie=0.25, mean_kl=0.05, perplexity_ratio=1.05),
    ("float32", "int4"): Tolerance(near_tie=0.25, mean_kl=0.35, perplexity_ratio=1.35),
    ("float16", "int4"): Tolerance(near_tie=0.25, mean_kl=0.35, perplexity_ratio=1.35),
}
"""By (compute type, quantization)."""


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


def graph_evidence(config: PretrainedConfig, progress: Progress) -> Evidence:
    """Compare a small random model of the architecture with PyTorch, token for token in fp32.

    Raises SourceError when the architecture cannot be exported; a mismatch is in the result.
    """
    progress("checking the architecture", 0, 0)
    target = TARGETS["cpu"]
    with tempfile.TemporaryDirectory(prefix="fmedge-") as name:
        folder = Path(name)
        small = reduced_config(config)
        reference = write_random_model(small, folder / "model", seed=0)
        freeze_rope(reference, GRAPH_CONTEXT)
        options = BuildOptions(target, FLOATING, block_size=0, context=GRAPH_CONTEXT)
        built = build_decoder(small, Files(folder / "model"), folder, options, lambda *_: None)
        decoder = Decoder(OnnxRuntimeSession(built.written.graph, "cpu", None), text_facts(built, GRAPH_CONTEXT))
        random = np.random.default_rng(0)
        prompts = [random.integers(1, built.vocabulary, length).tolist() for length in GRAPH_PROMPTS]
        found = continue_greedily(decoder, prompts, GRAPH_STEPS)
        decoder.session.close()
        tokens = [[step.token for step in steps] for steps in found]
        comparison = _compare_greedy(reference, prompts, tokens, TOLERANCES["float32", "none"].near_tie)
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


@dataclass(frozen=True, slots=True)
class _Greedy:
    tokens: int
    equal: int
    """Tokens that PyTorch would have chosen too, near ties included."""
    near_ties: int
    worst: float
    """The largest lead, in PyTorch's logits, of its own choice over ours."""


def _compare_greedy(
    reference: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    near_tie: float,
) -> _Greedy:
    """Whether PyTorch, given the prompt and our tokens so far, would choose each of our tokens.

    If it does at every position, its own greedy continuation is ours; one pass replaces one for each token.
    """
    tokens = equal = ties = 0
    worst = 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = _reference_logits(reference, [*prompt, *completion[:-1]])[len(prompt) - 1 :]  # [T, V]
        for row, token in zip(logits, completion, strict=True):
            tokens += 1
            lead = float(row.max() - row[token])
            worst = max(worst, lead)
            if lead == 0.0:
                equal += 1
            elif lead < near_tie:
                equal += 1
                ties += 1
    return _Greedy(tokens, equal, ties, worst)


def _reference_logits(reference: PreTrainedModel, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    with torch.no_grad(), quiet_libraries():
        logits = reference(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    array: npt.NDArray[np.float32] = logits.float().numpy()  # [S, V]
    return array


def require_memory(parameters: int, bits: int) -> None:
    """Raise SourceError when memory cannot hold the source in fp32 beside the bundle."""
    need, free = parameters * (4 + max(bits, 8) // 8), available_bytes()
    if free is not None and need > free * 0.9:
        raise SourceError(
            f"comparing with PyTorch needs {need / 1e9:.1f} GB of memory for the original in fp32 and the bundle, "
            f"{free / 1e9:.1f} GB are free; use --verify graph, which checks the architecture only."
        )


def load_reference(source: Source) -> PreTrainedModel:
    """The source in fp32, as transformers loads it, or with the weights as fmedge reads them. Raises SourceError."""
    if not source.loads_by_itself:
        return _filled(source)
    try:
        with quiet_libraries():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{source.folder}: transformers cannot load the model: {first}") from error
    return model.eval()


def _filled(source: Source) -> PreTrainedModel:
    """The model of transformers with the weights of our own reader."""
    model = empty_model(source.config, torch.float32)
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with Checkpoint(source.files, np.dtype(np.float32)) as checkpoint:
        for name, value in checkpoint.buffers(model).items():
            model.get_buffer(name).copy_(value)
        for name, weight in checkpoint.weights(model).items():
            set_module_tensor_to_device(model, name, "cpu", value=torch.from_numpy(weight.array()))
    model.tie_weights()
    return model.eval()


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
    reference: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    text: Sequence[int],
    precision: tuple[str, str],
    progress: Progress,
    note: str = "",
) -> FullEvidence:
    """Compare the bundle's decoder with the source on the real weights.

    `precision` is (compute type, quantization); `note` is what the evidence says of the reference's weights. In fp32
    every greedy token must be PyTorch's own; otherwise KL divergence and perplexity must stay within TOLERANCES.
    """
    tolerance = TOLERANCES[precision]
    # transformers picks a rotary embedding by the length of each text; the graph has that of its context.
    freeze_rope(reference, decoder.facts.context)
    steps = min(FULL_STEPS, decoder.facts.context - max(len(prompt) for prompt in prompts))
    progress("generating", 0, 0)
    found = continue_greedily(decoder, prompts, [steps] * len(prompts))
    tokens = [[step.token for step in row] for row in found]
    progress("comparing with PyTorch", 0, 0)
    figures: dict[str, float | int | str | bool] = {}
    passed = True
    if precision == ("float32", "none"):
        greedy = _compare_greedy(reference, prompts, tokens, tolerance.near_tie)
        figures |= {
            "greedy_tokens": greedy.tokens,
            "greedy_equal": greedy.equal,
            "greedy_near_ties": greedy.near_ties,
        }
        passed = greedy.equal == greedy.tokens
    divergence = _divergence(decoder, reference, prompts, text, progress)
    figures |= divergence.figures()
    passed = passed and divergence.mean_kl <= tolerance.mean_kl
    passed = passed and divergence.perplexity <= divergence.source_perplexity * tolerance.perplexity_ratio
    # In a batch of their own, as they will be replayed: with int8 the rows of a batch influence each other.
    chosen = prompts[-GOLDENS:]
    rows = continue_greedily(decoder, chosen, [min(GOLDEN_STEPS, steps)] * len(chosen))
    goldens = tuple(
        Golden(prompt=tuple(prompt), steps=tuple(row), near_tie=tolerance.near_tie)
        for prompt, row in zip(chosen, rows, strict=True)
    )
    passed = passed and all(result.mismatch is None for result in replay(decoder, goldens))
    compared = f"{len(prompts)} prompts, {divergence.tokens} tokens of text"
    what = f"the exported weights against PyTorch in fp32{note}: {compared}"
    return FullEvidence(Evidence(name="full", what=what, passed=passed, figures=figures), goldens)


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


@dataclass(frozen=True, slots=True)
class _Divergence:
    tokens: int
    mean_kl: float
    top1: float
    perplexity: float
    source_perplexity: float
    largest_logit_difference: float

    def figures(self) -> dict[str, float | int | str | bool]:
        return {
            "text_tokens": self.tokens,
            "mean_kl": self.mean_kl,
            "top1_agreement": self.top1,
            "perplexity": self.perplexity,
            "source_perplexity": self.source_perplexity,
            "prompt_logit_difference": self.largest_logit_difference,
        }


def _divergence(
    decoder: Decoder,
    reference: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    text: Sequence[int],
    progress: Progress,
) -> _Divergence:
    window = min(TEXT_WINDOW, decoder.facts.context)
    pieces = [list(text[start : start + window]) for start in range(0, len(text), window)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    cache = decoder.new_cache()
    kl = nats = source_nats = 0.0
    agree = count = 0
    for number, piece in enumerate(pieces):
        ours = _log_softmax(decoder.score(cache, piece))  # [S, V]
        theirs = _log_softmax(_reference_logits(reference, piece))  # [S, V]
        kl += float((np.exp(theirs) * (theirs - ours)).sum())
        agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        following = np.asarray(piece[1:])
        nats -= float(ours[np.arange(len(following)), following].sum())
        source_nats -= float(theirs[np.arange(len(following)), following].sum())
        count += len(piece)
        progress("comparing with PyTorch", number + 1, len(pieces))
    worst = 0.0
    for prompt in prompts:
        mine = decoder.prefill(cache, 0, prompt)
        cache.clear()
        worst = max(worst, float(np.abs(mine - _reference_logits(reference, prompt)[-1]).max()))
    predicted = count - len(pieces)
    return _Divergence(
        tokens=count,
        mean_kl=_finite(kl / count),
        top1=agree / count,
        perplexity=_finite(math.exp(min(nats / predicted, 700.0))),
        source_perplexity=_finite(math.exp(min(source_nats / predicted, 700.0))),
        largest_logit_difference=_finite(worst),
    )


def _finite(value: float) -> float:
    """JSON has no infinity; a non-finite figure is far beyond every tolerance either way."""
    return value if math.isfinite(value) else 1e30


def _log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)  # [S, V]
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
