"""Measure one graph of a pipeline in OpenVINO, as OpenVINO GenAI runs it; image.py starts it.

The graphs come from openvino_file.py. Modes: "f32" computes in fp32; "" is OpenVINO's default,
which is bf16 where the processor has it. As OpenVINO recommends and fmedge does not need, shapes are made static first.
"""

from __future__ import annotations

import time
from pathlib import Path

import openvino as ov
from image_workload import STEP, ImageWorkload, measure
from workload import record_from_arguments

PARTS = {"step": "unet", "decode": "vae_decoder"}


def run(workload: ImageWorkload) -> None:
    """One graph."""
    started = time.perf_counter()
    core = ov.Core()
    folder = Path(workload.form) / PARTS[workload.unit]
    model = core.read_model(folder / "openvino_model.xml")
    feeds = workload.step_inputs() if workload.unit == STEP else workload.decode_inputs()
    feeds = {item.any_name: feeds[item.any_name].astype(item.element_type.to_dtype()) for item in model.inputs}
    ranks = {item.any_name: len(item.partial_shape) for item in model.inputs}
    feeds = {name: value.reshape(value.shape if ranks[name] else ()) for name, value in feeds.items()}
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    settings = {"INFERENCE_NUM_THREADS": workload.threads, "PERFORMANCE_HINT": "LATENCY"}
    if workload.mode == "f32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    load_s = time.perf_counter() - started
    measure(workload, load_s, lambda: request.infer(feeds)[compiled.output(0)].copy())  # noqa: PLW0108 - all of it is measured


if __name__ == "__main__":
    run(record_from_arguments(ImageWorkload))
