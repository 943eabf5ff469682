"""`torch.onnx.export` without its second trace.

It traces what it has traced again, to decompose the operators that ONNX lacks and to replace those that change a tensor
in place, which takes longer than the first trace. A module in evaluation mode hardly has any: the casts, dropouts and
other spellings that it has are rewritten here, and the second trace is only made if something is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fmedge_converters.translations import TRANSLATIONS

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
SPELLINGS = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
}
"""Operators that are another by name alone."""


@dataclass(frozen=True, slots=True)
class Names:
    """Of a graph's inputs and outputs; None: torch's."""

    inputs: Sequence[str]
    outputs: Sequence[str] | None = None


def to_onnx(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    dynamic_shapes: Any,  # noqa: ANN401 - torch's own trees
    opset: int,
    names: Names,
) -> torch.onnx.ONNXProgram:
    """One call of a module as a graph. Raises what torch raises when it cannot be traced or translated."""
    try:
        exported = torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes, strict=False)
        return _translate(traced_once(exported), (), None, opset, names)
    except Exception:  # torch's own way may know more, or says what is wrong
        return _translate(module, arguments, dynamic_shapes, opset, names)


def _translate(
    module: torch.nn.Module | ExportedProgram,
    arguments: tuple[Any, ...],
    dynamic_shapes: Any,  # noqa: ANN401 - torch's own trees
    opset: int,
    names: Names,
) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(
        module,
        arguments,
        dynamo=True,
        dynamic_shapes=dynamic_shapes,
        opset_version=opset,
        input_names=names.inputs,
        output_names=names.outputs,
        custom_translation_table=dict(TRANSLATIONS),
        optimize=False,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return program


def traced_once(program: ExportedProgram) -> ExportedProgram:
    """The program, which returns itself when it is asked to decompose what it does not have."""
    if any(_changes_in_place(node) for node in program.graph.nodes):
        return program  # where a tensor is changed, it matters which others are the same one
    _simplify(program)
    decompose = program.run_decompositions

    def run_decompositions(table: dict[Any, Any] | None = None, *others: Any) -> ExportedProgram:  # noqa: ANN401 - torch's own
        if table is None or others or any(node.target in table or node.target in CASTS for node in program.graph.nodes):
            decomposed: ExportedProgram = decompose(table, *others)
            return decomposed
        return program

    vars(program)["run_decompositions"] = run_decompositions
    return program


def _changes_in_place(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _simplify(program: ExportedProgram) -> None:
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        is_output = any(user.op == "output" for user in node.users)
        if node.target in IGNORED:
            graph.erase_node(node)
        elif node.target in AS_THEY_ARE and not is_output:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in SPELLINGS:
            node.target = SPELLINGS[node.target]
        elif node.target in CASTS:
            dtype = CASTS[node.target](node)
            source = node.args[0]
            if dtype is not None and source.meta["val"].dtype != dtype:
                node.target = torch.ops.prims.convert_element_type.default
                node.args, node.kwargs = (source, dtype), {}
            elif is_output:  # the program knows it by its name
                node.target = aten.alias.default
                node.args, node.kwargs = (source,), {}
            else:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
    program.graph_module.recompile()
