"""Where a step goes: the time of each operator of a fmedge bundle in a prefill and in a decode step.

    python benchmarks/operators.py out/benchmarks/smol135/fmedge-int4-128 --batches 1,8,16

ONNX Runtime's profiler itself costs time in every node: read the shares, not the sums.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from fmedge_runtimes.bundle import open_bundle
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession

WARM_UP = 4


@dataclass(frozen=True, slots=True)
class Operator:
    """One kind of node in one step: the median over the steps of the sum over its nodes."""

    name: str
    nodes: int
    milliseconds: float


def profile(bundle_folder: Path, batch: int, prompt: int, steps: int, threads: int) -> dict[str, list[Operator]]:
    """Operators of a prefill of one row ("prefill") and of a decode step of `batch` rows ("decode")."""
    bundle = open_bundle(bundle_folder, checksums=False)
    facts = bundle.manifest.text
    graph = bundle.file(bundle.manifest.graphs["decoder"].file)
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.intra_op_num_threads = threads
        # fmedge offers no profiling; its session is opened and then given a profiled graph in place of its own.
        session = OnnxRuntimeSession(graph, "cpu", threads)
        session._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        decoder, random = Decoder(session, facts), np.random.default_rng(0)
        cache = decoder.new_cache()
        cache.reserve(batch, prompt + steps + 1)
        for row in range(batch):
            decoder.prefill(cache, row, random.integers(0, facts.vocabulary, prompt).tolist())
        for _ in range(steps):
            decoder.decode(cache, random.integers(0, facts.vocabulary, batch).tolist())
        events = json.loads(Path(session._session.end_profiling()).read_text("utf-8"))
    runs = runs_from_events(events)
    # The first prefill warms up, unless there is no other one.
    return {
        "prefill": medians(runs[:batch][1:] or runs[:1]),
        "decode": medians(runs[batch + WARM_UP :]),
    }


def runs_from_events(events: list[dict]) -> list[dict[str, list[float]]]:
    """For each run of the graph the milliseconds of its nodes by operator; the head has a name of its own."""
    runs: list[dict[str, list[float]]] = []
    current: dict[str, list[float]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.get("ts", 0) + event.get("dur", 0)):
        if event.get("name") == "model_run":
            runs.append(current)
            current = defaultdict(list)
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            current[operator_name(event["args"])].append(event["dur"] / 1e3)
    return runs


def operator_name(arguments: dict) -> str:
    """The operator and, for a product with weights, their shape."""
    name = arguments["op_name"]
    shapes = [next(iter(each.values())) for each in arguments.get("input_type_shape", []) if each]
    if "MatMul" not in name or len(shapes) < 2:
        return name
    return f"{name} {'x'.join(map(str, shapes[1]))}"


def medians(runs: list[dict[str, list[float]]]) -> list[Operator]:
    """The operators of some runs, the slowest first."""
    names = dict.fromkeys(name for run in runs for name in run)
    operators = [
        Operator(
            name,
            max(len(run.get(name, ())) for run in runs),
            statistics.median(sum(run.get(name, ())) for run in runs),
        )
        for name in names
    ]
    return sorted(operators, key=lambda operator: -operator.milliseconds)


def main() -> None:
    """A table for each batch size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--top", type=int, default=10, help="operators to show")
    options = parser.parse_args()
    for batch in map(int, options.batches.split(",")):
        stages = profile(options.bundle, batch, options.prompt, options.steps, options.threads)
        for stage, operators in stages.items():
            total = sum(operator.milliseconds for operator in operators)
            print(f"\n{options.bundle.name} batch {batch} {stage}: {total:.2f} ms in all nodes")
            for operator in operators[: options.top]:
                share = operator.milliseconds / total
                print(f"  {operator.milliseconds:8.2f} ms  {share:5.1%}  x{operator.nodes:<4d} {operator.name}")


if __name__ == "__main__":
    main()
