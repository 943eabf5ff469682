"""Trace any decoder of transformers into ONNX, without its weights.

transformers lets a model's attention and its mask be replaced by name. Ours records one attention node for each layer
in place of the model's attention, and no mask; everything else is the model's own code, traced on fake tensors by
`torch.onnx.export`. Nothing here knows an architecture.

    traced = trace_decoder(config, ORT, torch.float32)
    traced.model        # the ONNX graph; its weights are named, but have no values
    traced.caches       # what each layer caches
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from fmedge_runtimes.errors import SourceError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging as transformers_logging

from fmedge_converters.dialects.dialect import Attention, Dialect

INTERFACE = "fmedge"
FIXED_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change with the length of the sequence; see _freeze_rope."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps of each token."""

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    rolling: bool
    """The buffer holds the window only."""


@dataclass(frozen=True, slots=True)
class TracedDecoder:
    """A decoder as a graph, before its weights are bound."""

    model: ir.Model
    module: PreTrainedModel
    """The transformers model on fake tensors: parameter names and shapes."""
    caches: tuple[LayerCache, ...]
    parameters: Mapping[str, str]
    """Name of each initializer that is a parameter, and the parameter's name in the model."""


@dataclass(slots=True)
class _Recorder:
    """What the attention function sees and leaves behind during one forward pass."""

    caches: dict[int, LayerCache] = field(default_factory=dict)
    dialect: Dialect | None = None
    step: dict[str, torch.Tensor] = field(default_factory=dict)
    past: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    present: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


_active: _Recorder | None = None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, S, D]
    key: torch.Tensor,  # [B, K, S, D]
    value: torch.Tensor,  # [B, K, S, D]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_others: Any,  # noqa: ANN401 - transformers hands over what the model got; the parity check judges the result
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; its signature is theirs."""
    recorder = _active
    if recorder is None:
        raise RuntimeError("the fmedge attention is for tracing only")
    if attention_mask is not None:
        raise SourceError("the model builds an attention mask of its own, which the exported graph cannot carry.")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal:
        raise SourceError("the model attends to later tokens too: it is an encoder, not a decoder.")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise SourceError("the model's attention layers have no layer_idx, so their caches cannot be told apart.")
    batch, heads, length, size = query.shape
    if value.shape[-1] != size or key.shape[-1] != size:
        raise SourceError(
            f"layer {layer} attends with heads of different sizes (query {size}, value {value.shape[-1]}), "
            "as in latent attention; the GroupQueryAttention operator needs one size."
        )
    if recorder.dialect is None:
        if layer in recorder.caches:
            raise SourceError(f"layer {layer} attends twice in one pass; fmedge keeps one cache for each layer.")
        recorder.caches[layer] = LayerCache(
            layer, int(key.shape[1]), int(size), int(size), sliding_window, rolling=False
        )
        return query.transpose(1, 2), None
    past_key, past_value = recorder.past[layer]
    attention = Attention(
        layer=layer,
        query=query,
        key=key,
        value=value,
        scale=float(size**-0.5 if scaling is None else scaling),
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        past_key=past_key,
        past_value=past_value,
    )
    output, *present = recorder.dialect.attend(attention, recorder.step)
    recorder.present[layer] = (present[0], present[1])
    return output.reshape(batch, length, heads, size), None  # [B, S, H, D]


AttentionInterface.register(INTERFACE, _attend)
AttentionMaskInterface.register(INTERFACE, lambda *_, **__: None)


@contextlib.contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    global _active  # noqa: PLW0603 - transformers' interface has no other way to reach the function
    _active = recorder
    try:
        yield
    finally:
        _active = None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the notices of torch and transformers out of our output; errors still rise."""
    bars = transformers_logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    # torch logs the traceback of what it raises, too; the error that rises says it in one line.
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)
            if bars:
                transformers_logging.enable_progress_bar()


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration with parameters on the meta device and buffers in memory.

    Raises SourceError when transformers cannot build it.
    """
    try:
        with quiet_libraries(), init_empty_weights(include_buffers=False):
            # A copy, because transformers notes the attention's name in the configuration it is given.
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=INTERFACE
            )
    except Exception as error:  # each architecture has its own ways to refuse
        raise SourceError(
            f"transformers cannot build {config.model_type} with the attention interface: {error}"
        ) from error
    # init_empty_weights makes a new parameter of every assignment, which unties those that were tied.
    model.tie_weights()
    return model.eval()


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the decoder."""
    return config.get_text_config(decoder=True)


