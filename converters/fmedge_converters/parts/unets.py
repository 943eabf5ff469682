"""UNets of diffusers: a denoiser whose timestep is one for the whole batch, as in the ONNX exports of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from fmedge_runtimes.engine_limits import RESIDUALS, halved

from fmedge_converters.parts.denoisers import arguments_of, denoiser
from fmedge_converters.parts.part import Asked, Call, Input, Tensors

STEPS = "steps"
DOWN, MID = "down_block_additional_residual", "mid_block_additional_residual"
"""What ControlNets add to the UNet: where its skip connections begin, and in its middle."""


def unet(module: Any, asked: Asked) -> dict[str, Call]:  # noqa: ANN401 - any UNet of diffusers
    """As a denoiser; `timestep` [steps] is one number, or one for each row. With residuals it takes those of
    ControlNets, or zeros of one row and one place."""
    call = denoiser(module, asked)[asked.name]
    inputs = once_for_all(call.inputs)
    spread: dict[str, tuple[int | str, ...]] = {"timestep": (STEPS,)}
    residuals = residuals_of(skip_channels(module), mid_channels(module)) if asked.residuals else {}
    for (name, channels), level in zip(residuals.items(), _levels(module), strict=bool(residuals)):
        inputs.append(Input(name, (1, channels, 1, 1)))
        spread[name] = (RESIDUALS, channels, *(halved(axis, level) for axis in ("height", "width")))
    arguments = arguments_of(module, asked)

    def run(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - any UNet of diffusers
        timestep = given["timestep"].expand(given["sample"].shape[0])
        if not residuals:
            return call.run(model, {**given, "timestep": timestep})
        found = model(
            **arguments.of({**given, "timestep": timestep}),
            down_block_additional_residuals=[given[name] for name in residuals if name != MID],
            mid_block_additional_residual=given[MID],
            return_dict=False,
        )
        return {"out_sample": found[0]}

    return {asked.name: replace(call, inputs=tuple(inputs), run=run, spread=spread)}


def once_for_all(inputs: tuple[Input, ...]) -> list[Input]:
    """The same inputs with a timestep for the whole batch."""
    return [replace(item, dims=(1,)) if item.name == "timestep" else item for item in inputs]


def residuals_of(skips: list[int], mid: int) -> dict[str, int]:
    """Channels of each residual by name, from those of the skip connections and of the middle."""
    return {f"{DOWN}.{number}": channels for number, channels in enumerate(skips)} | {MID: mid}


def _levels(module: Any) -> list[int]:  # noqa: ANN401 - any UNet of diffusers
    """How often the latents' sides were halved at each skip connection, and in the middle."""
    found, level = [0], 0
    for block in module.down_blocks:
        found += [level] * len(block.resnets)
        if block.downsamplers:
            level += 1
            found.append(level)
    return [*found, level]


def skip_channels(module: Any) -> list[int]:  # noqa: ANN401 - any UNet of diffusers
    """Channels of each skip connection."""
    found = [module.conv_in.out_channels]
    for block in module.down_blocks:
        found += [resnet.out_channels for resnet in block.resnets]
        if block.downsamplers:
            found.append(block.resnets[-1].out_channels)
    return found


def mid_channels(module: Any) -> int:  # noqa: ANN401 - any UNet of diffusers
    """Channels in the middle."""
    return int(module.config.block_out_channels[-1])
