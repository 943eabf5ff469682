"""ControlNets: copies of a UNet's first half that read an image and tell the UNet what to add (Zhang et al. 2023, arXiv
2302.05543).

The convolutions that bring the image to the size of latents give the same in every step, so they are a graph of their
own, which runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from fmedge_runtimes.errors import SourceError

from fmedge_converters.parts.autoencoders import scale_factor
from fmedge_converters.parts.denoisers import arguments_of
from fmedge_converters.parts.part import Asked, Call, Input, Tensors
from fmedge_converters.parts.unets import STEPS, mid_channels, once_for_all, residuals_of, skip_channels

EMBEDDING = "controlnet_embedding"
SCALE = "conditioning_scale"
CHANNELS = 3
"""Of an image."""


def controlnet(module: Any, asked: Asked) -> dict[str, Call]:  # noqa: ANN401 - a ControlNetModel
    """`NAME_embedding`: controlnet_cond [batch, 3, height, width] in 0 to 1 -> controlnet_embedding, at the size of
    latents. `NAME`: what the UNet takes, that embedding and `conditioning_scale` (one for each residual) -> the
    residuals, by the names of the UNet's inputs."""
    arguments = arguments_of(module, asked)
    names = tuple(residuals_of(_skips(module), _mid(module)))
    width, factor = module.config.block_out_channels[0], _factor(module)

    def embed(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - a ControlNetModel
        image = given["controlnet_cond"]
        if model.config.controlnet_conditioning_channel_order == "bgr":
            image = torch.flip(image, dims=[1])
        return {EMBEDDING: model.controlnet_cond_embedding(image)}

    def run(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - a ControlNetModel
        with _embedded(model, given[EMBEDDING]):
            down, mid = model(**arguments.of(given), controlnet_cond=given["sample"], return_dict=False)
        scales = given[SCALE].unbind()
        return {name: value * scale for name, value, scale in zip(names, (*down, mid), scales, strict=True)}

    image = Input("controlnet_cond", ("batch", CHANNELS, "height", "width"))
    inputs = [
        *once_for_all(arguments.all),
        Input(EMBEDDING, ("batch", width, "height", "width")),
        Input(SCALE, (len(names),)),
    ]
    return {
        asked.name: Call(tuple(inputs), run, spread={"timestep": (STEPS,)}),
        f"{asked.name}_embedding": Call((image,), embed, multiples={"height": factor, "width": factor}),
    }


@contextmanager
def _embedded(model: Any, embedding: torch.Tensor) -> Iterator[None]:  # noqa: ANN401 - a ControlNetModel
    """Have the model find this where it would embed the image."""
    with patch.object(model.controlnet_cond_embedding, "forward", lambda _: embedding):
        yield


def check_controlnet(module: Any, unet: Any, autoencoder: Any, where: str) -> None:  # noqa: ANN401 - three modules
    """Raise SourceError, which says what differs, if a ControlNet was not made for that UNet and that autoencoder."""
    other: dict[str, tuple[Any, Any]] = {
        "channels of its residuals": ([*_skips(module), _mid(module)], [*skip_channels(unet), mid_channels(unet)]),
        "in_channels": (module.config.in_channels, autoencoder.config.latent_channels),
        "pixels of a latent's side": (_factor(module), scale_factor(autoencoder)),
    }
    for name in ("cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim"):
        other[name] = (module.config.get(name), unet.config.get(name))
    for what, (own, wanted) in other.items():
        if own != wanted:
            raise SourceError(
                f"{where} is a ControlNet for another model: {what}: {own}, and the pipeline has {wanted}."
            )
    if module.config.conditioning_channels != CHANNELS:
        raise SourceError(
            f"{where}: conditioning_channels is {module.config.conditioning_channels}; control images have {CHANNELS}."
        )


def _skips(module: Any) -> list[int]:  # noqa: ANN401 - a ControlNetModel
    return [block.out_channels for block in module.controlnet_down_blocks]


def _mid(module: Any) -> int:  # noqa: ANN401 - a ControlNetModel
    return int(module.controlnet_mid_block.out_channels)


def _factor(module: Any) -> int:  # noqa: ANN401 - a ControlNetModel
    """Pixels along a side of a latent's place: each but the first width of the embedding halves."""
    return int(2 ** (len(module.config.conditioning_embedding_out_channels) - 1))
