"""Tensors of a checkpoint that the model of its config.json has no place for.

Most of them are harmless, and transformers leaves them out with a warning: buffers of older versions, heads of other
tasks, layers that predict further tokens. Some are a part of what the checkpoint computes, and the model is another one
without them: a bias, a scale or an adapter of a matrix that the model has, or layers beyond those of config.json.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from fmedge_runtimes.errors import SourceError
from transformers import PreTrainedModel

from fmedge_converters.weight import Weight

STORED_IN_ANY_FORMAT = ("weight", "bias")
"""What a quantized checkpoint has beside these explains its weights, and its format has read it."""


def require_no_part(
    unplaced: Mapping[str, Weight],
    placed: Iterable[str],
    model: PreTrainedModel,
    source: Path,
    *,
    explained: bool,
) -> None:
    """Raise SourceError when a tensor without a place is a part of what the checkpoint computes.

    `unplaced` and `placed` are named as in `model`, the whole that the checkpoint is of. `explained`: the checkpoint is
    quantized, and its format has read scales and the like.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    modules = dict(model.named_modules(remove_duplicate=False))
    others = {
        _whole_name(name, modules, model.base_model_prefix): weight
        for name, weight in unplaced.items()
        if not any(pattern.search(name) for pattern in ignored)
    }
    for name, weight in others.items():
        owner = _owner(name, modules)
        last = name.rsplit(".", 1)[-1]
        if owner is None or (explained and last not in STORED_IN_ANY_FORMAT) or _is_zero(weight):
            continue
        raise SourceError(
            f"{source}: {name} belongs to {owner}, but the model of config.json has no such part of it, and would "
            "compute something else without it; config.json is not that of these weights."
        )
    _require_no_layers(others, placed, modules, source)


def _whole_name(name: str, modules: Mapping[str, torch.nn.Module], prefix: str) -> str:
    """The name in the whole model of a tensor that was stored without its head."""
    first = name.partition(".")[0]
    return f"{prefix}.{name}" if first not in modules and f"{prefix}.{first}" in modules else name


def _owner(name: str, modules: Mapping[str, torch.nn.Module]) -> str | None:
    """The matrix, norm or embedding of the model that a tensor belongs to by its name; None if there is none."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:length])
        module = modules.get(owner)
        if module is not None:
            alone = next(module.children(), None) is None and next(module.parameters(), None) is not None
            return owner if alone else None
    return None


def _is_zero(weight: Weight) -> bool:
    """Biases of zeros, which some converters write, add nothing."""
    return not any(block.any() for block in weight.blocks())


def _require_no_layers(
    unplaced: Iterable[str], placed: Iterable[str], modules: Mapping[str, torch.nn.Module], source: Path
) -> None:
    """Raise SourceError when the checkpoint goes on with layers like those of the model."""
    beyond = _by_layer(unplaced, modules)
    known = _by_layer(placed, modules) if beyond else {}
    for (stack, number), names in beyond.items():
        layers = len(modules[stack])  # type: ignore[arg-type] # a ModuleList
        # Layers that predict further tokens have tensors that the model's own layers lack.
        if number >= layers and any(known.get((stack, layer)) == names for layer in range(layers)):
            raise SourceError(
                f"{source} holds {stack}.{number}, but config.json asks for {layers} of these layers; "
                "config.json is not that of these weights."
            )


def _by_layer(names: Iterable[str], modules: Mapping[str, torch.nn.Module]) -> dict[tuple[str, int], set[str]]:
    """The names of the tensors of each layer: by the list of layers and the number in it."""
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for place in range(1, len(parts) - 1):
            stack = ".".join(parts[:place])
            if parts[place].isdecimal() and isinstance(modules.get(stack), torch.nn.ModuleList):
                found[stack, int(parts[place])].add(".".join(parts[place + 1 :]))
                break
    return found
