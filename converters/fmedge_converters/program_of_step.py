"""The operations that PyTorch runs in one step of a decoder, on fake tensors, as a Program."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from fmedge_converters.decoder import Buffers, dry_run, text_config
from fmedge_converters.dialects.dialect import Dialect
from fmedge_converters.layers import layer_list
from fmedge_converters.program import BEFORE, Operation, Program, Source
from fmedge_converters.recording import LayerCache, LayerState

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class StepProgram:
    """A step, and what is known of the model that ran it."""

    program: Program | None
    """None for a model whose layers do not run one after the other, each once."""
    module: PreTrainedModel
    caches: tuple[LayerCache, ...]
    states: tuple[LayerState, ...]
    layer_list: str | None
    """The name of the model's list of layers."""


def step_program(
    config: PretrainedConfig,
    dialect: Dialect,
    dtype: torch.dtype,
    context: int,
    stored_buffers: Buffers = lambda _: {},
) -> StepProgram:
    """Run one step and note what it does. Raises SourceError when the model cannot be exported."""
    count = text_config(config).num_hidden_layers
    log = _Log(count)
    run = dry_run(config, dialect, dtype, context, log.watch, stored_buffers)
    program = log.program(run.module, run.inputs, run.outputs) if log.in_order() else None
    return StepProgram(program, run.module, run.layout.caches, run.layout.states, log.layer_list)


class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Notes every operation while it is active, and the layer in which it runs."""

    def __init__(self, layers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is untyped
        self.layers = layers
        self.layer_list: str | None = None
        self._layer = BEFORE
        self._entered: list[int] = []
        self._operations: list[Operation] = []
        self._values: dict[int, Hashable] = {}
        self._constants: dict[Hashable, Source] = {}
        self._kept: list[Any] = []  # a tensor that is gone could lend its id to another
        self._count = 0

    def in_order(self) -> bool:
        """Whether the layers ran one after the other, each once."""
        return self._entered == list(range(self.layers))

    @contextlib.contextmanager
    def watch(self, model: PreTrainedModel) -> Iterator[None]:
        """Log what the model does."""
        self.layer_list = layer_list(model)
        layers: Sequence[torch.nn.Module] = (
            [] if self.layer_list is None else list(model.get_submodule(self.layer_list).children())
        )
        hooks = [layer.register_forward_pre_hook(self._entering(number)) for number, layer in enumerate(layers)]
        if layers:
            hooks.append(layers[-1].register_forward_hook(self._leaving))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, number: int) -> Any:  # noqa: ANN401 - torch's hooks
        def enter(*_: object) -> None:
            self._layer = number
            self._entered.append(number)

        return enter

    def _leaving(self, *_: object) -> None:
        self._layer = self.layers

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - the signature is torch's
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the result of any operator
        leaves, spec = tree_flatten((args, kwargs or {}))
        inputs = tuple(self._value(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
        scalars = tuple("tensor" if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves)
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._kept += [*made, *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))]
        # An operation in place makes a new value of the tensor that it changes.
        outputs = tuple(self._new_value(tensor) for tensor in made)
        shapes = tuple((str(tensor.dtype), tuple(tensor.shape)) for tensor in made)
        self._operations.append(Operation((str(func), str(spec), scalars, shapes), inputs, outputs, self._layer))
        return result

    def _new_value(self, tensor: torch.Tensor) -> Hashable:
        self._count += 1
        self._values[id(tensor)] = self._count
        return self._count

    def _value(self, tensor: torch.Tensor) -> Hashable:
        if id(tensor) in self._values:
            return self._values[id(tensor)]
        value: Hashable = ("tensor", id(tensor))
        if not isinstance(tensor, FakeTensor) and not tensor.is_meta:
            self._constants[value] = Source(_content(tensor), None)
        self._values[id(tensor)] = value
        return value

    def program(
        self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> Program:
        """What was logged, with names for the model's tensors, and each output as a last operation of its layer."""
        sources = dict(self._constants)
        for name, tensor in [*model.named_parameters(), *inputs.items()]:
            sources[("tensor", id(tensor))] = named_source(name, self.layer_list)
        for name, tensor in model.named_buffers():
            # The values of a layer's own buffers belong to it as its parameters do; others count by their content.
            source = named_source(name, self.layer_list)
            if source.layer is not None:
                sources[("tensor", id(tensor))] = source
        parts: list[list[Operation]] = [[] for _ in range(self.layers + 2)]
        for operation in self._operations:
            parts[operation.layer + 1].append(operation)
        for name, tensor in outputs.items():
            source = named_source(name, self.layer_list)
            layer = self.layers if source.layer is None else source.layer
            value = self._values.get(id(tensor), ("tensor", id(tensor)))
            parts[layer + 1].append(Operation(("output", source.name), (value,), (), layer))
        return Program([operation for part in parts for operation in part], sources, self.layers)


def named_source(name: str, layers: str | None) -> Source:
    """A parameter, input or output by its name. Names of caches and states have one number, that of the layer."""
    inside = layers is not None and name.startswith(f"{layers}.")
    if inside or name.split(".", 1)[0] in ("past_key_values", "present", "past_states", "present_states"):
        found = NUMBER.search(name, len(layers) if inside and layers is not None else 0)
        if found is not None:
            return Source(f"{name[: found.start()]}{{}}{name[found.end() :]}", int(found.group()))
    return Source(name, None)


def _content(tensor: torch.Tensor) -> str:
    with unset_fake_temporarily():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}"
