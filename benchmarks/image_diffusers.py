"""Measure one pipeline in diffusers in this process; image.py starts it. Modes: "eager" and "compiled"."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from image_workload import DECODE, IMAGES, STEP, ImageWorkload, measure
from workload import record_from_arguments


def made(workload: ImageWorkload, module: Any) -> Any:  # noqa: ANN401 - any module
    """The module as the mode has it."""
    module.eval()
    return torch.compile(module, dynamic=False) if workload.mode == "compiled" else module


def run_step(workload: ImageWorkload) -> None:
    """One forward pass of the UNet."""
    started = time.perf_counter()
    unet = made(workload, diffusers.UNet2DConditionModel.from_pretrained(Path(workload.form) / "unet"))
    load_s = time.perf_counter() - started
    given = {name: torch.from_numpy(value) for name, value in workload.step_inputs().items()}
    measure(workload, load_s, lambda: unet(**given, return_dict=False)[0].numpy())  # noqa: PLW0108 - all of it is measured


def run_decode(workload: ImageWorkload) -> None:
    """One decoding of latents."""
    started = time.perf_counter()
    autoencoder = diffusers.AutoencoderKL.from_pretrained(Path(workload.form) / "vae").eval()
    if workload.mode == "compiled":
        autoencoder.decoder = torch.compile(autoencoder.decoder, dynamic=False)
    load_s = time.perf_counter() - started
    latents = torch.from_numpy(workload.decode_inputs()["latent_sample"])
    measure(workload, load_s, lambda: autoencoder.decode(latents, return_dict=False)[0].numpy())  # noqa: PLW0108 - as above


def run_images(workload: ImageWorkload) -> None:
    """The whole pipeline, with a generator of the same seed for each image."""
    started = time.perf_counter()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(workload.form, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    if workload.mode == "compiled":
        name = "unet" if hasattr(pipeline, "unet") else "transformer"
        setattr(pipeline, name, torch.compile(getattr(pipeline, name), dynamic=False))
    load_s = time.perf_counter() - started
    prompts = workload.prompts()

    def generate() -> np.ndarray:
        generators = [torch.Generator().manual_seed(7) for _ in prompts]
        images = pipeline(
            prompts,
            num_inference_steps=workload.steps,
            guidance_scale=1.0,
            height=workload.side,
            width=workload.side,
            generator=generators,
        ).images
        return np.stack([np.asarray(image) for image in images])  # [B, S, S, 3]

    measure(workload, load_s, generate)


if __name__ == "__main__":
    arguments = record_from_arguments(ImageWorkload)
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        {STEP: run_step, DECODE: run_decode, IMAGES: run_images}[arguments.unit](arguments)
