"""UNets of diffusers: a denoiser whose timestep is one for the whole batch, as in the ONNX exports of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fmedge_converters.parts.denoisers import denoiser
from fmedge_converters.parts.part import Asked, Call, Tensors

STEPS = "steps"


def unet(module: Any, asked: Asked) -> dict[str, Call]:  # noqa: ANN401 - any UNet of diffusers
    """As a denoiser; `timestep` [steps] is one number, or one for each row."""
    call = denoiser(module, asked)[asked.name]
    inputs = [replace(item, dims=(1,)) if item.name == "timestep" else item for item in call.inputs]

    def run(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - any UNet of diffusers
        timestep = given["timestep"].expand(given["sample"].shape[0])
        return call.run(model, {**given, "timestep": timestep})

    return {asked.name: replace(call, inputs=tuple(inputs), run=run, batched={"timestep": STEPS})}
