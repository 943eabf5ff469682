"""A second graph for prompts, beside one that decodes: which schemes go together, how it is spelled, and its proof.

Both come from one trace and the same weights, and read and write the same cache. What the second graph spells as the
first does (head, token embedding, kernels of experts) lies in the first one's file, and so do tables and norms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import ExportError

from fmedge_converters.build import BuiltDecoder, Progress
from fmedge_converters.evidence import FullEvidence, full_evidence
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.linear import Linear
from fmedge_converters.reference import Reference
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.targets import Target

PROMPT_TOKENS = 64
"""Of each prompt of the comparison: enough for the graph for prompts, which shorter ones do not go through."""
PROMPTS = 4


def find_prefill(target: Target, scheme: Scheme, name: str | None) -> Scheme | None:
    """The scheme of a graph for prompts beside one of `scheme`; None if none is asked for.

    Raises ExportError when they do not go together.
    """
    if name is None:
        return None
    if not target.prefill:
        raise ExportError(
            f"target {target.name} takes no --prefill: it has no quantization that is faster with many rows and slower "
            "with few; leave it out."
        )
    if name not in target.prefill:
        raise ExportError(f"--prefill is {name}; target {target.name} has {' and '.join(target.prefill)}.")
    if not scheme.block_size or scheme.name in target.prefill:
        names = ", ".join(n for n, one in target.schemes.items() if one.block_size and n not in target.prefill)
        raise ExportError(
            f"--prefill {name} is for --quantize {names}, whose prompts it makes faster; with --quantize {scheme.name} "
            "one graph serves prompts as fast; leave it out."
        )
    return _beside(scheme, target.prefill[name])


def _beside(decode: Scheme, prompts: Scheme) -> Scheme:
    """The scheme `prompts`, but for what only few rows of a step go through, and for what is as fast either way.

    The head has one row for each piece of a prompt; the token embedding is a lookup; the kernel of experts has no more
    rows for each of them than a decode step (docs/quantization.md has figures).
    """

    def spell(graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int) -> None:
        (decode if is_head else prompts).linear(graph, linear, is_head=is_head, block_size=block_size)

    return dataclasses.replace(
        prompts,
        linear=spell,
        embedding=decode.embedding,
        mixture=decode.mixture,
        block_size=decode.block_size,
        keeps=decode.keeps,
    )


def check_rows(graph: ir.Graph) -> None:
    """Raise ExportError for a model whose graph takes one token of a row at a time."""
    (shape,) = (value.shape for value in graph.inputs if value.name == "input_ids")
    if shape is not None and shape[1] == 1:
        raise ExportError(
            "--prefill needs a graph that takes several tokens of a prompt at once, and this model's takes one; leave "
            "it out."
        )


def prefill_evidence(
    decoder: Decoder,
    built: BuiltDecoder,
    quantize: str,
    reference: Reference,
    text: Sequence[int],
    progress: Progress,
) -> FullEvidence:
    """Compare both graphs together with the source: prompts through one, their continuations through the other."""
    assert built.prefill is not None
    length = min(PROMPT_TOKENS, decoder.facts.context // 2)
    prompts = [list(text[start : start + length]) for start in range(0, len(text), length)][:PROMPTS]
    coarsest = "int8" if _bits(built.prefill.model) >= 8 else quantize
    found = full_evidence(decoder, reference, prompts, text, quantize, progress, text_as=coarsest)
    what = f"both graphs together, text and prompts of {length} tokens through the one for prompts: "
    evidence = found.evidence.model_copy(update={"name": "prefill", "what": what + found.evidence.what})
    return FullEvidence(evidence, found.goldens)


def _bits(model: ir.Model) -> int:
    """The fewest bits that a matrix has."""
    names = ("bits", "expert_weight_bits")
    return min((node.attributes.get_int(name, 8) for node in model.graph for name in names), default=8)
