"""The options of an export. Light to import: the CLI takes its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fmedge_runtimes.errors import ExportError

Verify = Literal["full", "graph", "none"]
Cache = Literal["float", "int8"]
BLOCK_SIZES = (16, 32, 64, 128, 256)
HEAD_BITS = (4, 8)
LEAST_CALIBRATION = 64
"""Tokens; fewer say nothing about a model."""
LONGEST_DEFAULT = 32768
"""Longer contexts are exported when asked for: the tables of the rotary embedding grow with them."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export, where to, and how."""

    source: str
    """A Hugging Face folder or a hub id."""
    output: Path
    """The bundle's folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    target: str = "cpu"
    quantize: str = "none"
    block_size: int | None = None
    """Weights that share a scale, for schemes with blocks; None takes the scheme's default."""
    asymmetric: bool = False
    """Give each block a zero point of its own, for schemes with blocks."""
    head_bits: int | None = None
    """Of the head and the token embedding, 4 or 8, for schemes with blocks; None takes the scheme's default."""
    bits: float | None = None
    """Choose the bits and blocks of each matrix so that all take so many bits per weight, scales included."""
    prefill: str | None = None
    """The quantization of a second graph, for prompts; None leaves them to the one that decodes."""
    context: int | None = None
    """Tokens that a row can hold; None takes the model's maximum, at most LONGEST_DEFAULT."""
    cache: Cache = "float"
    """How keys and values are kept: float is the target's floating type."""
    verify: Verify = "full"
    calibrate: tuple[str, ...] = ()
    """Files or folders of text that weights are fitted to; none takes Python's own documentation where it is needed."""
    calibrate_tokens: int = 16384
    """Of that text."""
    calibrate_chat: bool = False
    """Put the messages of .jsonl files through the chat template."""
    statistics: Path | None = None
    """A file with what is measured on that text: written, or read if it is there."""
    text: Path | None = None
    """Text for the comparison of perplexities and the scales of a cache; None takes Python's own documentation."""
    prior: str | None = None
    """Folder or hub id of the first stage of an image pipeline in two (Kandinsky 2.2)."""
    controlnets: tuple[str, ...] = ()
    """Folders or hub ids of ControlNets to add to an image pipeline."""
    ip_adapter: str | None = None
    """IP-Adapter of an image pipeline: a folder, a file, or a file of a hub repository (owner/name/path)."""
    adapter: str | None = None
    """LoRA to merge into the weights: PEFT folder or hub id; for images a folder or file of diffusers or kohya, too."""
    adapter_scale: float = 1.0
    """How much of an image pipeline's LoRA is added."""
    keep_adapter: bool = False
    """Keep an image pipeline's LoRA beside the weights: its scale is an input then, which `adapter_scale` is unless a
    request says otherwise."""
    allow_pickle: bool = False
    """Read weights that are stored as pickles, with PyTorch's weights-only loader."""
    layout: str | None = None
    """Another runtime that is to load the bundle, too: genai (onnxruntime-genai)."""
    force: bool = False
    """Replace an existing bundle, and write one that fails its verification (the manifest records that)."""

    def __post_init__(self) -> None:
        if self.verify not in get_args(Verify):
            raise ExportError(f"--verify is {self.verify!r}; it must be one of {', '.join(get_args(Verify))}.")
        if self.cache not in get_args(Cache):
            raise ExportError(f"--cache is {self.cache!r}; it must be one of {', '.join(get_args(Cache))}.")
        if self.cache != "float" and self.layout is not None:
            raise ExportError(
                f"--layout {self.layout} shares its graph's cache, which must be float; leave --cache out."
            )
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise ExportError(f"--block-size is {self.block_size}; it must be one of {BLOCK_SIZES}.")
        if self.head_bits not in (None, *HEAD_BITS):
            raise ExportError(f"--head-bits is {self.head_bits}; it must be one of {HEAD_BITS}.")
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise ExportError(f"--bits is {self.bits}; it must be a number of bits per weight, like 4.5.")
        for name, given in (("--block-size", self.block_size), ("--head-bits", self.head_bits)):
            if self.bits is not None and given is not None:
                raise ExportError(f"--bits chooses for every matrix what {name} says for all; leave one of them out.")
        if self.context is not None and self.context < 2:
            raise ExportError(f"--context is {self.context}; it must be at least 2.")
        if self.calibrate_tokens < LEAST_CALIBRATION:
            raise ExportError(
                f"--calibrate-tokens is {self.calibrate_tokens}; it must be at least {LEAST_CALIBRATION}."
            )
        if self.calibrate_chat and not self.calibrate:
            raise ExportError("--calibrate-chat is for the messages of .jsonl files; name them with --calibrate.")
        if self.text is not None and self.verify != "full" and self.cache == "float":
            raise ExportError(
                f"--text is for the comparison of --verify full, and for --cache int8; not for --verify {self.verify}."
            )
