"""What every peer is asked to do for images, and what it reports. Needs numpy beside the standard library.

workload = record_from_arguments(ImageWorkload)
measure(workload, load_s, work)                  # prints one JSON line, read by image.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from workload import peak_resident_mib

STEP, DECODE, IMAGES = "step", "decode", "images"
SAMPLED = 512
"""Values of an output that are reported, to be compared with another peer's."""
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
FORMS = ("circle", "square", "triangle")
PLACES = ("left", "right", "top", "bottom", "center")


@dataclass(frozen=True, slots=True)
class ImageWorkload:
    """One forward pass of a denoiser, one decoding of latents, or whole images."""

    form: str
    """Folder of the model, in the peer's own form."""
    unit: str
    """STEP, DECODE or IMAGES."""
    side: int = 512
    """Pixels along a side of an image."""
    batch: int = 1
    steps: int = 10
    """Of whole images."""
    context: int = 768
    """Width of the text's states, for STEP."""
    threads: int = 1
    repeats: int = 3
    mode: str = ""
    """Which way through the peer is measured, for those that have several."""
    device: str = "cpu"

    def step_inputs(self) -> dict[str, Any]:
        """Of a UNet: sample [B, 4, S / 8, S / 8], timestep [1], encoder_hidden_states [B, 77, D]."""
        draw = np.random.default_rng(0)
        return {
            "sample": draw.standard_normal((self.batch, 4, self.side // 8, self.side // 8), np.float32),
            "timestep": np.array([500.0], np.float32),
            "encoder_hidden_states": draw.standard_normal((self.batch, 77, self.context), np.float32),
        }

    def decode_inputs(self) -> dict[str, Any]:
        """Of an autoencoder: latent_sample [B, 4, S / 8, S / 8]."""
        return {"latent_sample": self.step_inputs()["sample"]}

    def prompts(self) -> list[str]:
        """A caption of the shapes data for each image; all differ as long as there are not too many."""
        each = [f"a small {colour} {form} in the {place}" for place in PLACES for form in FORMS for colour in COLOURS]
        return [each[number % len(each)] for number in range(self.batch)]


@dataclass(frozen=True, slots=True)
class ImageMeasurement:
    """Samples of one process: one value for each measured repeat of the whole batch."""

    load_s: float
    peak_mib: float
    seconds: list[float]
    cpu_seconds: list[float]
    """Processor time of the process, all of its threads."""
    graph_seconds: list[float]
    """Of `seconds`, what was spent in graphs; empty where it is not known."""
    output: list[float]
    """Evenly spaced values of the last result."""


def measure(
    workload: ImageWorkload,
    load_s: float,
    work: Callable[[], Any],
    in_graphs: Callable[[], float] | None = None,
) -> None:
    """Run `work` once to warm up and then for every repeat, and print the measurement.

    `work` returns the output as an array. `in_graphs` tells the seconds that graphs have taken since the start.
    """
    work()
    seconds, cpu_seconds, graph_seconds = [], [], []
    result = None
    for _ in range(workload.repeats):
        graphs = in_graphs() if in_graphs is not None else 0.0
        started, cpu = time.perf_counter(), time.process_time()
        result = work()
        cpu_seconds.append(time.process_time() - cpu)
        seconds.append(time.perf_counter() - started)
        if in_graphs is not None:
            graph_seconds.append(in_graphs() - graphs)
    measurement = ImageMeasurement(
        load_s, peak_resident_mib(), seconds, cpu_seconds, graph_seconds, sampled(np.asarray(result))
    )
    print(json.dumps(asdict(measurement)))


def sampled(values: Any) -> list[float]:  # noqa: ANN401 - any numeric array
    """SAMPLED values, evenly spaced. Raises SystemExit when one of all is not finite."""
    flat = np.asarray(values, np.float64).reshape(-1)
    if not np.isfinite(flat).all():
        raise SystemExit("the output has values that are not finite")
    places = np.linspace(0, flat.size - 1, min(SAMPLED, flat.size)).round().astype(int)
    return [round(float(value), 7) for value in flat[places]]


def difference(values: Sequence[float], reference: Sequence[float]) -> float:
    """The largest difference between two outputs, in standard deviations of the second."""
    ours, theirs = np.array(values), np.array(reference)
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(float(theirs.std()), 1e-12))
