"""Denoisers of diffusers: the network that a pipeline calls in every step.

What a denoiser takes follows from the arguments of its `forward`: ARGUMENTS says for each name that diffusers uses what
its tensor looks like, by the module's configuration, and whether the pipeline gives it at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fmedge_converters.parts.part import Asked, Call, Input, Tensors

TEXT_SIZES = (
    *("encoder_hid_dim", "joint_attention_dim", "caption_channels", "context_in_dim", "text_embed_dim"),
    *("cross_attention_dim", "embedding_dim"),
)
"""What configurations call the size of the text encoder's states, in the order in which they decide."""
CONDITIONS = "added_cond_kwargs"
"""The argument through which some denoisers get further tensors by name."""

Config = Mapping[str, Any]
Describe = Callable[[Config], Input | None]


def _text_size(config: Config) -> int:
    size = next(config[name] for name in TEXT_SIZES if config.get(name))
    return int(size if isinstance(size, int) else size[0])


def _image(name: str) -> Describe:
    return lambda config: Input(name, ("batch", config["in_channels"], "height", "width"))


def _batch(name: str) -> Describe:
    return lambda _: Input(name, ("batch",))


def _sized(name: str, key: str) -> Describe:
    """[batch, size] where the configuration has a size under that key."""
    return lambda config: Input(name, ("batch", config[key])) if config.get(key) else None


def _text(config: Config) -> Input | None:
    if config.get("encoder_hid_dim_type") == "image_proj":
        return None  # Kandinsky 2.2: the states are made of the embedding of an image
    return Input("encoder_hidden_states", ("batch", "sequence", _text_size(config)))


def _timestep(config: Config) -> Input:
    # What the module multiplies it by brings it to the thousand steps of training.
    return Input("timestep", ("batch",), largest=999 / (config.get("time_factor") or 1))


def _class_labels(config: Config) -> Input | None:
    kind = config.get("class_embed_type")
    if kind == "identity":
        return Input("class_labels", ("batch", _time_size(config)))
    if config.get("num_class_embeds"):  # an upscaler's noise level
        return Input("class_labels", ("batch",), integer=True, below=int(config["num_class_embeds"]))
    return Input("class_labels", ("batch",)) if kind == "timestep" else None


def _time_size(config: Config) -> int:
    return int(config.get("time_embedding_dim") or config["block_out_channels"][0] * 4)


def _guidance(config: Config) -> Input | None:
    return Input("guidance", ("batch",)) if config.get("guidance_embeds") else None


ARGUMENTS: Mapping[str, Describe] = {
    "sample": _image("sample"),
    "hidden_states": _image("hidden_states"),
    "timestep": _timestep,
    "encoder_hidden_states": _text,
    "pooled_projections": _sized("pooled_projections", "pooled_projection_dim"),
    "guidance": _guidance,
    "img_ids": lambda _: Input("img_ids", ("image_sequence", 3)),
    "txt_ids": lambda _: Input("txt_ids", ("sequence", 3)),
    "timestep_cond": _sized("timestep_cond", "time_cond_proj_dim"),
    "class_labels": _class_labels,
}
"""By the name of an argument of `forward`. None: the pipelines leave it out."""
MASKS: Mapping[str, str] = {
    "PixArtTransformer2DModel": "encoder_attention_mask",
    "SanaTransformer2DModel": "encoder_attention_mask",
    "UnCLIPPipeline": "attention_mask",
}
"""Classes, of modules or pipelines, that use the mask of the text; and the argument that takes it."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a pipeline gives a denoiser, or a network beside it, in every step."""

    inputs: Mapping[str, Input]
    """By the names of arguments of `forward`."""
    conditions: Mapping[str, Input]
    """The tensors of added_cond_kwargs."""
    absent: Mapping[str, None]
    """Arguments that are to be None."""
    conditioned: bool
    """Whether there are added_cond_kwargs at all."""
    multiple: int
    """What height and width must be multiples of."""

    @property
    def all(self) -> tuple[Input, ...]:
        """All inputs."""
        return (*self.inputs.values(), *self.conditions.values())

    def of(self, given: Tensors) -> dict[str, Any]:
        """The arguments of `forward`, from the inputs."""
        arguments: dict[str, Any] = {name: given[name] for name in self.inputs} | dict(self.absent)
        if self.conditioned:
            none = {"resolution": None, "aspect_ratio": None}
            arguments[CONDITIONS] = none | {name: given[name] for name in self.conditions}
        return arguments


def arguments_of(module: Any, asked: Asked) -> Arguments:  # noqa: ANN401 - any denoiser of diffusers
    """What a module is called with, by the arguments of its `forward` and its configuration."""
    config = dict(module.config)
    parameters = inspect.signature(module.forward).parameters
    known = {name: ARGUMENTS[name](config) for name in parameters if name in ARGUMENTS}
    inputs = {name: item for name, item in known.items() if item is not None}
    if "img_ids" in inputs:  # latents in packages of 2 x 2, one after the other
        inputs["hidden_states"] = Input("hidden_states", ("batch", "image_sequence", config["in_channels"]))
        inputs["timestep"] = replace(inputs["timestep"], largest=1.0)
    mask = MASKS.get(type(module).__name__) or MASKS.get(asked.pipeline)
    if mask is not None and "encoder_hidden_states" in inputs:
        inputs[mask] = Input(mask, ("batch", "sequence"), integer=True)
    absent = {name: None for name, item in known.items() if item is None and name == "encoder_hidden_states"}
    conditioned = CONDITIONS in parameters
    conditions = _conditions(config) if conditioned else {}
    return Arguments(inputs, conditions, absent, conditioned, 1 if "img_ids" in inputs else _multiple(config))


def denoiser(module: Any, asked: Asked) -> dict[str, Call]:  # noqa: ANN401 - any denoiser of diffusers
    """The arguments of the module's `forward` -> out_sample, or out_hidden_states."""
    arguments = arguments_of(module, asked)
    main = "sample" if "sample" in arguments.inputs else "hidden_states"

    def run(model: Any, given: Tensors) -> dict[str, torch.Tensor]:  # noqa: ANN401 - any denoiser of diffusers
        return {f"out_{main}": model(**arguments.of(given), return_dict=False)[0]}

    multiples = {"height": arguments.multiple, "width": arguments.multiple}
    return {asked.name: Call(arguments.all, run, multiples=multiples)}


def _conditions(config: Config) -> dict[str, Input]:
    """The tensors of added_cond_kwargs."""
    kind = config.get("addition_embed_type")
    found: list[Input] = []
    if kind == "text_time":  # SDXL
        size = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        found = [Input("text_embeds", ("batch", size)), Input("time_ids", ("batch", 6))]
    elif kind == "image":  # Kandinsky 2.2
        found = [Input("image_embeds", ("batch", config["encoder_hid_dim"]))]
    elif config.get("use_additional_conditions"):  # PixArt
        found = [Input("resolution", ("batch", 2)), Input("aspect_ratio", ("batch", 1))]
    return {item.name: item for item in found}


def _multiple(config: Config) -> int:
    """What height and width must be multiples of."""
    ups = config.get("up_block_types") or ()
    # Blocks that double what they get, where others ask for the size that was halved.
    doubling = any(str(name).startswith(("SimpleCrossAttn", "Resnet")) for name in ups)
    return int(2 ** (len(ups) - 1)) if doubling else int(config.get("patch_size") or 1)
