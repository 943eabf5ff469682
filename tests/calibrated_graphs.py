"""Small models with features that stand out, exported with schemes that look at calibration text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fmedge_converters.build import BuildOptions, BuiltDecoder, build_decoder
from fmedge_converters.calibration.calibration import Calibration
from fmedge_converters.calibration.model import CalibrationModel
from fmedge_converters.calibration.text import CalibrationText
from fmedge_converters.checkpoint import Files
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.evidence import text_facts
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.targets import TARGETS
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from transformers import AutoConfig, AutoModelForCausalLM

CONTEXT = 64
ROWS = tuple(tuple(row) for row in np.random.default_rng(1).integers(1, 320, (12, CONTEXT)).tolist())
HELD_OUT = np.random.default_rng(2).integers(1, 320, (3, CONTEXT)).tolist()


def calibration(folder: Path, scratch: Path, statistics: Path | None = None) -> Calibration:
    """Random tokens for a model."""
    scratch.mkdir(parents=True, exist_ok=True)
    text = CalibrationText(ROWS, "random tokens")
    model = CalibrationModel(AutoConfig.from_pretrained(folder), Files(folder), CONTEXT, ROWS)
    return Calibration(model, text, statistics, scratch)


def build(folder: Path, output: Path, scheme: Scheme, block_size: int | None = None) -> BuiltDecoder:
    """A decoder for the CPU; a scheme that fits its weights gets random tokens."""
    output.mkdir(parents=True)
    fits = scheme.calibrate is not None and scheme.needs_calibration
    options = BuildOptions(
        TARGETS["cpu"],
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
    return float(np.square(logits(built) - wanted).sum() / np.square(wanted).sum())


def plant_outliers(folder: Path, times: float = 40.0) -> Path:
    """Make a few features of every norm large, and the weights behind them small, so that the model stays as it is."""
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for layer in model.model.layers:
                for norm, users in (
                    (layer.input_layernorm, [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]),
                    (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
                ):
                    chosen = torch.randperm(len(norm.weight), generator=random)[:3]
                    norm.weight[chosen] *= times
                    for user in users:
                        user.weight[:, chosen] /= times / 4
        model.save_pretrained(folder)
    return folder


def plain(scheme: Scheme) -> Scheme:
    """The scheme without what looks at text."""
    return replace(scheme, calibrate=None, needs_calibration=False)
