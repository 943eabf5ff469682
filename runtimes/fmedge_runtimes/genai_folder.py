"""Folders of onnxruntime-genai's model builder: genai_config.json beside a graph.

Format: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from fmedge_runtimes.errors import BundleError
from fmedge_runtimes.foreign_folder import (
    ForeignFolder,
    GenerationSettings,
    Settings,
    inside,
    read_json,
    settings,
    token_ids,
)
from fmedge_runtimes.foreign_session import GraphNames

GENAI_CONFIG = "genai_config.json"
PARTS = ("encoder", "embedding", "vision", "speech", "joiner")
"""Graphs beside the decoder's, in models that are more than one."""
USUAL = GraphNames()


class _Inputs(Settings):
    input_ids: str = USUAL.input_ids
    attention_mask: str = USUAL.attention_mask
    position_ids: str = USUAL.position_ids
    past_key_names: str = USUAL.past_key
    past_value_names: str = USUAL.past_value


class _Outputs(Settings):
    logits: str = USUAL.logits
    present_key_names: str = USUAL.present_key
    present_value_names: str = USUAL.present_value


class _Window(Settings):
    window_size: PositiveInt
    slide_key_value_cache: bool = True
    slide_inputs: bool = True
    layers: tuple[int, ...] = ()


class _SessionOptions(Settings):
    provider_options: tuple[dict[str, Any], ...] = ()


class _Decoder(Settings):
    filename: str
    head_size: PositiveInt | None = None
    inputs: _Inputs = _Inputs()
    outputs: _Outputs = _Outputs()
    session_options: _SessionOptions = _SessionOptions()
    sliding_window: _Window | None = None
    pipeline: tuple[Any, ...] = ()


class _Model(Settings):
    type: str
    context_length: PositiveInt
    vocab_size: PositiveInt
    eos_token_id: int | list[int] | None = None
    decoder: _Decoder


class _Search(GenerationSettings):
    past_present_share_buffer: bool = False


class _Config(Settings):
    model: _Model
    search: _Search = Field(default_factory=_Search)


def read_genai_folder(folder: Path) -> ForeignFolder | None:
    """The decoder of a folder with a genai_config.json; None if there is none.

    Raises BundleError when it is more than one decoder's graph, BundleFormatError when the file lacks something.
    """
    path = folder / GENAI_CONFIG
    if not path.is_file():
        return None
    raw = read_json(path)
    parts = raw.get("model")
    others = [name for name in PARTS if isinstance(parts, dict) and name in parts]
    if others:
        raise BundleError(f"{path} describes a model with a graph for its {others[0]}; fmedge runs single decoders.")
    config = settings(path, raw, _Config)
    decoder = config.model.decoder
    if decoder.pipeline:
        raise BundleError(
            f"{path} describes a pipeline of {len(decoder.pipeline)} graphs; fmedge runs single decoders."
        )
    providers = {name.lower() for options in decoder.session_options.provider_options for name in options}
    return ForeignFolder(
        folder=folder,
        exporter="onnxruntime-genai",
        graph=inside(folder, decoder.filename, path),
        names=_names(decoder),
        in_place=config.search.past_present_share_buffer,
        device="cuda" if "cuda" in providers else "cpu",
        architecture=config.model.type,
        context=min(config.model.context_length, _whole_window(decoder.sliding_window)),
        vocabulary=config.model.vocab_size,
        head_size=decoder.head_size,
        windows=_windows(path, decoder.sliding_window),
        eos_token_ids=token_ids(config.model.eos_token_id),
        sampling=config.search.sampling(),
    )


def _names(decoder: _Decoder) -> GraphNames:
    inputs, outputs = decoder.inputs, decoder.outputs
    return GraphNames(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        past_key=inputs.past_key_names,
        past_value=inputs.past_value_names,
        logits=outputs.logits,
        present_key=outputs.present_key_names,
        present_value=outputs.present_value_names,
    )


def _whole_window(window: _Window | None) -> int:
    """The window of a model that names no layers for it. Some graphs of such models know the window and some do not;
    a text that does not leave it is the same to both."""
    return window.window_size if window is not None and not window.layers else sys.maxsize


def _windows(path: Path, window: _Window | None) -> dict[int, int]:
    """The layers whose caches hold a window and no more."""
    if window is None:
        return {}
    if window.slide_inputs or window.slide_key_value_cache:
        raise BundleError(
            f"{path} lets the runtime slide a window over inputs and caches (sliding_window), which fmedge does not."
        )
    return dict.fromkeys(window.layers, window.window_size)
