"""Schemes with the operators of another one, whose weights are fitted to calibration text."""

from __future__ import annotations

import functools
from dataclasses import replace

from fmedge_converters.calibration.fit_codes import fit_awq, fit_gptq
from fmedge_converters.calibration.smooth_quant import smooth
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.passes.linear import Linear
from fmedge_converters.schemes.dynamic_int8 import DYNAMIC_INT8
from fmedge_converters.schemes.scheme import Calibrate, Scheme


def smoothed_int8(blocks: Scheme) -> Scheme:
    """W8A8 on the CPU, where `blocks` rounds weights only: it has the head, the token embedding, and the products
    whose inputs one scale cannot carry."""

    def spell(graph: DecoderGraph, linear: Linear, *, is_head: bool, block_size: int) -> None:
        scheme = blocks if is_head or linear.name not in graph.input_ranges else DYNAMIC_INT8
        scheme.linear(graph, linear, is_head=is_head, block_size=block_size)

    return replace(
        blocks,
        name="w8a8",
        summary="W8A8: activations smoothed by what calibration text shows (SmoothQuant), and quantized in every call",
        linear=spell,
        keeps=None,
        rounding=None,
        calibrate=smooth,
        needs_calibration=True,
    )


def for_prompts(scheme: Scheme) -> Scheme:
    """Smoothed W8A8 of a graph that shares its cache with another one."""
    return replace(scheme, calibrate=functools.partial(smooth, cached=False))


def calibrated_int4(scheme: Scheme) -> tuple[Scheme, ...]:
    """The rows for AWQ and GPTQ, which a target has beside its int4: the same operators, so the same speed."""
    return (
        _fitted(
            scheme,
            "int4-awq",
            "4-bit weights, scaled by what their input features matter on calibration text (AWQ), 8-bit head",
            fit_awq,
        ),
        _fitted(
            scheme,
            "int4-gptq",
            "4-bit weights, rounded so that the errors on calibration text cancel (GPTQ), 8-bit head",
            fit_gptq,
        ),
    )


def _fitted(scheme: Scheme, name: str, summary: str, calibrate: Calibrate) -> Scheme:
    made = replace(scheme, name=name, summary=summary, calibrate=calibrate, needs_calibration=True)
    if scheme.vary is None:
        return made
    vary = scheme.vary
    return replace(made, vary=lambda options: _fitted(vary(options), name, summary, calibrate))
