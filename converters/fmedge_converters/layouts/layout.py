"""What a layout is: files beside a bundle's own, by which another runtime loads the same folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from fmedge_runtimes.manifest import TextFacts
from fmedge_runtimes.session import Session
from transformers import GenerationConfig, PretrainedConfig

from fmedge_converters.decoder import TracedDecoder
from fmedge_converters.targets import Target


@dataclass(frozen=True, slots=True)
class Finished:
    """A bundle whose own files are written, but for its manifest."""

    folder: Path
    decoder: Path
    """The graph, with its weights beside it."""
    config: PretrainedConfig
    generation: GenerationConfig
    facts: TextFacts
    target: Target


@dataclass(frozen=True, slots=True)
class Layout:
    """A runtime that can load a bundle, too."""

    name: str
    graph: str
    """File of its graph."""
    dialect: str
    """The dialect that the runtime's operators come from."""
    check_tokenizer: Callable[[Path], None]
    """Raises ExportError when the runtime cannot read a tokenizer.json."""
    check_decoder: Callable[[TracedDecoder], None]
    """Raises ExportError when the runtime cannot run a decoder; asked before a weight is read."""
    finish: Callable[[Finished], ir.Model]
    """Writes the rest, and returns the graph."""
    open: Callable[[Path, TextFacts], Session]
    """Opens the layout's graph on the CPU, to be fed like the bundle's own."""
