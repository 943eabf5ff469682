"""How many bytes the matrices of a model take in each form, scales, minima and zero points with them.

Norms, biases and tables of rotary embeddings are left out; what a file holds once is counted once.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

GATHERS = ("Gather", "GatherBlockQuantized")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a folder of transformers; others may lie beside them. Raises SystemExit."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    if not (folder / "model.safetensors").is_file():
        raise SystemExit(f"{folder} holds no model.safetensors, whole or in shards")
    return [folder / "model.safetensors"]


def parameters_of_matrices(folder: Path) -> int:
    """Numbers in the matrices of a folder of transformers, a tied one once. Raises SystemExit."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text("utf-8"))
    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="np") as reader:
            names = [name for name in tuple(reader.keys()) if name != "lm_head.weight" or not _is_tied(config)]
            shapes = [reader.get_slice(name).get_shape() for name in names]
        total += sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    return total


def _is_tied(config: dict[str, object]) -> bool:
    """Whether the head is the embedding, also where a file holds both."""
    return bool(config.get("tie_word_embeddings"))


def onnx_matrix_bytes(folder: Path) -> int:
    """Of the decoder of a bundle, or of another exporter's folder."""
    import onnx

    ours = folder / "decoder.onnx"
    (path,) = [ours] if ours.is_file() else folder.glob("*.onnx")
    graph = onnx.load(path, load_external_data=False).graph
    initializers = {item.name: item for item in graph.initializer}
    # What is stored in a narrower type is cast when the graph is opened.
    cast = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    seen: dict[object, int] = {}
    for node in graph.node:
        names = [cast.get(name, name) for name in node.input]
        given = [initializers[name] for name in names if name in initializers]
        if not any(len(item.dims) >= 2 for item in given) or not _is_product(node):
            continue
        for item in given:
            if item.dims:
                where = {entry.key: entry.value for entry in item.external_data}
                seen[where.get("offset", item.name)] = _nbytes(item)
    return sum(seen.values())


def _is_product(node: object) -> bool:
    """Whether a node multiplies by a matrix, or looks rows of one up by token."""
    kind, inputs = node.op_type, node.input  # type: ignore[attr-defined]  # of onnx, imported late
    return "MatMul" in kind or kind in ("Gemm", "DequantizeLinear") or (kind in GATHERS and "input_ids" in inputs)


def _nbytes(item: object) -> int:
    import onnx

    kind, dims = item.data_type, item.dims  # type: ignore[attr-defined]  # of onnx, imported late
    if kind in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4):
        return -(-math.prod(dims) // 2)
    return math.prod(dims) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize


def gguf_matrix_bytes(path: Path) -> int:
    """Of a GGUF file."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2)
