"""Mixtures of experts: the time of one layer's experts in each form, and beside transformers' own batched form.

    python benchmarks/experts.py --shapes qwen3,mixtral --tokens 1,4,16,512 --threads 2

The layer is traced, spelled and written as an export does it, with random weights that nobody holds whole. `batched` is
what a trace of transformers' batched_mm gives: it gathers the matrices of every chosen expert for every token, so it is
left out where that needs more than --limit-gb. Forms of one precision take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from accelerate import init_empty_weights
from background import Background
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.experts import IMPLEMENTATION
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.large_tensors import LargeOnMeta
from fmedge_converters.passes.constant_folding import fold_constants
from fmedge_converters.passes.linear import recognise_linears
from fmedge_converters.quantize import quantize
from fmedge_converters.schemes.dynamic_int8 import DYNAMIC_INT8
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.qmoe import qmoe
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.schemes.weight_only import BLOCK_SIZE, weight_only
from fmedge_converters.weight import Array, Weight
from fmedge_converters.writer import write_graph
from peers import remove
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

BATCHED = "batched_mm"


@dataclass(frozen=True, slots=True)
class Shape:
    """The experts of one layer."""

    published: str
    experts: int
    chosen: int
    hidden: int
    inner: int

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one expert in fp32."""
        return 3 * self.hidden * self.inner * 4


SHAPES = {
    "qwen3": Shape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    "mixtral": Shape("Mixtral-8x7B at half its width", 8, 2, 2048, 7168),
}


@dataclass(frozen=True, slots=True)
class Form:
    """A way to write the experts; without a scheme it is transformers' batched form."""

    name: str
    scheme: Scheme | None


def _plain_int4() -> Scheme:
    return weight_only("int4", "", 4, head_bits=8, accuracy_level=4, mixture=None)


PRECISIONS: dict[str, tuple[Form, ...]] = {
    "none": (Form("plain", FLOATING), Form("batched", None)),
    "int8": (
        Form("kernel", DYNAMIC_INT8),
        Form("plain", Scheme("int8", "", 8, DYNAMIC_INT8.linear, DYNAMIC_INT8.embedding, block_size=0)),
    ),
    "int4": (
        Form("kernel", weight_only("int4", "", 4, head_bits=8, accuracy_level=4, mixture=qmoe(4, 4))),
        Form("plain", _plain_int4()),
    ),
}
"""`plain` is a product for each expert, `kernel` is QMoE; the two of int4 have the same codes."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One form at one number of tokens."""

    shape: str
    precision: str
    form: str
    tokens: int
    milliseconds: float | None
    """None where it would need more memory than allowed."""
    cpu_milliseconds: float | None
    over_batched: float | None
    """batched's time over this one's."""
    runs: int


class Layer(torch.nn.Module):
    """Experts behind a router's weights, and a head: schemes treat a decoder's last product in a way of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = PretrainedConfig(
            num_local_experts=shape.experts, hidden_size=shape.hidden, intermediate_size=shape.inner, hidden_act="silu"
        )
        self.experts = MixtralExperts(config)
        self.head = torch.nn.Linear(shape.hidden, 8, bias=False)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts' output [T, H], and the head's [T, 8]."""
        y = self.experts(x, index, weights.abs())
        return y, self.head(y)


def trace(shape: Shape, implementation: str) -> DecoderGraph:
    """The layer's graph with random weights, which are made when they are read."""
    with quiet_libraries(), init_empty_weights(include_buffers=False), LargeOnMeta():
        layer = Layer(shape)
    layer.experts.config._experts_implementation_internal = implementation
    tokens = torch.export.Dim("tokens")
    with quiet_libraries(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
        arguments = (
            torch.zeros(5, shape.hidden),
            torch.zeros(5, shape.chosen, dtype=torch.int64),
            torch.ones(5, shape.chosen),
        )
        program = torch.onnx.export(
            layer,
            arguments,
            dynamo=True,
            dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}),
            opset_version=23,
            input_names=["x", "index", "weights"],
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    made = DecoderGraph(program.model, {})
    for name, parameter in layer.named_parameters():
        value = made.graph.initializers.pop(name)
        weight = random_weight(tuple(parameter.shape))
        bound = made.add_weight(name, weight)
        value.replace_all_uses_with(bound)
    return made


def random_weight(shape: tuple[int, ...]) -> Weight:
    """Random numbers, the same whenever they are read."""

    def read(start: int, stop: int) -> Array:
        result = np.empty((stop - start, *shape[1:]), np.float32)
        for row in range(start, stop):
            random = np.random.default_rng(row)
            result[row - start] = random.standard_normal(shape[1:], np.float32) * np.float32(shape[-1] ** -0.5)
        return result

    return Weight(shape, np.dtype(np.float32), read)


