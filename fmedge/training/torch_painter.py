"""Pictures from a diffusers folder, with torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from fmedge_converters.pixel_pipeline import PixelDiffusionPipeline
from fmedge_runtimes.errors import SourceError
from numpy.typing import NDArray

from fmedge.caption_accuracy import Painter
from fmedge.training.denoiser import INDEX, read_pipeline
from fmedge.training.quiet import quiet, quiet_diffusers


def painter_from_folder(folder: Path, steps: int | None, guidance: float | None) -> Painter:
    """Load a pipeline; None: as it has it itself. The folder's code does not run: what `fmedge train` wrote is ours."""
    pipeline = _pipeline(folder)
    options: dict[str, Any] = {}
    if steps is not None:
        options["num_inference_steps"] = steps
    if guidance is not None:
        options["guidance_scale"] = guidance

    def paint(captions: Sequence[str], seeds: Sequence[int]) -> list[NDArray[np.uint8]]:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        with quiet(), quiet_diffusers():
            images = pipeline(list(captions), generator=noise, output_type="pil", **options).images
        return [np.asarray(image.convert("RGB")) for image in images]

    return paint


def _pipeline(folder: Path) -> DiffusionPipeline:
    name = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("_class_name")
    ours = isinstance(name, list) and name[-1] == PixelDiffusionPipeline.__name__
    with quiet(), quiet_diffusers():
        try:
            pipeline = read_pipeline(folder) if ours else DiffusionPipeline.from_pretrained(folder)
        except Exception as error:  # Each part has its own ways to fail.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SourceError(f"{folder}: diffusers cannot load it: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
