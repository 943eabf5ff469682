"""How large a model is, and how much room it gets where it is to run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from fmedge_runtimes.devices import DEVICES
from fmedge_runtimes.errors import ExportError

from fmedge_converters.build import Progress
from fmedge_converters.checkpoint import Checkpoint
from fmedge_converters.decoder import empty_model, find_layout, text_config
from fmedge_converters.device_plan import ROWS, STATIC_DEFAULT, decoder_needs, plan_device
from fmedge_converters.export_options import LONGEST_DEFAULT, ExportOptions
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.source import Source
from fmedge_converters.targets import Target


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Numbers of weights."""

    parameters: int
    embedding: int
    vocabulary: int


def require_weights(source: Source) -> ModelSize:
    """How large the model is, if the checkpoint has all of it; read from names and shapes, before anything is traced.

    Raises SourceError.
    """
    with Checkpoint(source.files, np.dtype(np.float32)) as checkpoint:
        model = empty_model(source.config, torch.float32)
        checkpoint.weights(model)
        embedding = model.get_input_embeddings().weight
        return ModelSize(checkpoint.parameters, embedding.numel(), embedding.shape[0])


def room(
    source: Source, size: ModelSize, target: Target, scheme: Scheme, options: ExportOptions, progress: Progress
) -> tuple[int, int]:
    """Tokens of a row, and rows of an engine; both as the memory of the device allows, if one is named."""
    context = _context(source, options, STATIC_DEFAULT if target.dialect.static else LONGEST_DEFAULT)
    device = DEVICES.get(options.target)
    if device is None:
        return context, ROWS
    kept = find_layout(source.config, target.dialect, target.dtype, context)
    needs = decoder_needs(
        kept.caches, kept.states, target.dtype.itemsize, scheme.bits, size.parameters, size.embedding, size.vocabulary
    )
    found = plan_device(device, needs, context, asked=options.context is not None)
    progress(f"{device.name} is target {target.name} (JetPack {device.jetpack}); {found}", 0, 0)
    return found.context, found.rows


def _context(source: Source, options: ExportOptions, default: int) -> int:
    text = text_config(source.config)
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if longest is not None and longest < 1:
        longest = None  # how some say that there is no limit
    if options.context is None:
        # A model that states no limit has none: its positions are relative, or it has a state instead.
        return default if longest is None else min(int(longest), default)
    if longest is not None and options.context > longest:
        raise ExportError(f"--context {options.context} is more than the {longest} positions that {source.id} knows.")
    return options.context
