"""Whether a graph is written in ONNX's own operators, which is all that some runtimes read."""

from __future__ import annotations

from fmedge_runtimes.errors import ExportError

from fmedge_converters.graph import DecoderGraph


def require_plain(graph: DecoderGraph, target: str) -> None:
    """Raise ExportError for a graph that needs an operator of another domain than ONNX's, by its name."""
    others = dict.fromkeys(f"{node.domain}::{node.op_type}" for node in graph.graph.all_nodes() if node.domain)
    if others:
        raise ExportError(
            f"target {target} has no {' and no '.join(others)}, which the layers of this model need; export it for cpu "
            "or cuda."
        )
