"""An Einsum that only permutes axes as a Transpose, for which ONNX Runtime has the faster kernel."""

from __future__ import annotations

from fmedge_converters.graph import DecoderGraph, replace


def transpose_permutations(graph: DecoderGraph, _context: int) -> int:
    """Replace them; returns how many there were."""
    changed = 0
    for node in list(graph.graph):
        if node.op_type != "Einsum" or node.domain or len(node.inputs) != 1:
            continue
        given, arrow, wanted = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
        if not arrow or not given.isalpha() or len(set(given)) != len(given) or sorted(given) != sorted(wanted):
            continue
        output = node.outputs[0]
        order = [given.index(letter) for letter in wanted]
        (moved,) = graph.insert(node, "Transpose", node.inputs, [(output.dtype, output.shape)], {"perm": order})
        replace(output, moved)
        changed += 1
    graph.remove_unused()
    return changed