def write(shape: Shape, form: Form, folder: Path) -> Path:
    """The graph of a form."""
    made = trace(shape, BATCHED if form.scheme is None else IMPLEMENTATION)
    fold_constants(made, 0)
    recognise_linears(made, 0)
    scheme = FLOATING if form.scheme is None else form.scheme
    quantize(made, scheme, scheme.block_size and BLOCK_SIZE)
    return write_graph(made, folder, form.name, lambda *_: None).graph


def measure(
    name: str, precision: str, tokens: list[int], threads: int, rounds: int, limit: float, folder: Path
) -> list[Measured]:
    """All forms of one precision, in turns."""
    shape = SHAPES[name]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = {
        form.name: onnxruntime.InferenceSession(str(write(shape, form, folder)), options, ["CPUExecutionProvider"])
        for form in PRECISIONS[precision]
    }
    results = []
    for count in tokens:
        runs: dict[str, Callable[[dict[str, Array]], object]] = {
            form: (lambda feeds, session=session: session.run(None, feeds))
            for form, session in sessions.items()
            if form != "batched" or count * shape.chosen * shape.matrix_bytes <= limit
        }
        wall: dict[str, list[float]] = {form: [] for form in runs}
        cpu: dict[str, list[float]] = {form: [] for form in runs}
        for number in range(rounds + 1):
            feeds = inputs(shape, count, number)
            for form, run in runs.items():
                started, used = time.perf_counter(), time.process_time()
                run(feeds)
                if number:  # the first round warms up
                    wall[form].append((time.perf_counter() - started) * 1e3)
                    cpu[form].append((time.process_time() - used) * 1e3)
        for form in sessions:
            done = form in runs
            results.append(
                Measured(
                    name,
                    precision,
                    form,
                    count,
                    statistics.median(wall[form]) if done else None,
                    statistics.median(cpu[form]) if done else None,
                    None,
                    rounds if done else 0,
                )
            )
    del sessions
    gc.collect()
    return results


def inputs(shape: Shape, tokens: int, seed: int) -> dict[str, Array]:
    """Random tokens with random routing."""
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((tokens, shape.hidden)).astype(np.float32),
        "index": np.argsort(random.random((tokens, shape.experts)), axis=1)[:, : shape.chosen],
        "weights": random.random((tokens, shape.chosen)).astype(np.float32) + np.float32(0.05),
    }


def with_ratios(results: list[Measured]) -> list[Measured]:
    """Each time beside that of the batched form of the same shape and number of tokens."""
    batched = {(item.shape, item.tokens): item.milliseconds for item in results if item.form == "batched"}
    return [
        Measured(**{**asdict(item), "over_batched": other / item.milliseconds})
        if item.milliseconds and (other := batched.get((item.shape, item.tokens)))
        else item
        for item in results
    ]


def main() -> None:
    """A table for each shape, and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", default="qwen3,mixtral")
    parser.add_argument("--precisions", default="none,int8,int4")
    parser.add_argument("--tokens", default="1,4,16,512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit-gb", type=float, default=8.0, help="what the batched form may gather at once")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks/experts"))
    options = parser.parse_args()
    results: list[Measured] = []
    with Background() as background:
        for name in options.shapes.split(","):
            for precision in options.precisions.split(","):
                folder = options.work / name / precision
                folder.mkdir(parents=True, exist_ok=True)
                tokens = [int(count) for count in options.tokens.split(",")]
                results += measure(
                    name, precision, tokens, options.threads, options.rounds, options.limit_gb * 1e9, folder
                )
                remove(folder)
    results = with_ratios(results)
    for name in options.shapes.split(","):
        shape = SHAPES[name]
        print(
            f"\n{shape.published}: {shape.experts} experts, {shape.chosen} for a token, {shape.hidden} x {shape.inner}"
        )
        print(f"{'':18s}{'tokens':>7s}{'ms':>10s}{'CPU ms':>10s}{'x batched':>10s}")
        for item in results:
            if item.shape == name:
                figures = (item.milliseconds, item.cpu_milliseconds, item.over_batched)
                cells = "".join(f"{'-':>10s}" if figure is None else f"{figure:10.2f}" for figure in figures)
                print(f"{item.precision + '/' + item.form:18s}{item.tokens:7d}{cells}")
    print(f"\nothers used {background.cores:.2f} cores meanwhile")
    print(
        json.dumps(
            {
                "benchmark": "experts",
                "threads": options.threads,
                "onnxruntime": onnxruntime.__version__,
                "background_cores": background.cores,
                "results": [asdict(item) for item in results],
            }
        )
    )


if __name__ == "__main__":
    main()
