"""Priors and projections of unCLIP and Kandinsky: from text to CLIP's embedding of an image.

Their pipelines also use some of their parameters by themselves; each is an output that depends on no input.
"""

from __future__ import annotations

from typing import Any

import torch

from fmedge_converters.parts.part import Asked, Call, Input, Tensors


def prior(module: Any, asked: Asked) -> dict[str, Call]:  # noqa: ANN401 - a PriorTransformer
    """The arguments of `forward` -> predicted_image_embedding, and clip_mean and clip_std, by which it is scaled."""
    config = module.config
    size, tokens = config.embedding_dim, config.num_embeddings
    inputs = (
        Input("hidden_states", ("batch", size)),
        Input("timestep", ("batch",), largest=999),
        Input("proj_embedding", ("batch", config.embedding_proj_dim or size)),
        Input("encoder_hidden_states", ("batch", tokens, size)),
        Input("attention_mask", ("batch", tokens), integer=True),
    )

    def run(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - a PriorTransformer
        output = model(**given, return_dict=False)[0]
        return {"predicted_image_embedding": output, "clip_mean": model.clip_mean, "clip_std": model.clip_std}

    return {asked.name: Call(inputs, run)}


def text_projection(module: Any, asked: Asked) -> dict[str, Call]:  # noqa: ANN401 - an UnCLIPTextProjModel
    """Embeddings of image and text -> encoder_hidden_states and class_labels of the decoder. Without an image guidance
    uses `unconditional_image_embeddings`."""
    size = module.config.clip_embeddings_dim
    text = module.encoder_hidden_states_proj.in_features
    inputs = (
        Input("image_embeddings", ("batch", size)),
        Input("prompt_embeds", ("batch", size)),
        Input("text_encoder_hidden_states", ("batch", "sequence", text)),
    )

    def run(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - an UnCLIPTextProjModel
        states, labels = model(**given, do_classifier_free_guidance=False)
        unconditional = model.learned_classifier_free_guidance_embeddings
        return {
            "encoder_hidden_states": states,
            "class_labels": labels,
            "unconditional_image_embeddings": unconditional,
        }

    return {asked.name: Call(inputs, run)}
