"""Models that keep their past in a way of their own: on their layers, or in an object that they return and take back.

Such models came before transformers' caches could hold a recurrent state. They are run once, on one token, to see where
tensors are left; each becomes a state of the graph. Their code goes through tokens in Python, so the graph takes one.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fmedge_runtimes.errors import SourceError
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from fmedge_converters.recording import Recording
from fmedge_converters.traced_cache import TracedCache


@dataclass(frozen=True, slots=True)
class Attribute:
    """A plain tensor on a layer, neither parameter nor buffer."""

    layer: torch.nn.Module
    name: str
    first: torch.Tensor | None
    """Its value before anything ran."""

    def get(self) -> torch.Tensor:
        """Its value now."""
        value: torch.Tensor = getattr(self.layer, self.name)
        return value

    def put(self, value: torch.Tensor | None) -> None:
        """Assign it as the model's code does."""
        setattr(self.layer, self.name, value)


@dataclass(frozen=True, slots=True)
class OwnPast:
    """Where a model keeps its past, and what was found there after one token."""

    on_layers: Mapping[str, Attribute]
    """What the model assigns to its layers, by path."""
    argument: str | None
    """The parameter of the model that takes its past back, which it returns under the same name."""
    returned: Any
    """What it returned."""

    def cache(self, recording: Recording, layers: int) -> TracedCache:
        """The cache for a pass. If the model has a class of its own for it, it is that, too."""
        if not isinstance(self.returned, Cache):
            return TracedCache(recording, layers)
        kind = type(self.returned)
        both = type(f"Traced{kind.__name__}", (TracedCache, kind), {})
        cache: TracedCache = both(recording, layers)
        return cache

    @contextlib.contextmanager
    def given(self, states: Mapping[str, torch.Tensor], cache: TracedCache) -> Iterator[Mapping[str, Any]]:
        """Put states where the model looks for its past, for one pass; arguments for the model. None are its start."""
        arguments: dict[str, Any] = {}
        if states:
            for name, attribute in self.on_layers.items():
                attribute.put(states[name])
        if isinstance(self.returned, Cache):
            for name, value in _own_attributes(self.returned).items():
                setattr(cache, name, _like(value, states, f"{self.argument}.{name}"))
        elif self.argument is not None:
            arguments[self.argument] = _like(self.returned, states, self.argument) if states else None
        try:
            yield arguments
        finally:
            for attribute in self.on_layers.values():
                attribute.put(attribute.first)

    def left(self, output: ModelOutput) -> dict[str, torch.Tensor]:
        """The states after a pass, by name."""
        found = {name: attribute.get() for name, attribute in self.on_layers.items()}
        if self.argument is not None:
            returned = getattr(output, self.argument)
            for name, tensor in _tensors(_own(returned), self.argument):
                if tensor.is_floating_point():
                    found[name] = tensor
        return found


Plain = Mapping[tuple[torch.nn.Module, str], torch.Tensor]
"""The plain tensors on the layers of a model."""


def plain_tensors(model: PreTrainedModel) -> Plain:
    """What is on the layers now."""
    return {
        (layer, name): value
        for layer in model.modules()
        for name, value in vars(layer).items()
        if isinstance(value, torch.Tensor)
    }


def find_own_past(model: PreTrainedModel, before: Plain, run: Callable[[bool], ModelOutput]) -> OwnPast | None:
    """Where a model leaves tensors when `run` takes it through one token, with our cache or without any.

    `before`: what was on its layers before anything ran.
    """
    for layer, name in plain_tensors(model):
        setattr(layer, name, before.get((layer, name)))
    try:
        output = run(True)
    except (AttributeError, TypeError, ValueError):  # it wants a cache of its own kind
        output = run(False)
    paths = {layer: path for path, layer in model.named_modules()}
    on_layers = {}
    for (layer, name), value in plain_tensors(model).items():
        first = before.get((layer, name))
        if value is not first:
            on_layers[f"{paths[layer]}.{name}"] = Attribute(layer, name, first)
            setattr(layer, name, first)
    for name in inspect.signature(model.forward).parameters:
        returned = getattr(output, name, None)
        if returned is not None and not isinstance(returned, TracedCache) and list(_tensors(_own(returned), name)):
            return OwnPast(on_layers, name, returned)
    return OwnPast(on_layers, None, None) if on_layers else None


def require_states(states: Mapping[str, torch.Tensor], batch: int) -> None:
    """Raise SourceError unless every state is a tensor of numbers for each row, which may start as zeros."""
    for name, tensor in states.items():
        if tensor.dim() == 0 or tensor.shape[0] != batch:
            raise SourceError(f"the model keeps {name} {list(tensor.shape)}, which is not a tensor for each row.")
        if not tensor.is_floating_point():
            raise SourceError(f"the model keeps {name} as {str(tensor.dtype).removeprefix('torch.')}, not as numbers.")


def _own_attributes(cache: Cache) -> dict[str, Any]:
    """What a cache's class adds to transformers' own."""
    return {name: value for name, value in vars(cache).items() if name not in vars(Cache(layers=[]))}


def _own(returned: object) -> object:
    return _own_attributes(returned) if isinstance(returned, Cache) else returned


def _parts(thing: object) -> list[tuple[str | int, Any]] | None:
    """What a container holds, by key; None if it is none."""
    if isinstance(thing, dict):
        return list(thing.items())
    if isinstance(thing, list | tuple):
        return list(enumerate(thing))
    is_record = hasattr(thing, "__dict__") and type(thing).__module__.startswith("transformers.models.")
    return list(vars(thing).items()) if is_record and "Config" not in type(thing).__name__ else None


def _tensors(thing: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested containers, by their paths."""
    if isinstance(thing, torch.Tensor):
        yield name, thing
        return
    for key, part in _parts(thing) or ():
        yield from _tensors(part, f"{name}.{key}")


def _like(thing: Any, states: Mapping[str, torch.Tensor], name: str) -> Any:  # noqa: ANN401 - any nested containers
    """The same containers with states in the place of tensors."""
    if isinstance(thing, torch.Tensor):
        # What is no state, such as a count of tokens, has no value on fake tensors; the parity check judges the result.
        return states[name] if name in states else torch.zeros(thing.shape, dtype=thing.dtype)
    parts = _parts(thing)
    if parts is None:
        return thing
    new = {key: _like(part, states, f"{name}.{key}") for key, part in parts}
    if isinstance(thing, dict):
        return new
    if isinstance(thing, list | tuple):
        return type(thing)(new.values())
    twin = copy.copy(thing)
    vars(twin).update(new)
    return twin
