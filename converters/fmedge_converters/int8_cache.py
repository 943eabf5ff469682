"""A KV cache in int8: which layers can have one, the scales, the graph with them, and what it does to the output.

GroupQueryAttention on the CPU keeps round(x / scale), within -128 .. 127, of each key and value and attends over
codes * scale, those of the step at hand included (tests/test_int8_cache.py has the proof), so that what a row holds
does not depend on the pieces in which a prompt went through. The scales are fixed: one for each head and channel of a
layer, from the largest magnitudes that the same graph with a floating cache has on a text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.host_memory import HostBuffer
from fmedge_runtimes.manifest import CacheFacts, Evidence, TextFacts
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.row_cache import RowCache

from fmedge_converters.build import BuiltDecoder, Progress
from fmedge_converters.divergence import Divergence, pieces_of
from fmedge_converters.graph import MICROSOFT, dims
from fmedge_converters.tolerances import TOLERANCES

Magnitudes = npt.NDArray[np.float32]


CALIBRATION_TOKENS = 2048
"""Of text that the scales are taken from."""
CHUNK = 64
"""Tokens of a step while magnitudes are looked at; fewer where a rolling window is shorter."""
WINDOW = 256
"""Tokens of the pieces of text."""
HEADROOM = 1.25
"""How far beyond the largest magnitude of the text codes reach: what is larger still is cut off."""
LEAST = 1e-3
"""Part of a head's largest magnitude that every channel's is taken to be, at least."""
KEY_SCALE, VALUE_SCALE = 12, 13
COS = 7
PAST = {"key": 3, "value": 4}
"""Inputs of GroupQueryAttention."""
PRESENT = {"key": 1, "value": 2}
"""Its outputs."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer whose cache can be in int8."""

    facts: CacheFacts
    nodes: tuple[ir.Node, ...]
    """The operators that read or write its cache, the first of which appends to it: layers may share a cache."""

    def pairs(self) -> npt.NDArray[np.int64] | None:
        """The channel [D] that a rotary embedding turns each channel of the keys into, itself where it is not turned.

        None if the operator does not rotate: keys may have been rotated in front of it.
        """
        node, size = self.nodes[0], self.facts.key_dim
        if not node.attributes.get_int("do_rotary", 0):
            return None
        table = node.inputs[COS]
        assert table is not None
        (half,) = [dim for dim in (dims(table) or [])[-1:] if isinstance(dim, int)]
        channels = np.arange(size)
        turned = channels[: 2 * half]
        interleaved = node.attributes.get_int("rotary_interleaved", 0)
        channels[: 2 * half] = turned ^ 1 if interleaved else (turned + half) % (2 * half)
        return channels


def quantize_cache(
    built: BuiltDecoder,
    facts: TextFacts,
    calibration: Sequence[int],
    text: Sequence[int],
    progress: Progress,
) -> tuple[TextFacts, Evidence]:
    """Rewrite a written decoder for a cache in int8, with scales from the tokens of `calibration`; compare on `text`.

    Layers whose attention is not the operator's keep their floats. Raises ExportError when all do.
    """
    layers = _layers(built.model.graph, facts.caches)
    if not layers:
        raise ExportError(
            "--cache int8 needs a layer that attends through GroupQueryAttention, and this model has none: its layers "
            "keep recurrent states, or attend with masks of their own over plain matrix products; leave --cache out."
        )
    window = min(WINDOW, facts.context)
    pieces, texts = pieces_of(calibration, window), pieces_of(text, window)
    with tempfile.TemporaryDirectory(prefix="fmedge-") as name:
        before = OnnxRuntimeSession(built.written.graph, "cpu", None)
        decoder = Decoder(before, facts)
        magnitudes = _Calibration(decoder, layers)
        for number, piece in enumerate(pieces):
            progress("scales of the cache", number, len(pieces) + len(texts))
            magnitudes.add(piece)
        cache = decoder.new_cache()
        for number, piece in enumerate(texts):
            progress("scales of the cache", len(pieces) + number, len(pieces) + len(texts))
            # On the disk, because one of both graphs is in memory at a time.
            np.save(Path(name) / f"{number}.npy", decoder.score(cache, piece))
        before.close()
        scales = {layer.facts.layer: magnitudes.scales(layer) for layer in layers}
        for graph in built.graphs:
            for layer in _layers(graph.model.graph, facts.caches):
                _spell(graph.model.graph, layer, *scales[layer.facts.layer])
            graph.written.graph.write_bytes(ir.to_proto(graph.model).SerializeToString())
        quantized = {layer.facts.layer for layer in layers}
        facts = facts.model_copy(
            update={
                "caches": tuple(
                    cache.model_copy(update={"quantization": "int8"}) if cache.layer in quantized else cache
                    for cache in facts.caches
                )
            }
        )
        after = OnnxRuntimeSession(built.written.graph, "cpu", None)
        divergence = Divergence(Decoder(after, facts), (), texts)
        for number in range(len(texts)):
            progress("comparing the caches", number, len(texts))
            divergence.add_piece(number, np.load(Path(name) / f"{number}.npy", mmap_mode="r"))
        after.close()
    return facts, _evidence(divergence, facts, sum(map(len, pieces)))


def _layers(graph: ir.Graph, caches: Sequence[CacheFacts]) -> list[_Layer]:
    found = ((facts, _operators(graph, facts.layer)) for facts in caches)
    return [_Layer(facts, nodes) for facts, nodes in found if nodes]


