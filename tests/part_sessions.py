"""Sessions over the modules of any pipeline of diffusers, and the folder of a bundle around them.

    opened = open_pipeline(tiny_pipeline("sd3"), tmp_path)
    opened.model().generate(...)

Inputs and outputs are those of the graphs that fmedge exports of such modules.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.session import TensorSpec
from image_models import Opened, generator
from torch_session import TorchSession, decoder_session, encoder_session, text_session

Run = Callable[..., dict[str, torch.Tensor]]

AXES: Mapping[str, str] = {
    "sample": "bchw",
    "hidden_states": "bchw",
    "timestep": "b",
    "encoder_hidden_states": "bsd",
    "pooled_projections": "bd",
    "guidance": "b",
    "img_ids": "sd",
    "txt_ids": "sd",
    "encoder_attention_mask": "bs",
    "attention_mask": "bs",
    "class_labels": "b",
    "resolution": "bd",
    "aspect_ratio": "bd",
    "image_embeds": "bd",
    "proj_embedding": "bd",
    "image_embeddings": "bd",
    "prompt_embeds": "bd",
    "text_encoder_hidden_states": "bsd",
    "pixel_values": "bchw",
    "predicted_image_embedding": "bd",
}
"""Of each input and output, unless a part says otherwise."""
MASKED = ("PixArt", "Sana", "IF")
"""Pipelines that give their text encoder a mask."""


def session(
    run: Run, inputs: Mapping[str, str], outputs: tuple[str, ...], integers: tuple[str, ...] = ()
) -> TorchSession:
    """A function of tensors as a graph; inputs by name with their axes."""
    specs = tuple(
        TensorSpec(name, "int64" if name.endswith("mask") or name in integers else "float32", tuple(axes))
        for name, axes in inputs.items()
    )
    return TorchSession(run, specs, tuple(TensorSpec(name, "float32", ("any",)) for name in outputs))


def _axes(*names: str, **others: str) -> dict[str, str]:
    return {name: AXES[name] for name in names} | others


def transformer_session(module: Any) -> TorchSession:
    """A transformer of diffusers, with the arguments of its `forward` that its pipeline gives."""
    parameters = inspect.signature(module.forward).parameters
    names = ["hidden_states", "timestep", "encoder_hidden_states"]
    names += [name for name in ("pooled_projections", "img_ids", "txt_ids") if name in parameters]
    names += ["guidance"] if module.config.get("guidance_embeds") else []
    names += ["encoder_attention_mask"] if "encoder_attention_mask" in parameters else []
    more = ("resolution", "aspect_ratio") if module.config.get("use_additional_conditions") else ()
    takes_more = "added_cond_kwargs" in parameters

    def run(**feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        given = {name: feeds[name] for name in names}
        if takes_more:
            given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None} | {
                name: feeds[name] for name in more
            }
        return {"out_hidden_states": module(**given, return_dict=False)[0]}

    axes = _axes(*names, *more)
    if "img_ids" in axes:
        axes["hidden_states"] = "bld"
    return session(run, axes, ("out_hidden_states",))


def unet_session(module: Any, pipeline: str) -> TorchSession:
    """A UNet of diffusers, whose timestep is one for all rows."""
    config = module.config
    names = ["sample", "timestep"]
    words = "encoder_hidden_states" in inspect.signature(module.forward).parameters
    words = words and config.get("encoder_hid_dim_type") != "image_proj"
    names += ["encoder_hidden_states"] if words else []
    names += ["class_labels"] if config.get("class_embed_type") or config.get("num_class_embeds") else []
    names += ["attention_mask"] if pipeline == "UnCLIPPipeline" and words else []
    images = config.get("addition_embed_type") == "image"
    absent = {"encoder_hidden_states": None} if images else {}

    def run(timestep: torch.Tensor, **feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        assert timestep.shape == (1,)
        given: dict[str, Any] = {name: feeds[name] for name in names if name != "timestep"} | absent
        if images:
            given["added_cond_kwargs"] = {"image_embeds": feeds["image_embeds"]}
        return {"out_sample": module(timestep=timestep[0], **given, return_dict=False)[0]}

    axes = _axes(*names, *(["image_embeds"] if images else []))
    if config.get("class_embed_type") == "identity":
        axes["class_labels"] = "bd"
    return session(run, axes, ("out_sample",), ("class_labels",) if config.get("num_class_embeds") else ())


def prior_session(module: Any) -> TorchSession:
    """The prior of unCLIP and Kandinsky, and the two tensors by which its output is scaled."""

    def run(**feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        output = module(**feeds, return_dict=False)[0]
        return {
            "predicted_image_embedding": output,
            "clip_mean": module.clip_mean.data,
            "clip_std": module.clip_std.data,
        }

    inputs = _axes("timestep", "proj_embedding", "encoder_hidden_states", "attention_mask", hidden_states="bd")
    return session(run, inputs, ("predicted_image_embedding", "clip_mean", "clip_std"))


def projection_session(module: Any) -> TorchSession:
    """The text projection of unCLIP, and what stands for no image."""

    def run(**feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        states, labels = module(**feeds, do_classifier_free_guidance=False)
        nothing = module.learned_classifier_free_guidance_embeddings.data
        return {"encoder_hidden_states": states, "class_labels": labels, "unconditional_image_embeddings": nothing}

    inputs = _axes("image_embeddings", "prompt_embeds", "text_encoder_hidden_states")
    return session(run, inputs, ("encoder_hidden_states", "class_labels", "unconditional_image_embeddings"))


def movq_session(module: Any) -> TorchSession:
    """The decoder of a quantized autoencoder, whose latents are not quantized."""
    return session(
        lambda latent_sample: {"sample": module.decode(latent_sample, force_not_quantize=True).sample},
        {"latent_sample": "bchw"},
        ("sample",),
    )


def image_encoder_session(module: Any) -> TorchSession:
    """CLIP's encoder of images."""

    def run(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        output = module(pixel_values)
        return {"image_embeds": output.image_embeds, "last_hidden_state": output.last_hidden_state}

    return session(run, _axes("pixel_values"), ("image_embeds", "last_hidden_state"))


SESSIONS: Mapping[str, Callable[[Any], TorchSession]] = {
    "PriorTransformer": prior_session,
    "UnCLIPTextProjModel": projection_session,
    "CLIPVisionModelWithProjection": image_encoder_session,
}
"""By the class of a part."""


def graphs_of(name: str, module: Any, pipeline: str) -> Iterator[tuple[str, Callable[[], TorchSession]]]:
    """The graphs of a part of a pipeline of that class, by their names."""
    if hasattr(module, "encode") and hasattr(module, "decode"):
        yield f"{name}_decoder", lambda: movq_session(module) if name == "movq" else decoder_session(module)
        yield f"{name}_encoder", lambda: encoder_session(module)
    elif getattr(module, "main_input_name", None) == "input_ids":
        yield name, lambda: text_session(module, mask=pipeline.startswith(MASKED))
    elif type(module).__name__ in SESSIONS:
        yield name, lambda: SESSIONS[type(module).__name__](module)
    elif type(module).__name__.startswith("UNet"):
        yield name, lambda: unet_session(module, pipeline)
    else:
        yield name, lambda: transformer_session(module)


def open_pipeline(pipeline: DiffusionPipeline, folder: Path, **index: Any) -> Opened:
    """Write the files of a bundle, without graphs; `index` are changes of model_index.json."""
    folder.mkdir(parents=True, exist_ok=True)
    name = type(pipeline).__name__
    (folder / "model_index.json").write_text(json.dumps({**pipeline.config, "_class_name": name, **index}, default=str))
    makers: dict[str, Any] = {}
    for part, module in pipeline.components.items():
        if module is None:
            continue
        if not isinstance(module, torch.nn.Module):
            module.save_pretrained(folder / part)
            continue
        for graph, make in graphs_of(part, module, name):
            makers[graph] = make
            if hasattr(module, "save_config"):
                module.save_config(folder / graph)
            else:
                module.config.save_pretrained(folder / graph)
    return Opened(pipeline, folder, makers)


BOUND = 1e-4
"""On latents, as a share of their standard deviation: what single-precision rounding grows to over a trajectory."""


def check(
    opened: Opened,
    options: Diffusion,
    prompts: list[str],
    theirs: Any = None,
    *,
    bound: float = BOUND,
    unpack: Callable[[np.ndarray], np.ndarray] = lambda latents: latents,
    guided: str = "guidance_scale",
    negative: bool = True,
    pixels: bool = True,
    **given: Any,
) -> None:
    """Compare every image with diffusers' for its prompt and seed alone: latents, and pixels up to one level.

    `theirs` is the pipeline to compare with, `given` its further arguments, `unpack` makes [C, h, w] of its latents.
    """
    theirs = theirs or opened.pipeline
    model = opened.model()
    arguments = {"num_inference_steps": options.steps, guided: options.guidance, **given}
    for made in model.generate(prompts, options):
        size = {"height": made.settings.height, "width": made.settings.width}
        own = {**arguments, **{name: value for name, value in size.items() if name not in arguments}}
        if negative:
            own["negative_prompt"] = made.settings.negative or ""
        found = {
            kind: theirs(made.prompt, generator=[generator(made.seed)], output_type=kind, **own).images[0]
            for kind in (("latent", "pil") if pixels else ("latent",))
        }
        expected = unpack(np.asarray(found["latent"]))
        assert made.latents.shape == expected.shape
        assert np.abs(made.latents - expected).max() <= bound * expected.std(), made.settings
        if pixels:
            assert np.abs(np.asarray(made.image, int) - np.asarray(found["pil"])).max() <= 1
