"""Text and image encoders of transformers."""

from __future__ import annotations

from typing import Any

import torch

from fmedge_converters.parts.part import Asked, Call, Input, Tensors

MASKED = frozenset(
    (
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "SanaPipeline",
        "SanaSprintPipeline",
        "IFPipeline",
        "IFImg2ImgPipeline",
        "IFInpaintingPipeline",
        "IFSuperResolutionPipeline",
        "IFImg2ImgSuperResolutionPipeline",
        "IFInpaintingSuperResolutionPipeline",
    )
)
"""Pipelines that give their text encoder the mask of the tokens."""


def text_encoder(module: Any, asked: Asked) -> dict[str, Call]:  # noqa: ANN401 - any model of transformers
    """Ids (and a mask) -> the fields of the model's output; of CLIP every hidden state, too."""
    ids = Input("input_ids", ("batch", "sequence"), integer=True, below=module.config.vocab_size)
    mask = Input("attention_mask", ("batch", "sequence"), integer=True)
    clip = hasattr(module.config, "projection_dim")
    masked = (asked.pipeline in MASKED and not clip) or getattr(module.config, "use_attention_mask", False)

    def run(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - any model of transformers
        output = model(**given, output_hidden_states=clip, return_dict=True, **({} if clip else {"use_cache": False}))
        named = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        norm = getattr(getattr(model, "text_model", model), "final_layer_norm", None) if clip else None
        for number, state in enumerate(output.hidden_states if clip else ()):
            named[f"hidden_states.{number}"] = state
            # What Stable Diffusion uses to skip the last layers.
            if norm is not None and "text_embeds" not in named:
                named[f"normed_hidden_states.{number}"] = norm(state)
        return named

    longest = getattr(module.config, "max_position_embeddings", None)
    limits = {} if longest is None else {"sequence": int(longest)}
    return {asked.name: Call((ids, mask) if masked else (ids,), run, limits=limits)}


def image_encoder(module: Any, asked: Asked) -> dict[str, Call]:  # noqa: ANN401 - any model of transformers
    """Pixels -> the fields of the model's output."""
    size = module.config.image_size
    pixels = Input("pixel_values", ("batch", module.config.num_channels, size, size))

    def run(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - any model of transformers
        output = model(**given, return_dict=True)
        return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}

    return {asked.name: Call((pixels,), run)}
