"""A decoder inside a model of several parts (vision, audio): found by its class, and read by the whole model's names.

transformers builds such models around the same modules as its decoders alone. The whole model is built without
weights; the module that is the decoder's own, and the head, tell what the decoder's tensors are called in it. The
checkpoint is then converted by the rules of the whole model, and what belongs to the other parts is never read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from fmedge_runtimes.errors import SourceError
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fmedge_converters.decoder import empty_model, quiet_libraries

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model around a decoder."""

    model: PreTrainedModel
    """The whole model, without weights."""
    names: Mapping[str, str]
    """What each tensor of the decoder is called in the whole model."""


def open_wrapper(config: PretrainedConfig) -> tuple[PretrainedConfig, Wrapper | None]:
    """The configuration of the decoder alone, and the model around it.

    There is no model when transformers cannot build it here (parts of it may need packages of their own); the decoder's
    own rules must then do for reading the checkpoint, and for some they do.
    Raises SourceError when transformers has no such decoder by itself.
    """
    if config.is_encoder_decoder:
        raise SourceError(f"{config.model_type} is an encoder with a decoder behind it; fmedge exports decoders alone.")
    text = copy.deepcopy(config.get_text_config(decoder=True))
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(
            f"{config.model_type} wraps a decoder ({text.model_type}) together with other parts (vision, audio), and "
            "transformers has no causal language model of that decoder alone, which is what fmedge exports."
        )
    for name in TOKENS:
        if getattr(text, name, None) is None:
            setattr(text, name, getattr(config, name, None))
    whole, alone = _empty(config), empty_model(text, torch.float32)
    names = None if whole is None else _names(whole, alone)
    if whole is None or names is None:
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
        return text, None
    tied = dict(getattr(whole, "all_tied_weights_keys", None) or {})
    head = names.get(_name_of(alone, alone.get_output_embeddings()) + ".weight")
    text.tie_word_embeddings = head in tied or head in tied.values()
    return text, Wrapper(whole, names)


def _empty(config: PretrainedConfig) -> PreTrainedModel | None:
    auto = AutoModelForMultimodalLM if type(config) in AutoModelForMultimodalLM._model_mapping else AutoModelForCausalLM
    try:
        with quiet_libraries(), init_empty_weights(include_buffers=True):
            model: PreTrainedModel = auto.from_config(copy.deepcopy(config))
    except Exception:  # each architecture has its own ways to refuse
        return None
    return model


def _names(whole: PreTrainedModel, alone: PreTrainedModel) -> dict[str, str] | None:
    """The tensors of the decoder by their names in the whole, None if its module is not there."""
    tensors = list(alone.state_dict())
    place = _place_of(whole, type(alone))
    if place is not None:
        return {name: f"{place}.{name}" if place else name for name in tensors}
    body = f"{alone.base_model_prefix}."
    place, head = _place_of(whole, type(alone.base_model)), whole.get_output_embeddings()
    if place is None or head is None:
        return None
    own_head = f"{_name_of(alone, alone.get_output_embeddings())}."
    prefixes = {body: f"{place}.", own_head: f"{_name_of(whole, head)}."}
    names = {}
    for name in tensors:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            return None
        names[name] = prefixes[prefix] + name.removeprefix(prefix)
    return names if set(names.values()) <= set(whole.state_dict()) else None


def _place_of(whole: PreTrainedModel, kind: type) -> str | None:
    places = (str(name) for name, module in whole.named_modules() if type(module) is kind)
    return next(places, None)


def _name_of(model: PreTrainedModel, module: torch.nn.Module) -> str:
    places = (str(name) for name, other in model.named_modules() if other is module)
    return next(places)
