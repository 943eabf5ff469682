"""The parts of pipelines that fmedge exports: one row for each kind of module, found by what a module is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fmedge_converters.parts.autoencoders import autoencoder
from fmedge_converters.parts.controlnets import controlnet
from fmedge_converters.parts.denoisers import ARGUMENTS, denoiser
from fmedge_converters.parts.encoders import image_encoder, text_encoder
from fmedge_converters.parts.part import Graphs
from fmedge_converters.parts.priors import prior, text_projection
from fmedge_converters.parts.unets import unet


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of the table: which modules it is for, and their graphs."""

    name: str
    matches: Callable[[type[Any]], bool]
    graphs: Graphs


def _called(*names: str) -> Callable[[type[Any]], bool]:
    return lambda module: module.__name__ in names


def _takes(name: str) -> Callable[[type[Any]], bool]:
    """Whether an encoder's main input is this one."""
    return lambda module: getattr(module, "main_input_name", None) == name and hasattr(module, "config_class")


def _has(*methods: str) -> Callable[[type[Any]], bool]:
    return lambda module: all(hasattr(module, name) for name in methods)


def _denoises(module: type[Any]) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [item.name for item in parameters if item.default is item.empty and item.name != "self"]
    names = [item.name for item in parameters]
    return "timestep" in names and names[1] in ("sample", "hidden_states") and set(needed) <= set(ARGUMENTS)


KINDS: tuple[Kind, ...] = (
    Kind("prior", _called("PriorTransformer"), prior),
    Kind("text projection", _called("UnCLIPTextProjModel"), text_projection),
    Kind("ControlNet", _called("ControlNetModel"), controlnet),
    Kind("UNet", _called("UNet2DConditionModel", "UNet2DModel"), unet),
    Kind("denoiser", _denoises, denoiser),
    Kind("autoencoder", _has("encode", "decode"), autoencoder),
    Kind("text encoder", _takes("input_ids"), text_encoder),
    Kind("image encoder", _takes("pixel_values"), image_encoder),
)
"""The first that matches describes a class of modules."""


def find_kind(module: type[Any]) -> Kind | None:
    """The row of a class; None if fmedge does not know how it is called."""
    return next((kind for kind in KINDS if kind.matches(module)), None)
