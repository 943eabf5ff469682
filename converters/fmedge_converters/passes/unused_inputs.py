"""Inputs of a graph that nothing reads: a builder of engines would want sizes for them all the same."""

from __future__ import annotations

from fmedge_converters.graph import DecoderGraph


def drop_position_ids(graph: DecoderGraph, _context: int) -> int:
    """Drop position_ids where a model counts its positions by what is in its mask, or not at all."""
    unused = [value for value in graph.graph.inputs if value.name == "position_ids" and not value.uses()]
    for value in unused:
        graph.graph.inputs.remove(value)
    return len(unused)
