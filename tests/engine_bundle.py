"""A small decoder as fmedge exports it for TensorRT (docs/tensorrt.md), made by hand; and doubles of what runs it.

One layer of attention over a static cache, whose logits depend on every token before. It needs no export.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
from fake_cuda import FakeCuda
from fake_session import make_bundle
from fake_tensorrt import FakeTensorRT
from fmedge_runtimes.backends import open_session
from fmedge_runtimes.bundle import Bundle, sha256_of
from fmedge_runtimes.cuda import open_cuda
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.golden import continue_greedily
from fmedge_runtimes.manifest import (
    CacheFacts,
    FileFacts,
    Golden,
    GraphFacts,
    ProfileFacts,
    TensorFacts,
    write_manifest,
)
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, HEADS, SIZE, CAPACITY, ROWS = 24, 2, 16, 64, 4
"""Of the tokenizer of fake_session; heads and their size, positions of a cache, rows of a step."""
PROFILES = (
    ProfileFacts(name="prefill", axes={"batch": (1, 1, 1), "sequence": (1, 16, 16), "logits": (1, 1, 16)}),
    ProfileFacts(name="decode", axes={"batch": (1, 1, ROWS), "sequence": (1, 1, 1), "logits": (1, 1, ROWS)}),
)


def decoder_graph() -> onnx.ModelProto:
    """The graph, which writes its cache by TensorScatter."""
    random = np.random.default_rng(3)
    weights = {
        name: (random.standard_normal((VOCABULARY, HEADS * SIZE)) * 2).astype(np.float32)
        for name in ("q", "k", "v", "h")
    }
    constants = [numpy_helper.from_array(value, f"w_{name}") for name, value in weights.items()]
    constants += [
        numpy_helper.from_array(np.array([0, 0, HEADS, SIZE]), "split"),
        numpy_helper.from_array(np.array([-1, HEADS * SIZE]), "flat"),
        numpy_helper.from_array(np.arange(CAPACITY)[None, None, None], "columns"),
        numpy_helper.from_array(np.array([1, 3]), "axes"),
    ]
    node = helper.make_node
    nodes = []
    for name in "qkv":
        nodes += [
            node("Gather", [f"w_{name}", "input_ids"], [f"{name}0"]),
            node("Reshape", [f"{name}0", "split"], [f"{name}1"]),
            node("Transpose", [f"{name}1"], [name], perm=[0, 2, 1, 3]),
        ]
    caches = (("k", "key"), ("v", "value"))
    for name, part in caches:
        ends = [f"past_key_values.0.{part}", name, "write_indices"], [f"present.0.{part}"]
        nodes.append(node("TensorScatter", *ends, axis=2, mode="linear"))
    nodes += [
        node("Unsqueeze", ["position_ids", "axes"], ["rows"]),
        node("LessOrEqual", ["columns", "rows"], ["seen"]),
        # There is no kernel in fp32.
        *(
            node("Cast", [name], [f"{name}16"], to=TensorProto.FLOAT16)
            for name in ("q", "present.0.key", "present.0.value")
        ),
        node("Attention", ["q16", "present.0.key16", "present.0.value16", "seen"], ["mixed16"], scale=0.5),
        node("Cast", ["mixed16"], ["mixed"], to=TensorProto.FLOAT),
        node("Transpose", ["mixed"], ["mixed1"], perm=[0, 2, 1, 3]),
        node("Reshape", ["mixed1", "flat"], ["states"]),
        node("Gather", ["states", "logits_indices"], ["asked"]),
        node("Transpose", ["w_h"], ["head"], perm=[1, 0]),
        node("MatMul", ["asked", "head"], ["logits"]),
    ]
    cache = ["batch", HEADS, CAPACITY, SIZE]
    info = helper.make_tensor_value_info
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        info("position_ids", TensorProto.INT64, ["batch", "sequence"]),
        info("logits_indices", TensorProto.INT64, ["logits"]),
        info("write_indices", TensorProto.INT64, ["batch"]),
        *(info(f"past_key_values.0.{part}", TensorProto.FLOAT, cache) for _, part in caches),
    ]
    outputs = [
        info("logits", TensorProto.FLOAT, ["logits", VOCABULARY]),
        *(info(f"present.0.{part}", TensorProto.FLOAT, cache) for _, part in caches),
    ]
    for number, made in enumerate(nodes):
        made.name = f"node{number}"
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def facts_of(value: onnx.ValueInfoProto) -> TensorFacts:
    kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
    dims = value.type.tensor_type.shape.dim
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)
    return TensorFacts(name=value.name, dtype=kind, shape=shape)


def with_goldens(bundle: Bundle) -> Bundle:
    """The same bundle with golden continuations, made on the CPU."""
    graph = bundle.file("decoder.onnx")
    session = open_session(graph, "cpu", 1)
    prompts = [[3, 1, 4, 1, 5], [2, 7]]
    rows = continue_greedily(Decoder(session, bundle.manifest.text), prompts, [12, 12])
    session.close()
    goldens = tuple(
        Golden(prompt=tuple(prompt), steps=tuple(row), near_tie=1e-4) for prompt, row in zip(prompts, rows, strict=True)
    )
    manifest = bundle.manifest.model_copy(update={"golden": goldens})
    write_manifest(bundle.folder, manifest)
    return Bundle(bundle.folder, manifest)


def engine_bundle(folder: Path, *, in_place: bool = True, target: str = "tensorrt") -> Bundle:
    """A bundle of the decoder, with its manifest."""
    bundle = make_bundle(folder)
    model = decoder_graph()
    onnx.save(
        model, folder / "decoder.onnx", save_as_external_data=True, location="decoder.onnx.data", size_threshold=512
    )
    cache = CacheFacts(
        layer=0,
        kv_heads=HEADS,
        key_dim=SIZE,
        value_dim=SIZE,
        window=None,
        rolling=False,
        capacity=CAPACITY,
        in_place=in_place,
    )
    text = bundle.manifest.text.model_copy(update={"caches": (cache,), "states": (), "context": CAPACITY})
    graph = GraphFacts(
        file="decoder.onnx",
        inputs=tuple(map(facts_of, model.graph.input)),
        outputs=tuple(map(facts_of, model.graph.output)),
        profiles=PROFILES,
    )
    files = {
        path.name: FileFacts(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.iterdir())
        if path.name != "fmedge.json"
    }
    changes = {"graphs": {"decoder": graph}, "text": text, "files": files, "target": target}
    manifest = bundle.manifest.model_copy(update=changes)
    write_manifest(folder, manifest)
    return Bundle(folder, manifest)


@contextmanager
def doubles(
    cuda: FakeCuda | None = None, inventory: str = "tensorrt-10.3.0", driver: str = "cuda-12.9.4"
) -> Iterator[FakeTensorRT]:
    """TensorRT and CUDA as their doubles, until the end of the block."""
    cuda = cuda or FakeCuda()
    library = FakeTensorRT(cuda, inventory)
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    package.bindings = bindings
    bindings.driver = cuda.module(driver)
    modules = {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.driver": bindings.driver}
    trt = library.module()
    if inventory.startswith("tensorrt_rtx"):
        modules |= {"onnxruntime_ep_nv_tensorrt_rtx": types.ModuleType("libraries"), "tensorrt_rtx_bindings": trt}
    else:
        modules["tensorrt"] = trt
    library.calls = trt._calls
    open_cuda.cache_clear()
    with mock.patch.dict(sys.modules, modules):
        yield library
    open_cuda.cache_clear()
