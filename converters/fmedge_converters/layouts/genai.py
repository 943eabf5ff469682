"""The layout of onnxruntime-genai.

`model.onnx` is a second graph over the bundle's weights, `genai_config.json` describes it, and `tokenizer_config.json`
lets onnxruntime-genai read the bundle's tokenizer.json. Format: https://onnxruntime.ai/docs/genai/reference/config.html
Checked with onnxruntime-genai 0.18.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tokenizers
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.foreign_session import ForeignGraph, ForeignSession, GraphNames
from fmedge_runtimes.manifest import SamplingFacts, TextFacts
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.session import Session

from fmedge_converters.decoder import TracedDecoder, text_config
from fmedge_converters.layouts.genai_graph import write_genai_graph
from fmedge_converters.layouts.layout import Finished, Layout

GRAPH = "model.onnx"
CONFIG = "genai_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""A class that onnxruntime-genai knows; to it, all tokenizers of byte pairs are alike."""
MODEL_TYPE = "decoder"
"""To onnxruntime-genai, a decoder of no special kind."""
NO_TOKEN = -1
SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size")
NAMES = GraphNames()


def check_tokenizer(path: Path) -> None:
    """Raise ExportError unless onnxruntime-genai reads a tokenizer.json as the tokenizers library does."""
    kind = json.loads(path.read_text("utf-8"))["model"]["type"]
    if kind != "BPE":
        raise ExportError(
            f"onnxruntime-genai reads tokenizers of byte pairs (BPE), and this one is {kind}; leave out --layout genai."
        )


def check_decoder(traced: TracedDecoder) -> None:
    """Raise ExportError unless onnxruntime-genai can carry what the decoder keeps from step to step."""
    if traced.states:
        raise ExportError(
            f"its layers keep {len(traced.states)} recurrent states, which onnxruntime-genai carries for models that "
            "it knows by name only; leave out --layout genai."
        )
    uneven = next((cache for cache in traced.caches if cache.key_dim != cache.value_dim), None)
    if uneven is not None:
        raise ExportError(
            f"layer {uneven.layer} keeps keys of {uneven.key_dim} and values of {uneven.value_dim} numbers, and "
            "onnxruntime-genai has one size for both; leave out --layout genai."
        )
    windows = sorted({cache.window or 0 for cache in traced.caches if cache.rolling})
    if len(windows) > 1:
        raise ExportError(
            f"its layers keep windows of {' and '.join(map(str, windows))} tokens, and onnxruntime-genai knows one "
            "window for all; leave out --layout genai."
        )


def finish(finished: Finished) -> ir.Model:
    """Write the graph, its configuration and that of the tokenizer. Raises OSError when the disk is full."""
    folder, facts = finished.folder, finished.facts
    model = write_genai_graph(finished.decoder, folder / GRAPH)
    _write(folder / CONFIG, _config(finished))
    if facts.tokenizer is not None:
        tokenizer = {
            "tokenizer_class": TOKENIZER_CLASS,
            "model_max_length": facts.context,
            "clean_up_tokenization_spaces": False,
            **facts.special_tokens,
        }
        _write(folder / TOKENIZER_CONFIG, tokenizer)
    return model


def _config(finished: Finished) -> dict[str, Any]:
    facts, config = finished.facts, text_config(finished.config)
    providers = [{"cuda": {"enable_cuda_graph": "0"}}] if finished.target.name == "cuda" else []
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
        "filename": GRAPH,
        # Where layers differ, onnxruntime-genai takes what the graph's inputs say.
        "head_size": facts.caches[0].key_dim,
        "num_key_value_heads": facts.caches[0].kv_heads,
        **{name: size for name in SIZES if isinstance(size := getattr(config, name, None), int)},
        "inputs": {
            "input_ids": NAMES.input_ids,
            "attention_mask": NAMES.attention_mask,
            "position_ids": NAMES.position_ids,
            "past_key_names": NAMES.past_key,
            "past_value_names": NAMES.past_value,
        },
        "outputs": {
            "logits": NAMES.logits,
            "present_key_names": NAMES.present_key,
            "present_value_names": NAMES.present_value,
        },
    }
    rolling = [cache for cache in facts.caches if cache.rolling]
    if rolling:
        decoder["sliding_window"] = {
            "window_size": rolling[0].window,
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": [cache.layer for cache in rolling],
        }
    tokens = _special_ids(finished)
    return {
        "model": {
            "type": MODEL_TYPE,
            "context_length": facts.context,
            "vocab_size": facts.vocabulary,
            **tokens,
            "decoder": decoder,
        },
        "search": _search(facts.sampling, facts.context),
    }


def _special_ids(finished: Finished) -> dict[str, int | list[int]]:
    """End, beginning and padding. What onnxruntime-genai wants and the model has not is an id that does not occur."""
    facts = finished.facts
    ends = list(facts.eos_token_ids) or [NO_TOKEN]
    return {
        "eos_token_id": ends,
        "bos_token_id": _special_id(finished, "bos_token", NO_TOKEN),
        # A padded row must differ from its padding; a model that was not trained to pad pads with its end.
        "pad_token_id": _special_id(finished, "pad_token", ends[0]),
    }


def _special_id(finished: Finished, name: str, otherwise: int) -> int:
    for source in (finished.generation, text_config(finished.config)):
        found = getattr(source, f"{name}_id", None)
        if isinstance(found, int) and 0 <= found < finished.facts.vocabulary:
            return found
    facts = finished.facts
    if facts.tokenizer is not None and name in facts.special_tokens:
        tokenizer = tokenizers.Tokenizer.from_file(str(finished.folder / facts.tokenizer))
        found = tokenizer.token_to_id(facts.special_tokens[name])
        if found is not None and found < facts.vocabulary:
            return int(found)
    return otherwise


def _search(sampling: SamplingFacts, context: int) -> dict[str, Any]:
    """Defaults of a generation. onnxruntime-genai has no min_p; in a greedy search top_k and top_p mean nothing."""
    draws = sampling.temperature > 0
    return {
        "do_sample": draws,
        "temperature": sampling.temperature if draws else 1.0,
        "top_k": sampling.top_k if draws else 50,
        "top_p": sampling.top_p if draws else 1.0,
        "repetition_penalty": sampling.repetition_penalty,
        "max_length": context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "no_repeat_ngram_size": 0,
        "diversity_penalty": 0.0,
        "length_penalty": 1.0,
        "early_stopping": True,
        "past_present_share_buffer": True,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def open_graph(path: Path, facts: TextFacts) -> Session:
    """The graph on the CPU, to be fed like the bundle's own."""
    graph = ForeignGraph(
        names=NAMES,
        caches=facts.caches,
        cache_dtype=facts.cache_dtype,
        vocabulary=facts.vocabulary,
        in_place=True,
        last_only=True,
        extends=True,
        ragged=True,
    )
    return ForeignSession(OnnxRuntimeSession(path, "cpu", None), graph)


GENAI = Layout(
    name="genai",
    graph=GRAPH,
    dialect="ort",
    check_tokenizer=check_tokenizer,
    check_decoder=check_decoder,
    finish=finish,
    open=open_graph,
)
