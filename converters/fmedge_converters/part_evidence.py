"""The proof that the graphs of an image bundle compute what the modules of its source compute.

Each graph runs beside its PyTorch module, in fp32 and with the real weights, on random inputs of two sizes and batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fmedge_runtimes.manifest import Evidence
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession

from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.parts.part import Call, Input
from fmedge_converters.weight import Array

SIZES: tuple[Mapping[str, int], ...] = (
    {"batch": 1, "height": 24, "width": 16, "sequence": 77, "image_sequence": 96, "steps": 1},
    {"batch": 3, "height": 11, "width": 18, "sequence": 20, "image_sequence": 66, "steps": 3},
)
"""In latents, or pixels where there are none. The second is odd where that is allowed."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far an output may be from PyTorch's before the export stops."""

    largest: float
    """Largest difference of a number, over the largest magnitude of PyTorch's numbers."""
    mean: float
    """Root of the mean square of the differences, over that of PyTorch's numbers."""


DIFFERENCES = {
    ("float32", "none"): Difference(largest=2e-4, mean=5e-5),
    ("float16", "none"): Difference(largest=2e-2, mean=1e-2),
    ("float32", "fp16"): Difference(largest=2e-2, mean=5e-3),
    ("float32", "bf16"): Difference(largest=5e-2, mean=2e-2),
    ("float32", "int8"): Difference(largest=0.15, mean=0.06),
    ("float16", "int8"): Difference(largest=0.05, mean=0.02),
    ("float16", "fp8"): Difference(largest=0.25, mean=0.12),
    ("float32", "int4"): Difference(largest=0.5, mean=0.25),
    ("float16", "int4"): Difference(largest=0.5, mean=0.25),
}
"""By (compute type, quantization)."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What a graph's comparison found, over all outputs and sizes."""

    largest: float
    mean: float

    def within(self, allowed: Difference) -> bool:
        """Whether both are at most so much."""
        return self.largest <= allowed.largest and self.mean <= allowed.mean


def compare(module: Any, call: Call, graph: Path) -> Compared:  # noqa: ANN401 - any module
    """Run a graph and its module on the same random inputs."""
    session = OnnxRuntimeSession(graph, "cpu", None)
    largest = mean = 0.0
    try:
        for number, sizes in enumerate(SIZES):
            inputs = random_inputs(call, sizes, np.random.default_rng(number))
            found = session.run(inputs, {})
            with quiet_libraries(), torch.no_grad():
                wanted = call.run(module, {name: torch.from_numpy(value) for name, value in inputs.items()})
            for name, reference in wanted.items():
                worst, average = _difference(found[name], reference.detach().float().numpy())
                largest, mean = max(largest, worst), max(mean, average)
    finally:
        session.close()
    return Compared(largest, mean)


def parts_evidence(compared: Mapping[str, Compared], precisions: Mapping[str, tuple[str, str]]) -> Evidence:
    """The record of all graphs; each is judged by its own precision."""
    figures: dict[str, float | int | str | bool] = {}
    passed = True
    for name, item in compared.items():
        allowed = DIFFERENCES[precisions[name]]
        passed = passed and item.within(allowed)
        figures |= {f"{name}_largest": item.largest, f"{name}_mean": item.mean}
    sizes = " and ".join(f"batch {item['batch']}, {item['height']} x {item['width']}" for item in SIZES)
    what = f"{len(compared)} graphs against their PyTorch modules in fp32, on random inputs ({sizes})"
    return Evidence(name="parts", what=what, passed=passed, figures=figures)


def random_inputs(call: Call, sizes: Mapping[str, int], random: np.random.Generator) -> dict[str, Array]:
    """An input of each kind that a graph takes, with dynamic axes of these sizes or the next that it allows."""
    return {item.name: _input(item, call, sizes, random) for item in call.inputs}


def _input(item: Input, call: Call, sizes: Mapping[str, int], random: np.random.Generator) -> Array:
    shape = [_size(dim, call, sizes) if isinstance(dim, str) else dim for dim in item.dims]
    if item.integer:
        ids = random.integers(0, item.below, shape)
        if item.below == 2:
            ids[:, 0] = 1  # a row of a mask that hides everything has no meaning
        return ids
    if item.largest is not None:
        return random.uniform(0, item.largest, shape).astype(np.float32)
    return random.standard_normal(shape, np.float32)


def _size(axis: str, call: Call, sizes: Mapping[str, int]) -> int:
    multiple = call.multiples.get(axis, 1)
    size = min(sizes[axis], call.limits.get(axis, sizes[axis]))
    return math.ceil(size / multiple) * multiple


def _difference(found: Array, wanted: Array) -> tuple[float, float]:
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return 1e30, 1e30
    scale, average = float(np.abs(wanted).max()), float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64))))
    difference = np.abs(found - wanted)
    root = float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
    return float(difference.max()) / max(scale, 1e-12), root / max(average, 1e-12)
