"""Where a model keeps its layers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from fmedge_converters.decoder import text_config


def layer_list(model: PreTrainedModel) -> str | None:
    """The name of the list with a model's layers: of all lists with as many entries, the one with most parameters."""
    count = text_config(model.config).num_hidden_layers
    lists = [
        (sum(parameter.numel() for parameter in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    return max(lists)[1] if lists else None
