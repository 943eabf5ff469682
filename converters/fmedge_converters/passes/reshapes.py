"""Reshapes whose target shape is computed at run time become reshapes to a constant, and those in vain disappear.

A traced graph computes [batch, sequence, heads, size] from the shapes of its inputs. ONNX spells the same as
[0, 0, heads, size]: 0 copies the input's dimension. That leaves no shape arithmetic behind.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fmedge_converters.graph import DecoderGraph, dims, produced_by, replace


def simplify_reshapes(graph: DecoderGraph, _context: int) -> int:
    """Make reshapes static, join chains of them, and drop those that change nothing."""
    changed = 0
    for node in list(graph.graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        source = node.inputs[0]
        while source is not None and (inner := produced_by(source, "Reshape")) is not None:
            source = inner.inputs[0]
        output = node.outputs[0]
        if source is None or dims(source) is None or dims(output) is None:
            continue
        if dims(source) == dims(output):
            replace(output, source)
            changed += 1
            continue
        target = _static_target(source, output)
        if target is None:
            # The direct input may still allow what the start of the chain does not.
            source = node.inputs[0]
            target = _static_target(source, output) if source is not None else None
        if source is None or target is None:
            continue
        shape = graph.add_constant(f"shape.{'x'.join(map(str, target))}", np.array(target, np.int64))
        (reshaped,) = graph.insert(node, "Reshape", (source, shape), [(output.dtype, output.shape)])
        replace(output, reshaped)
        changed += 1
    graph.remove_unused()
    return changed


def _static_target(source: ir.Value, output: ir.Value) -> list[int] | None:
    """The target with 0 for a copied dimension and at most one -1; None if there is none."""
    given, wanted = dims(source), dims(output)
    if given is None or wanted is None:
        return None
    target: list[int] = []
    for index, dim in enumerate(wanted):
        if isinstance(dim, int):
            target.append(dim)
        elif index < len(given) and given[index] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 and 0 not in wanted else None
