"""What the ONNX Runtime backend decides by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fmedge_runtimes import onnxruntime_session
from fmedge_runtimes.backends import open_session
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession


@pytest.fixture
def arithmetic(tmp_path: Path) -> Path:
    """A graph that gives the sum, the product and the difference of two vectors."""
    import onnx
    from onnx import TensorProto, helper

    def vectors(names: str) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in names.split()]

    operators = {"sum": "Add", "product": "Mul", "difference": "Sub"}
    nodes = [helper.make_node(operator, ["a", "b"], [name]) for name, operator in operators.items()]
    graph = helper.make_graph(nodes, "arithmetic", vectors("a b"), vectors(" ".join(operators)))
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """A product of a slice with a weight in fp16, as heads have it, in whose layout ONNX Runtime 1.32 dies."""
    import onnx
    from onnx import TensorProto, helper

    def tensors(**shapes: list[int | str]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in shapes.items()]

    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("Split", ["turned"], ["first", "second"], axis=0, num_outputs=2),
        helper.make_node("MatMul", ["second", "weight"], ["y"]),
    ]
    weight = onnx.numpy_helper.from_array(2 * np.eye(8, dtype=np.float16), "weight")
    outputs = tensors(first=[1, "n", 8], y=[1, "n", 8])
    graph = helper.make_graph(nodes, "divided", tensors(x=["n", 2, 8]), outputs, [weight])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_what_is_bound_stays_bound_and_what_is_not_comes_back(arithmetic: Path) -> None:
    session = OnnxRuntimeSession(arithmetic, "cpu", 1)
    kept, total = session.allocate((2,), np.dtype("float32")), session.allocate((2,), np.dtype("float32"))
    kept.array[:] = [3, 5]
    product, difference = vector(0, 0), vector(0, 0)
    binding = session.bind({"a": kept}, {"sum": total})
    for step in range(3):
        binding.run({"b": vector(1, step)}, {"product": product, "difference": difference})
        assert (total.array == [4, 5 + step]).all()
        assert (product == [3, 5 * step]).all()
        assert (difference == [2, 5 - step]).all()
        kept.array[0] = 3
        returned = session.run({"a": kept, "b": vector(2, step)}, {"difference": difference, "sum": total})
        assert list(returned) == ["product"]
        assert (returned["product"] == [6, 5 * step]).all()
        assert (total.array == [5, 5 + step]).all()


def test_a_graph_that_fails_and_a_closed_session_say_so(arithmetic: Path) -> None:
    session = OnnxRuntimeSession(arithmetic, "cpu", 1)
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        session.run({"a": vector(1, 2), "b": vector(1, 2, 3)}, {})
    session.close()
    with pytest.raises(BackendError, match="is closed"):
        session.run({"a": vector(1, 2), "b": vector(1, 2)}, {})


def test_a_block_is_copied_as_far_as_asked(arithmetic: Path) -> None:
    session = OnnxRuntimeSession(arithmetic, "cpu", 1)
    source, target = session.allocate((2, 3), np.dtype("float32")), session.allocate((3, 2), np.dtype("float32"))
    source.array[:] = 1
    session.copy(source, target, (1, 2))
    assert target.array.tolist() == [[1, 1], [0, 0], [0, 0]]
    session.copy(source, target)
    assert target.array.tolist() == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("machine", "flags", "saturates"),
    [
        ("x86_64", "flags : avx2 avx512f", True),
        ("x86_64", "flags : avx512f avx512_vnni", False),
        ("AMD64", "flags : avx2 avx_vnni", False),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_exact_int8_sums_are_asked_for_where_they_would_saturate(
    machine: str, flags: str | None, saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(flags)
    monkeypatch.setattr(onnxruntime_session, "CPUINFO", info)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert onnxruntime_session._int8_saturates() is saturates


@pytest.mark.parametrize("threads", [0, -1])
def test_a_number_of_threads_that_cannot_be_is_refused(arithmetic: Path, threads: int) -> None:
    with pytest.raises(RequestError, match=f"threads is {threads}; it must be at least 1"):
        open_session(arithmetic, "cpu", threads)


def test_divided_heads_in_fp16_open(divided: Path) -> None:
    """In a process of its own: where it fails, ONNX Runtime ends it."""
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession\n"
        "x = np.arange(48, dtype=np.float16).reshape(3, 2, 8)\n"
        "y = OnnxRuntimeSession(Path(sys.argv[1]), 'cpu', 1).run({'x': x}, {})['y']\n"
        "assert (y[0] == 2 * x[:, 1]).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(divided)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_convolutions_keep_their_layout(arithmetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    image = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 4, 4]) for name in ("x", "y")]
    kernel = onnx.numpy_helper.from_array(np.ones((8, 8, 1, 1), np.float32), "kernel")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "kernel"], ["y"])], "conv", image[:1], image[1:], [kernel]
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "conv.onnx"
    )
    opened = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *args, disabled_optimizers, **more: (
            opened.append(disabled_optimizers) or real(*args, disabled_optimizers=disabled_optimizers, **more)
        ),
    )
    for file in (tmp_path / "conv.onnx", arithmetic):
        OnnxRuntimeSession(file, "cpu", 1)
    assert opened == [[], ["NchwcTransformer"]]
