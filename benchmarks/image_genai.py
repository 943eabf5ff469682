"""Measure whole images with OpenVINO GenAI in this process; image.py starts it.

The folder comes from openvino_file.py. Modes: "f32" computes in fp32; "" is OpenVINO's default, which is bf16 where the
processor has it. A call takes one prompt, so the images of a batch are made one after the other.
"""

from __future__ import annotations

import time

import numpy as np
import openvino_genai
from image_workload import ImageWorkload, measure
from workload import record_from_arguments


def run(workload: ImageWorkload) -> None:
    """The whole pipeline, with torch's noise of the same seed for each image, as OpenVINO GenAI offers it."""
    started = time.perf_counter()
    settings = {"INFERENCE_NUM_THREADS": workload.threads, "PERFORMANCE_HINT": "LATENCY"}
    if workload.mode == "f32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    pipeline = openvino_genai.Text2ImagePipeline(workload.form)
    pipeline.reshape(1, workload.side, workload.side, 1.0)
    pipeline.compile("CPU", **settings)
    load_s = time.perf_counter() - started

    def generate() -> np.ndarray:
        images = [
            pipeline.generate(
                prompt,
                width=workload.side,
                height=workload.side,
                num_inference_steps=workload.steps,
                guidance_scale=1.0,
                generator=openvino_genai.TorchGenerator(7),
            ).data[0]
            for prompt in workload.prompts()
        ]
        return np.stack(images)  # [B, S, S, 3]

    measure(workload, load_s, generate)


if __name__ == "__main__":
    run(record_from_arguments(ImageWorkload))
