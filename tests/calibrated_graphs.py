"""Small models with features that stand out, exported with schemes that look at calibration text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fmedge_converters.build import BuildOptions, BuiltDecoder, build_decoder
from fmedge_converters.calibration.calibration import Calibration
from fmedge_converters.calibration.model import CalibrationModel
from fmedge_converters.calibration.text import CalibrationText
from fmedge_converters.checkpoint import Files
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.evidence import text_facts
from fmedge_converters.schemes.qmoe import qmoe
from fmedge_converters.schemes.scheme import Calibrate, Scheme
from fmedge_converters.schemes.weight_only import weight_only
from fmedge_converters.targets import TARGETS, Target
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from models import make_model
from transformers import AutoConfig, AutoModelForCausalLM

CONTEXT = 64
RANK = 8
ROWS = tuple(tuple(row) for row in np.random.default_rng(1).integers(1, 320, (12, CONTEXT)).tolist())
HELD_OUT = np.random.default_rng(2).integers(1, 320, (3, CONTEXT)).tolist()


def calibration(
    folder: Path, scratch: Path, statistics: Path | None = None, lookups: np.ndarray | None = None
) -> Calibration:
    """Random tokens for a model."""
    scratch.mkdir(parents=True, exist_ok=True)
    text = CalibrationText(ROWS, "random tokens")
    model = CalibrationModel(AutoConfig.from_pretrained(folder), Files(folder), CONTEXT, ROWS)
    return Calibration(model, text, statistics, scratch, lookups=lookups)


def build(
    folder: Path, output: Path, scheme: Scheme, block_size: int | None = None, target: Target = TARGETS["cpu"]
) -> BuiltDecoder:
    """A decoder for a target; a scheme that fits its weights gets random tokens."""
    output.mkdir(parents=True)
    fits = scheme.calibrate is not None and scheme.needs_calibration
    options = BuildOptions(
        target,
        scheme,
        block_size,
        CONTEXT,
        calibration=calibration(folder, output / "scratch") if fits else None,
    )
    return build_decoder(AutoConfig.from_pretrained(folder), Files(folder), output, options, lambda *_: None)


def logits(built: BuiltDecoder) -> np.ndarray:
    """Of text that nothing was fitted to: [T, V]."""
    session = OnnxRuntimeSession(built.written.graph, "cpu", None)
    decoder = Decoder(session, text_facts(built, CONTEXT))
    cache = decoder.new_cache()
    found = np.concatenate([decoder.score(cache, row) for row in HELD_OUT])
    session.close()
    return found


def error(built: BuiltDecoder, wanted: np.ndarray) -> float:
    """The relative squared error of the logits."""
    exact = wanted.astype(np.float64)
    return float(np.square(logits(built) - exact).sum() / np.square(exact).sum())


def random_model(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A model with random weights whose features depend on each other, as those of trained models do: tokens lie near a
    space of few dimensions, a few features of each norm are large, and layers change what goes through them little."""
    make_model(folder, model_type, **changes)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            tokens = model.model.embed_tokens.weight  # [V, E]
            low = torch.randn(len(tokens), RANK, generator=random) @ torch.randn(
                RANK, tokens.shape[1], generator=random
            )
            tokens.copy_(low * RANK**-0.5 + 0.1 * torch.randn(tokens.shape, generator=random))
            for layer in model.model.layers:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.weight[torch.randperm(len(norm.weight), generator=random)[:3]] *= 4
                for name, parameter in layer.named_parameters():
                    if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                        parameter.mul_(0.3)
        model.save_pretrained(folder)
    return folder


def plant_outliers(folder: Path, copy: Path, times: float = 40.0) -> Path:
    """A copy of a llama in which a few features of every norm are large, and the weights behind them as much smaller:
    it computes the same."""
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        random = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for layer in model.model.layers:
                for norm, users in (
                    (layer.input_layernorm, [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]),
                    (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
                ):
                    chosen = torch.randperm(len(norm.weight), generator=random)[:3]
                    norm.weight[chosen] *= times
                    for user in users:
                        user.weight[:, chosen] /= times
        model.save_pretrained(copy)
    return copy


def int4(fit: Calibrate | None, *, search: bool = True) -> Scheme:
    """4 bits whose products are computed in fp32, so that errors are those of the weights."""
    scheme = weight_only(
        "int4", "for a test", 4, head_bits=8, accuracy_level=0, mixture=qmoe(4, search=search), search=search
    )
    return replace(scheme, calibrate=fit, needs_calibration=fit is not None)
