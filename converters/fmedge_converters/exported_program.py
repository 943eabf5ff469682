"""Save the exporter its second trace of a program.

`torch.onnx.export` traces an exported program again to decompose the operators that ONNX lacks and to replace those
that change a tensor in place, which takes longer than the first trace. A program of a module in evaluation mode hardly
has any: the casts and dropouts that it has are rewritten here, and the second trace is only made if something is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten
IGNORED = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
"""Checks of what has been traced."""
AS_THEY_ARE = (aten.dropout.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
"""Operators that change nothing in evaluation."""
CASTS: dict[object, Callable[[Node], object]] = {
    aten.to.dtype: lambda node: node.args[1],
    aten.to.dtype_layout: lambda node: node.kwargs.get("dtype"),
    aten.to.device: lambda node: node.args[2],
}
"""Operators that change the type of a tensor; and the type."""


def traced_once(program: ExportedProgram) -> ExportedProgram:
    """The program, which returns itself when it is asked to decompose what it does not have."""
    _simplify(program)
    decompose = program.run_decompositions

    def run_decompositions(table: dict[Any, Any] | None = None, *others: Any) -> ExportedProgram:  # noqa: ANN401 - torch's own
        if table is None or others or any(_is_left(node, table) for node in program.graph.nodes):
            decomposed: ExportedProgram = decompose(table, *others)
            return decomposed
        return program

    vars(program)["run_decompositions"] = run_decompositions
    return program


def _simplify(program: ExportedProgram) -> None:
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or any(user.op == "output" for user in node.users):
            continue
        if node.target in IGNORED:
            graph.erase_node(node)
        elif node.target in AS_THEY_ARE:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in CASTS:
            dtype = CASTS[node.target](node)
            source = node.args[0]
            if dtype is None or source.meta["val"].dtype == dtype:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
            else:
                node.target = torch.ops.prims.convert_element_type.default
                node.args, node.kwargs = (source, dtype), {}
    program.graph_module.recompile()


def _is_left(node: Node, table: dict[Any, Any]) -> bool:
    """Whether the exporter must see to an operator."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return target in table or target in CASTS or target._schema.is_mutable
