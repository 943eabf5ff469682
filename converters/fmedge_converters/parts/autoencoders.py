"""Autoencoders of diffusers: a graph that decodes latents, and one that encodes images."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fmedge_converters.parts.part import Asked, Call, Input, Tensors


def autoencoder(module: Any, asked: Asked) -> dict[str, Call]:  # noqa: ANN401 - any autoencoder of diffusers
    """`NAME_decoder`: latent_sample -> sample; `NAME_encoder`: sample -> latent_parameters, mean and log-variance of
    the latents side by side, or the latents themselves where the model has no variance."""
    config = module.config
    image, latents = ("batch", "channels", "height", "width"), ("batch", config.latent_channels, "height", "width")
    factor = scale_factor(module)
    given = {"force_not_quantize": True} if "force_not_quantize" in inspect.signature(module.decode).parameters else {}

    def decode(model: Any, inputs: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - any autoencoder
        return {"sample": model.decode(inputs["latent_sample"], return_dict=False, **given)[0]}

    def encode(model: Any, inputs: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - any autoencoder
        encoded = model.encode(inputs["sample"], return_dict=False)[0]
        return {"latent_parameters": getattr(encoded, "parameters", encoded)}

    pixels = (image[0], config.in_channels, *image[2:])
    return {
        f"{asked.name}_decoder": Call((Input("latent_sample", latents),), decode),
        f"{asked.name}_encoder": Call(
            (Input("sample", pixels),), encode, multiples={"height": factor, "width": factor}
        ),
    }


def scale_factor(module: Any) -> int:  # noqa: ANN401 - any autoencoder of diffusers
    """Pixels along a side of a latent's place."""
    ratio = getattr(module, "spatial_compression_ratio", None)
    if isinstance(ratio, int):
        return ratio
    config = module.config
    blocks = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
    return int(2 ** (len(blocks) - 1))


def autoencodes(module: Any) -> bool:  # noqa: ANN401 - any module
    """Whether a module is an autoencoder."""
    return hasattr(module, "encode") and hasattr(module, "decode")
