"""Rotary embeddings whose frequencies depend on how long the text is become one form, chosen by the context.

`longrope` (https://arxiv.org/abs/2402.13753) has one set of frequencies for texts up to the length that the model was
first trained on and another one for longer texts; transformers picks by the length of each call. A graph has one set:
the short one if --context stays within that length, the long one beyond it, for every position, as servers of long
contexts do. `dynamic` frequencies change with every further token, which a cache of rotated keys cannot follow: a
context beyond the first length is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from fmedge_runtimes.errors import SourceError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CHANGING = ("dynamic", "longrope")


def freeze_rope(model: PreTrainedModel, context: int) -> None:
    """Give every rotary embedding of a model the form that serves texts of up to `context` tokens.

    Raises SourceError when there is none.
    """
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        config = getattr(module, "config", None)
        if not isinstance(config, PretrainedConfig):
            continue
        if isinstance(kinds, str):
            if kinds in CHANGING:
                _freeze(module, kinds, config, None, context)
                module.rope_type = "default"
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if kind in CHANGING:
                    _freeze(module, kind, config, layer_type, context)
            module.rope_type = {name: "default" if kind in CHANGING else kind for name, kind in kinds.items()}


def first_length(config: PretrainedConfig, layer_type: str | None) -> int:
    """The length that a model with changing frequencies was first trained on."""
    parameters: dict[str, Any] = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    return int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)


def _freeze(module: torch.nn.Module, kind: str, config: PretrainedConfig, layer_type: str | None, context: int) -> None:
    limit = first_length(config, layer_type)
    if context <= limit:
        return  # the module starts in its short form
    if kind == "dynamic":
        raise SourceError(
            f"the rotary embedding of this model (dynamic) changes with every token beyond {limit}, and a graph has "
            f"one form; export with --context {limit} or less."
        )
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=limit + 1, layer_type=layer_type)
    buffer = getattr(module, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
    buffer.copy_(frequencies)
