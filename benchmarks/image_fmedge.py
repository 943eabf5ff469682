"""Measure one fmedge image bundle in this process; image.py starts it. Steps and decoding are the bare graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from fmedge_runtimes.backends import open_session
from fmedge_runtimes.bundle import open_image_bundle
from fmedge_runtimes.parts import Part
from image_workload import DECODE, IMAGES, STEP, ImageWorkload, measure
from workload import record_from_arguments

import fmedge
from fmedge import Diffusion

PARTS = {STEP: ("unet", "out_sample"), DECODE: ("vae_decoder", "sample")}


def run_graph(workload: ImageWorkload) -> None:
    """One graph of the bundle."""
    started = time.perf_counter()
    name, output = PARTS[workload.unit]
    bundle = open_image_bundle(Path(workload.form), checksums=False)
    session = open_session(bundle.file(bundle.manifest.graphs[name].file), workload.device, workload.threads)
    load_s = time.perf_counter() - started
    feeds = workload.step_inputs() if workload.unit == STEP else workload.decode_inputs()
    measure(workload, load_s, lambda: session.run(feeds, {})[output])


class InGraphs:
    """Counts the seconds that parts take, by standing in front of `Part.run`.

    Not the processor time: asking for that takes longer than a step of a small model on some systems.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        inner = Part.run

        def run(part: Part, feeds: Mapping, results: Mapping | None = None) -> dict:
            started = time.perf_counter()
            try:
                return inner(part, feeds, results)
            finally:
                self.seconds += time.perf_counter() - started

        Part.run = run


def run_images(workload: ImageWorkload) -> None:
    """Through ImageModel.generate, as a user runs it."""
    counted = InGraphs()
    started = time.perf_counter()
    model = fmedge.load(workload.form, device=workload.device, threads=workload.threads)
    load_s = time.perf_counter() - started
    options = Diffusion(steps=workload.steps, guidance=1.0, seed=7, height=workload.side, width=workload.side)
    prompts = workload.prompts()

    def generate() -> np.ndarray:
        return np.stack([np.asarray(made.image) for made in model.generate(prompts, options)])  # [B, S, S, 3]

    measure(workload, load_s, generate, lambda: counted.seconds)


if __name__ == "__main__":
    arguments = record_from_arguments(ImageWorkload)
    (run_images if arguments.unit == IMAGES else run_graph)(arguments)
