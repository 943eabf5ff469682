"""What a pipeline makes when a request does not say: size, steps and guidance, as its authors have it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from fmedge_runtimes.manifest import ImageFacts

from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.parts.autoencoders import scale_factor
from fmedge_converters.pipeline_source import PipelineSource

PACKED = 128
"""Latents along a side that Flux makes; its transformer does not say."""
UNKNOWN = {"num_inference_steps": 50, "guidance_scale": 1.0, "height": 512}
"""For pipelines with a class of their own that do not say either."""
FEW_STEPS = (4, 0.0)
"""Steps and guidance of models that were distilled to few steps: LCM's scheduler, or Flux without guidance."""
ONE_STEP = (1, 0.0)
"""The same of those that need a single one (SD-Turbo, SDXL-Turbo): Euler with trailing steps."""


def image_facts(source: PipelineSource, modules: Mapping[str, Any], adapter_scale: float | None = None) -> ImageFacts:
    """The facts of a pipeline, given its modules by the names of their parts; and the usual scale of a LoRA that stays
    apart, if there is one."""
    steps, guidance = _steps(source, modules)
    size = _size(source, modules)
    return ImageFacts(
        pipeline=source.pipeline, height=size, width=size, steps=steps, guidance=guidance, adapter_scale=adapter_scale
    )


def _steps(source: PipelineSource, modules: Mapping[str, Any]) -> tuple[int, float]:
    index = source.index
    if isinstance(index.get("default_steps"), int) and isinstance(index.get("default_guidance"), int | float):
        return index["default_steps"], float(index["default_guidance"])
    scheduler = next((part for part in source.parts if part.name == "scheduler"), None)
    settings = {} if scheduler is None else scheduler.settings
    if scheduler is not None and scheduler.kind.__name__ == "LCMScheduler" and "Consistency" not in source.pipeline:
        return FEW_STEPS
    if scheduler is not None and "Euler" in scheduler.kind.__name__ and settings.get("timestep_spacing") == "trailing":
        return ONE_STEP
    if source.pipeline == "FluxPipeline" and not modules["transformer"].config.guidance_embeds:
        return FEW_STEPS
    steps = _default(source.pipeline, "num_inference_steps", "decoder_num_inference_steps")
    return int(steps), float(_default(source.pipeline, "guidance_scale", "decoder_guidance_scale"))


def _size(source: PipelineSource, modules: Mapping[str, Any]) -> int:
    """Pixels along a side."""
    if isinstance(source.index.get("default_sample_size"), int):
        return int(source.index["default_sample_size"])
    encoders = [module for module in modules.values() if hasattr(module, "encode") and hasattr(module, "decode")]
    factor = scale_factor(encoders[0]) if encoders else 1
    for name in ("super_res_last", "unet_2", "unet", "transformer"):
        if name in modules:
            size = getattr(modules[name].config, "sample_size", None)
            size = size[0] if isinstance(size, list | tuple) else size
            if size is None and "img_ids" in inspect.signature(modules[name].forward).parameters:
                size = PACKED
            if size is not None:
                return int(size) * factor
    return int(_default(source.pipeline, "height"))


def _default(pipeline: str, *names: str) -> int | float:
    """The default of the first of these arguments that a pipeline's call has."""
    with quiet_libraries():
        kind = getattr(diffusers, pipeline, None)
    parameters = {} if kind is None else inspect.signature(kind.__call__).parameters
    for name in names:
        if name in parameters and parameters[name].default:
            default: int | float = parameters[name].default
            return default
    return UNKNOWN[names[0]]
