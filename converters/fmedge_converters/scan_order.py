"""Which nodes come after every loop over tokens.

The builder of TensorRT-RTX 1.7.1 dies (SIGSEGV) of a graph with an Attention, and a Scan over a dynamic axis that it
does not depend on. Behind the last Scan it builds, and so do matrix products in every place.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import onnx_ir as ir


def dynamic_scans(nodes: Iterable[ir.Node]) -> frozenset[ir.Node]:
    """The nodes that are a Scan over an axis without a fixed size."""
    return frozenset(node for node in nodes if node.op_type == "Scan" and not node.domain and _is_dynamic(node))


def _is_dynamic(scan: ir.Node) -> bool:
    tokens = scan.inputs[-1]
    shape = None if tokens is None else tokens.shape
    return shape is not None and len(shape) > 0 and not isinstance(shape[0], int)


def comes_after(node: ir.Node, others: Set[ir.Node]) -> bool:
    """Whether a node depends on all of the others."""
    waiting, seen = [node], {node}
    while waiting:
        for before in waiting.pop().predecessors():
            if before not in seen:
                seen.add(before)
                waiting.append(before)
    return others <= seen