def _operators(graph: ir.Graph, layer: int) -> tuple[ir.Node, ...]:
    """The attention operators that read or write a layer's cache; none if anything else needs what is in it."""
    inputs = {value.name: value for value in graph.inputs}
    waiting = [(inputs[f"past_key_values.{layer}.{part}"], index) for part, index in PAST.items()]
    found: dict[ir.Node, None] = {}
    while waiting:
        value, index = waiting.pop()
        for use in value.uses():
            node = use.node
            if node.op_type == "Shape" and not node.domain:
                continue
            attends = node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT
            if not attends or use.idx != index:
                return ()
            if node not in found:
                found[node] = None
                # Other layers may attend over what this one has appended.
                waiting += [(node.outputs[PRESENT[part]], PAST[part]) for part in PAST]
    return tuple(found)


class _Calibration:
    """The largest magnitudes in the caches of layers, over pieces of text."""

    def __init__(self, decoder: Decoder, layers: Sequence[_Layer]) -> None:
        self._decoder = decoder
        self._cache = decoder.new_cache()
        self._layers = layers
        self._chunk = min([CHUNK, *(facts.window or CHUNK for facts in decoder.facts.caches if facts.rolling)])
        self._largest: dict[str, Magnitudes] = {}

    def add(self, piece: Sequence[int]) -> None:
        """Put a piece through the decoder and look at what it caches."""
        self._cache.reserve(1, len(piece))
        self._cache.start(0)
        for start in range(0, len(piece), self._chunk):
            chunk = piece[start : start + self._chunk]
            self._decoder.extend(self._cache, 0, chunk)
            for layer in self._layers:
                pairs = layer.pairs()
                keys, values = (self._newest(part, len(chunk)) for part in self._names(layer))  # [K, S, D]
                if pairs is not None:
                    # A rotation turns a pair of channels and keeps its length, whatever the position.
                    turned = pairs != np.arange(len(pairs))
                    keys = np.where(turned, np.hypot(keys, keys[..., pairs]), keys)
                for part, states in zip(self._names(layer), (keys, values), strict=True):
                    found = np.abs(states).max(axis=1)  # [K, D]
                    self._largest[part] = np.maximum(self._largest.get(part, found), found)
        self._cache.clear()

    @staticmethod
    def _names(layer: _Layer) -> tuple[str, str]:
        return f"past_key_values.{layer.facts.layer}.key", f"past_key_values.{layer.facts.layer}.value"

    def _newest(self, name: str, count: int) -> npt.NDArray[np.floating]:
        """The last `count` keys or values [K, count, D] of the row."""
        part = next(part for part in self._cache.parts if part.source == name)
        held = part.held(int(self._cache.lengths[0]))
        return _host(self._cache, name)[0, :, held - count : held]

    def scales(self, layer: _Layer) -> tuple[Magnitudes, Magnitudes]:
        """What a code of 1 stands for, in each head and channel of keys and of values: [1, K, 1, D] each."""
        keys, values = (self._largest[part] for part in self._names(layer))
        if layer.pairs() is None:
            # Which channels form pairs, if any do, is not known: whatever they are, none is longer than this.
            keys = np.broadcast_to(np.float32(2**0.5) * keys.max(axis=1, keepdims=True), keys.shape)
        return _scales(keys), _scales(values)


def _host(cache: RowCache, name: str) -> npt.NDArray[np.floating]:
    buffer = cache.view(0, 1)[0][name]
    assert isinstance(buffer, HostBuffer)
    array: npt.NDArray[np.floating] = buffer.array
    return array


def _scales(largest: Magnitudes) -> Magnitudes:
    least = np.maximum(largest.max(axis=1, keepdims=True) * LEAST, np.finfo(np.float32).tiny * 127)  # [K, 1]
    scales: Magnitudes = np.maximum(largest, least) * np.float32(HEADROOM / 127)  # [K, D]
    return scales[None, :, None]


def _spell(graph: ir.Graph, layer: _Layer, keys: Magnitudes, values: Magnitudes) -> None:
    """Give the operators of a layer's cache the scales, and the cache its type."""
    inputs = []
    for part, array in (("key", keys), ("value", values)):
        name = f"cache.{layer.facts.layer}.{part}.scale"
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        graph.register_initializer(value)
        inputs.append(value)
    for node in layer.nodes:
        node.resize_inputs(max(len(node.inputs), VALUE_SCALE + 1))
        for index, value in zip((KEY_SCALE, VALUE_SCALE), inputs, strict=True):
            node.replace_input_with(index, value)
        for name in ("k_quant_type", "v_quant_type"):
            node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        for part in PAST:
            for cached in (node.inputs[PAST[part]], node.outputs[PRESENT[part]]):
                assert cached is not None
                cached.type = ir.TensorType(ir.DataType.INT8)  # its own: clones of a graph share theirs


def _evidence(divergence: Divergence, facts: TextFacts, calibration: int) -> Evidence:
    tolerance = TOLERANCES[facts.cache_dtype, "int8"]
    layers, of = sum(cache.quantization is not None for cache in facts.caches), len(facts.caches)
    failures = [*tolerance.excesses(divergence.mean_kl, divergence.perplexity, divergence.source_perplexity)]
    return Evidence(
        name="cache",
        what=f"the cache in int8, in {layers} of {of} layers with attention, against the same weights with floats",
        passed=not failures,
        figures={
            "calibration_tokens": calibration,
            "text_tokens": divergence.tokens,
            "mean_kl": divergence.mean_kl,
            "top1_agreement": divergence.top1_agreement,
            "perplexity": divergence.perplexity,
            "float_perplexity": divergence.source_perplexity,
            **({"failure": "; ".join(failures)} if failures else {}),
        },
    )
