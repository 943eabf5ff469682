"""The decoder's graph with the inputs and outputs of onnxruntime-genai, over the same weights.

onnxruntime-genai feeds an attention mask [B, T] over all tokens of the rows, 0 where a row's first prompt is padded on
its right, and takes the logits of each row's last token. What a bundle's decoder is fed is computed from that inside
the graph: its nodes stay as they are, and the file of its weights is shared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from fmedge_runtimes.errors import ExportError

from fmedge_converters.graph import MICROSOFT

STEP_INPUTS = ("logits_indices", "seqlens_k", "total_sequence_length")
"""What a bundle's decoder is fed and onnxruntime-genai does not know."""


def write_genai_graph(decoder: Path, output: Path) -> ir.Model:
    """Write `output`, beside the graph whose weights it shares, and return the new graph.

    Inputs: input_ids [B, S], attention_mask [B, T], position_ids [B, S] if the decoder has them, the caches. Outputs:
    logits [B, 1, V], the caches. Raises ExportError when the decoder has inputs that onnxruntime-genai does not feed,
    OSError when the disk is full.
    """
    model = ir.load(decoder)
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    fed = [name for name in inputs if name in ("input_ids", "position_ids") or name.startswith("past_key_values.")]
    strange = [name for name in inputs if name not in fed and name not in STEP_INPUTS]
    if strange:
        raise ExportError(f"onnxruntime-genai does not feed {', '.join(strange)}; leave out --layout genai.")
    mask = ir.val("attention_mask", dtype=ir.DataType.INT64, shape=["batch", "total_sequence_length"])
    _compute_step(graph, inputs, mask)
    _give_rows_logits(graph)
    graph.inputs[:] = [inputs[fed[0]], mask, *(inputs[name] for name in fed[1:])]
    # In beam search onnxruntime-genai does not share the caches, and the present is longer than the past.
    for value in graph.outputs[1:]:
        if value.shape is not None and isinstance(value.shape[2], ir.SymbolicDim):
            value.shape = ir.Shape([*value.shape[:2], f"present_{value.shape[2].value}", value.shape[3]])
    output.write_bytes(ir.to_proto(model).SerializeToString())
    return model


def _compute_step(graph: ir.Graph, inputs: dict[str, ir.Value], mask: ir.Value) -> None:
    """Put values computed from the mask in the place of the decoder's step inputs."""
    tape = ir.tape.Tape()
    zero, one = (_constant(graph, f"genai.{number}", np.array(number)) for number in (0, 1))  # []
    axis = _constant(graph, "genai.axis", np.array([1]))
    ids = inputs["input_ids"]
    length = tape.op("Shape", [ids], {"start": 1, "end": 2})  # [1], S
    tokens = tape.op("ReduceSum", [mask, axis], {"keepdims": 0})  # [B], of each row so far
    new = tape.op("Min", [tokens, length])  # [B], of each row in this step
    seen = tape.op("Sub", [tokens, one])  # [B]
    # The attention operator knows padding. Nodes that write into a cache by themselves write it as if it were tokens;
    # nothing looks at it, and the row's next tokens go over it.
    end = tape.op("Add", [tape.op("Sub", [seen, new]), length])  # [B]
    rows = tape.op("Squeeze", [tape.op("Shape", [ids], {"start": 0, "end": 1})])  # [], B
    first = tape.op("Mul", [tape.op("Range", [zero, rows, one]), length])  # [B]
    last = tape.op("Add", [first, tape.op("Sub", [new, one])])  # [B], of B * S
    total = tape.op("Squeeze", [tape.op("Shape", [mask], {"start": 1, "end": 2})])  # [], T
    seqlens, ends, longest = (tape.op("Cast", [item], {"to": ir.DataType.INT32}) for item in (seen, end, total))
    graph.insert_before(graph[0], tape.nodes)
    for name, value in (("logits_indices", last), ("total_sequence_length", longest)):
        ir.convenience.replace_all_uses_with(inputs[name], value)
    for node, index in tuple(inputs["seqlens_k"].uses()):
        attends = node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT
        node.replace_input_with(index, seqlens if attends else ends)


def _give_rows_logits(graph: ir.Graph) -> None:
    """Give the logits [B, V] of the rows' last tokens an axis for the tokens."""
    logits = graph.outputs[0]
    name, size = logits.name, None if logits.shape is None else logits.shape[-1]
    logits.name = "genai.logits"
    axis = graph.initializers["genai.axis"]
    output = ir.val(name, dtype=logits.dtype, shape=["batch", 1, size if isinstance(size, int) else "vocabulary"])
    graph.append(ir.node("Unsqueeze", [logits, axis], outputs=[output]))
    graph.outputs[0] = output


def _constant(graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array.astype(np.int64), name=name))
    graph.register_initializer(value)
    return value
