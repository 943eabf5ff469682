"""The comparisons of a written decoder: with PyTorch, by itself, and with the graph of a layout."""

from __future__ import annotations

from collections.abc import Sequence

from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.manifest import Evidence, Golden, GraphFacts, TextFacts
from fmedge_runtimes.memory import available_bytes
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession

from fmedge_converters.build import BuiltDecoder, Progress
from fmedge_converters.compared_tokens import ComparedTokens
from fmedge_converters.evidence import (
    FullEvidence,
    estimate_seconds,
    full_evidence,
    layout_evidence,
    output_evidence,
)
from fmedge_converters.export_checks import graph_facts
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.layouts.layout import Finished, Layout
from fmedge_converters.prefill import prefill_evidence
from fmedge_converters.reference import open_reference
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.source import Source

ROOM = 3
"""How many times a written graph must fit into free memory to be run where nothing asks for it."""


def prove_decoder(
    source: Source,
    parameters: int,
    built: BuiltDecoder,
    facts: TextFacts,
    tokens: ComparedTokens,
    scheme: Scheme,
    options: ExportOptions,
    progress: Progress,
) -> tuple[list[Evidence], tuple[Golden, ...]]:
    """What --verify asks to be proven of a written decoder, and the continuations that it is to reproduce."""
    if options.verify == "full":
        found = _compare(source, built, facts, parameters, tokens, scheme, progress)
        return [each.evidence for each in found], found[-1].goldens
    if options.verify == "graph" and _fits(built):
        return [_run(built, facts, tokens.prompts, progress)], ()
    return [], ()


def _compare(
    source: Source,
    built: BuiltDecoder,
    facts: TextFacts,
    parameters: int,
    tokens: ComparedTokens,
    scheme: Scheme,
    progress: Progress,
) -> list[FullEvidence]:
    """Compare what was written with PyTorch on the real weights: what decodes by itself, then, if there is a graph for
    prompts, both together, whose golden continuations are the bundle's."""
    seconds = estimate_seconds(parameters)
    progress(f"comparing with PyTorch (about {seconds:.0f} s; --verify graph skips it)", 0, 0)
    with open_reference(source, parameters, facts.context) as reference:
        session = OnnxRuntimeSession(built.written.graph, "cpu", None)
        decoder = Decoder(session, facts)
        found = [full_evidence(decoder, reference, tokens.prompts, tokens.text, scheme.name, progress)]
        if built.prefill is not None:
            decoder = Decoder(session, facts, None, OnnxRuntimeSession(built.prefill.written.graph, "cpu", None))
            found.append(prefill_evidence(decoder, built, scheme.name, reference, tokens.text, progress))
        decoder.close()
    return found


def _fits(built: BuiltDecoder) -> bool:
    """Whether memory is free for the written graph several times over: --verify graph is for small machines, too."""
    free = available_bytes()
    return free is None or built.written.weight_bytes * ROOM < free


def _run(built: BuiltDecoder, facts: TextFacts, prompts: Sequence[Sequence[int]], progress: Progress) -> Evidence:
    """What the written graph says by itself."""
    session = OnnxRuntimeSession(built.written.graph, "cpu", None)
    try:
        return output_evidence(Decoder(session, facts), prompts, progress)
    finally:
        session.close()


def lay_out(
    layout: Layout, finished: Finished, goldens: Sequence[Golden], progress: Progress
) -> tuple[GraphFacts, list[Evidence]]:
    """Write a layout's files, and compare its graph with the bundle's own where there are golden continuations."""
    graph = finished.folder / layout.graph
    facts = graph_facts(layout.finish(finished), graph)
    if not goldens:
        return facts, []
    progress(f"comparing {graph.name} with {finished.decoder.name}", 0, 0)
    session = layout.open(graph, finished.facts)
    return facts, [layout_evidence(layout.name, session, finished.facts, goldens)]