def _fake_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace meta parameters by fake ones on the CPU, keeping those that are tied the same object."""
    fakes: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in fakes:
                kind = dtype if parameter.dtype.is_floating_point else parameter.dtype
                fakes[id(parameter)] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=kind), requires_grad=False)
            module.register_parameter(name, fakes[id(parameter)])


def _freeze_rope(model: PreTrainedModel, context: int) -> None:
    """Keep rotary embeddings that depend on the sequence's length at their short form, which is exact up to the
    length the model was first trained on; refuse a longer context."""
    settings = getattr(text_config(model.config), "rope_parameters", None) or {}
    groups = settings.values() if all(isinstance(item, dict) for item in settings.values()) else (settings,)
    for group in groups:
        kind = str(group.get("rope_type", "default"))
        if not any(name in kind for name in FIXED_ROPE):
            continue
        limit = group.get("original_max_position_embeddings") or text_config(model.config).max_position_embeddings
        if context > limit:
            raise SourceError(
                f"the rotary embedding of this model ({kind}) changes beyond {limit} tokens, and a graph has one form; "
                f"export with --context {limit} or less."
            )
    for module in model.modules():
        found: Any = getattr(module, "rope_type", None)
        if isinstance(found, dict):
            module.rope_type = {key: "default" if value in FIXED_ROPE else value for key, value in found.items()}
        elif isinstance(found, str) and any(name in found for name in FIXED_ROPE):
            module.rope_type = "default"


class _Step(torch.nn.Module):
    """One step of decoding: token ids and caches in, logits of the asked positions and caches out."""

    def __init__(self, model: PreTrainedModel, dialect: Dialect, layers: int) -> None:
        super().__init__()
        self.model = model
        self.dialect = dialect
        self.layers = layers

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, S]
        position_ids: torch.Tensor,  # [B, S]
        logits_indices: torch.Tensor,  # [N], into the flattened [B * S]
        step: dict[str, torch.Tensor],
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        def keep_asked(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = args[0].reshape(-1, args[0].shape[-1])  # [B * S, E]
            return (hidden.index_select(0, logits_indices).unsqueeze(0),)  # [1, N, E]

        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(keep_asked)
        recorder = _Recorder(dialect=self.dialect, step=step, past=past)
        try:
            with _recording(recorder):
                output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True)
        finally:
            hook.remove()
        return output.logits.squeeze(0), [recorder.present[layer] for layer in range(self.layers)]


def _layer_caches(model: PreTrainedModel) -> tuple[LayerCache, ...]:
    """Run the model once on fake tensors to see what its layers ask of the attention interface."""
    recorder = _Recorder()
    ids = torch.zeros((2, 3), dtype=torch.int64)  # [B, S]
    with _recording(recorder), torch.no_grad():
        model(input_ids=ids, position_ids=ids, use_cache=False, return_dict=True)
    layers = text_config(model.config).num_hidden_layers
    if not recorder.caches:
        raise SourceError(
            f"{model.config.model_type} computes attention in its own code instead of transformers' attention "
            "interface, so fmedge cannot replace it."
        )
    if sorted(recorder.caches) != list(range(layers)):
        raise SourceError(
            f"{model.config.model_type}: {len(recorder.caches)} of its {layers} layers use the attention interface; "
            "the others keep another kind of state, which fmedge does not carry yet."
        )
    return tuple(recorder.caches[layer] for layer in range(layers))


def trace_decoder(config: PretrainedConfig, dialect: Dialect, dtype: torch.dtype, context: int) -> TracedDecoder:
    """Trace the decoder of a configuration in a dialect.

    Graph inputs: input_ids [B, S], position_ids [B, S], logits_indices [N] (positions, of B * S, whose logits are
    asked), the dialect's own, past_key_values.L.key and .value [B, K, C, D]. Outputs: logits [N, V], present.L.key and
    .value. Takes seconds and little memory, whatever the model's size: no weight exists.

    Raises SourceError when the architecture cannot be traced, with the reason.
    """
    model = empty_model(config, dtype)
    if model.get_output_embeddings() is None:
        raise SourceError(f"{config.model_type} has no language-model head.")
    _freeze_rope(model, context)
    try:
        with quiet_libraries(), FakeTensorMode(allow_non_fake_inputs=True):
            _fake_parameters(model, dtype)
            caches = _layer_caches(model)
            program = _export(model, dialect, caches, dtype)
    except SourceError as error:
        raise SourceError(f"{config.model_type} cannot be exported: {error}") from error
    except Exception as error:
        first = str(error).strip().splitlines()
        raise SourceError(
            f"{config.model_type} cannot be traced: {type(error).__name__}: {first[0] if first else ''}"
        ) from error
    graph = program.model
    parameters = {name: name.removeprefix("model.") for name in graph.graph.initializers if _is_fake(graph, name)}
    return TracedDecoder(graph, model, caches, parameters)


def _is_fake(model: ir.Model, name: str) -> bool:
    raw = getattr(model.graph.initializers[name].const_value, "raw", None)
    return isinstance(raw, torch.nn.Parameter)


def _export(
    model: PreTrainedModel, dialect: Dialect, caches: tuple[LayerCache, ...], dtype: torch.dtype
) -> torch.onnx.ONNXProgram:
    # Sizes of 0 and 1, and equal sizes, would be taken for constants; these are all different.
    sizes = {"batch": 3, "sequence": 5, "capacity": 32, "logits": 4}
    axes = {name: torch.export.Dim(name) for name in sizes}

    def example(kind: torch.dtype, *dims: str | int) -> torch.Tensor:
        return torch.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in dims], dtype=kind)

    def dynamic(*dims: str | int) -> dict[int, Any]:
        return {index: axes[dim] for index, dim in enumerate(dims) if isinstance(dim, str)}

    ids = ("batch", "sequence")
    shapes = [("batch", cache.kv_heads, "capacity", cache.key_dim) for cache in caches]
    arguments = (
        example(torch.int64, *ids),
        example(torch.int64, *ids),
        example(torch.int64, "logits"),
        {item.name: example(item.dtype, *item.axes) for item in dialect.step_inputs},
        [(example(dtype, *shape), example(dtype, *shape)) for shape in shapes],
    )
    dynamic_shapes = (
        dynamic(*ids),
        dynamic(*ids),
        dynamic("logits"),
        {item.name: dynamic(*item.axes) for item in dialect.step_inputs},
        [(dynamic(*shape), dynamic(*shape)) for shape in shapes],
    )
    layers = range(len(caches))
    cache_names = [f"{{}}.{layer}.{part}" for layer in layers for part in ("key", "value")]
    with torch.no_grad():
        program = torch.onnx.export(
            _Step(model, dialect, len(caches)),
            arguments,
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            opset_version=dialect.opset,
            input_names=[
                "input_ids",
                "position_ids",
                "logits_indices",
                *(item.name for item in dialect.step_inputs),
                *(name.format("past_key_values") for name in cache_names),
            ],
            output_names=["logits", *(name.format("present") for name in cache_names)],
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return program
