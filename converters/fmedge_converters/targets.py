"""Where a bundle is to run: one frozen row for each target. A new target is a new row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from fmedge_runtimes.devices import DEVICES, Device
from fmedge_runtimes.errors import ExportError

from fmedge_converters.dialects.dialect import Dialect
from fmedge_converters.dialects.ort import ORT
from fmedge_converters.dialects.tensorrt import TENSORRT
from fmedge_converters.dialects.tensorrt_compat import TENSORRT_COMPAT
from fmedge_converters.fused_operators import ORT_OPERATORS, PartOperators
from fmedge_converters.passes import ORT_PASSES, PART_PASSES, TENSORRT_PART_PASSES, TENSORRT_PASSES, Pass
from fmedge_converters.passes.early_attention import decompose_early_attention
from fmedge_converters.passes.gelu import decompose_gelu
from fmedge_converters.plain_operators import TENSORRT_COMPAT_OPERATORS, TENSORRT_OPERATORS
from fmedge_converters.schemes.calibrated import calibrated_int4, for_prompts, smoothed_int8
from fmedge_converters.schemes.dequantize_linear import dequantize_linear
from fmedge_converters.schemes.dynamic_int8 import DYNAMIC_INT8
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.int8_convolution import spell_convolution
from fmedge_converters.schemes.plain_floating import PLAIN_FLOATING
from fmedge_converters.schemes.qmoe import qmoe
from fmedge_converters.schemes.scheme import USUAL, Scheme, SpellMixture, WeightOptions
from fmedge_converters.schemes.static_codes import FLOAT8_BY_TENSOR, static_float8, static_int8
from fmedge_converters.schemes.stored_floats import BF16, FP16
from fmedge_converters.schemes.weight_only import weight_only


@dataclass(frozen=True, slots=True)
class Target:
    """A backend and device class, and how graphs for it are written."""

    name: str
    summary: str
    dialect: Dialect
    passes: tuple[Pass, ...]
    dtype: torch.dtype
    """Of activations, of the cache, and of what is not quantized."""
    schemes: Mapping[str, Scheme]
    image_schemes: Mapping[str, Scheme]
    """For the parts of pipelines that make images."""
    part_operators: PartOperators
    part_passes: tuple[Pass, ...]
    read_first: frozenset[str]
    """Operators that may write a recurrent state over the one they read; tests/test_kernels.py has the proof."""
    automatic: tuple[str, ...] = ()
    """Image schemes of which --quantize auto takes the fastest on this machine, the most precise first."""
    prefill: Mapping[str, Scheme] = field(default_factory=dict)
    """Schemes of a second graph, for prompts, beside one whose weights are rounded in blocks."""
    summarises: bool = False
    """Whether bundles carry the graph that summarises logits, which stay on the device then."""
    engines: bool = False
    """Engines are built from the graphs, for sizes that the manifest lists (profiles.py)."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Quantizations that people ask for, and why this target has them not."""
    no_int8_cache: str | None = None
    """Why keys and values cannot be kept in int8; None if they can."""


def _int4(
    accuracy_level: int,
    experts: Callable[[bool], SpellMixture],
    keeps: tuple[int, ...],
    options: WeightOptions = USUAL,
) -> Scheme:
    """`experts` gives the mixtures for symmetric rounding, or for the other."""
    head_bits = options.head_bits or 8
    scheme = weight_only(
        "int4",
        f"4-bit weights, {head_bits}-bit head",
        bits=4,
        head_bits=head_bits,
        accuracy_level=accuracy_level,
        mixture=experts(options.symmetric),
        keeps=keeps,
        symmetric=options.symmetric,
    )
    return replace(scheme, vary=functools.partial(_int4, accuracy_level, experts, keeps))


CPU_INT4 = _int4(4, lambda symmetric: qmoe(4, 4, zero_points=True, symmetric=symmetric), (2, 4, 8))
CPU_INT4_CALIBRATED = calibrated_int4(CPU_INT4)
CPU_INT8 = weight_only("int8", "8-bit weights", 8, head_bits=8, accuracy_level=4, mixture=qmoe(8), keeps=(8,))
CPU_W8A8 = smoothed_int8(CPU_INT8)
CPU_INT8_IMAGES = replace(DYNAMIC_INT8, convolution=spell_convolution)
CUDA_INT4 = _int4(0, lambda _: qmoe(4), (4, 8))
CUDA_INT4_CALIBRATED = calibrated_int4(CUDA_INT4)
CUDA_INT8 = weight_only("int8", "8-bit weights", 8, head_bits=8, accuracy_level=0, mixture=qmoe(8), keeps=(8,))


def _tensorrt_int4(options: WeightOptions = USUAL) -> Scheme:
    if not options.symmetric:
        raise ExportError("--asymmetric gives each block a zero point, and TensorRT has none; leave it out.")
    head_bits = options.head_bits or 8
    summary = f"4-bit weights in symmetric blocks, {head_bits}-bit head"
    return replace(dequantize_linear("int4", summary, 4, head_bits), vary=_tensorrt_int4)


TENSORRT_INT4 = _tensorrt_int4()
TENSORRT_INT4_CALIBRATED = calibrated_int4(TENSORRT_INT4)
TENSORRT_INT8 = dequantize_linear("int8", "8-bit weights per channel", 8)
TENSORRT_FP8 = static_float8(PLAIN_FLOATING)
TENSORRT_COMPAT_FP8 = static_float8(PLAIN_FLOATING, FLOAT8_BY_TENSOR)
"""TensorRT has scales for each channel of a product in fp8 since 10.6."""


def _by_name(*schemes: Scheme) -> Mapping[str, Scheme]:
    return MappingProxyType({scheme.name: scheme for scheme in schemes})


def _with(schemes: Mapping[str, Scheme], scheme: Scheme) -> Mapping[str, Scheme]:
    """With that one in place of the one of its name."""
    return _by_name(*{**schemes, scheme.name: scheme}.values())


NO_FP8_HERE = MappingProxyType({"fp8": "ONNX Runtime multiplies no fp8 weights, neither on the CPU nor on CUDA"})
NO_BF16 = "ONNX Runtime's CPU provider does not compute in bf16, so nothing could be compared with the source"

TENSORRT_TARGET = Target(
    name="tensorrt",
    summary="TensorRT >= 10.15 (JetPack 7.2, desktops), in fp16",
    dialect=TENSORRT,
    passes=TENSORRT_PASSES,
    dtype=torch.float16,
    schemes=_by_name(
        PLAIN_FLOATING,
        TENSORRT_INT8,
        TENSORRT_INT4,
        *TENSORRT_INT4_CALIBRATED,
        static_int8(PLAIN_FLOATING),
        TENSORRT_FP8,
    ),
    image_schemes=_by_name(PLAIN_FLOATING, TENSORRT_INT8, TENSORRT_INT4, TENSORRT_FP8),
    part_operators=TENSORRT_OPERATORS,
    part_passes=TENSORRT_PART_PASSES,
    read_first=frozenset(),
    engines=True,
    refused=MappingProxyType({"bf16": NO_BF16, "fp16": "fp16 is what none means there"}),
    no_int8_cache="TensorRT's cache update takes floats only",
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "cpu": Target(
            name="cpu",
            summary="ONNX Runtime on the CPU, in fp32",
            dialect=ORT,
            passes=ORT_PASSES,
            dtype=torch.float32,
            schemes=_by_name(FLOATING, FP16, BF16, CPU_INT8, CPU_INT4, *CPU_INT4_CALIBRATED, CPU_W8A8),
            image_schemes=_by_name(FLOATING, FP16, BF16, CPU_INT8_IMAGES, CPU_INT4),
            part_operators=ORT_OPERATORS,
            part_passes=PART_PASSES,
            automatic=(FLOATING.name, BF16.name, CPU_INT8_IMAGES.name),
            read_first=frozenset(("LinearAttention", "CausalConvWithState")),
            refused=NO_FP8_HERE,
            prefill=_by_name(for_prompts(CPU_W8A8)),
        ),
        "cuda": Target(
            name="cuda",
            summary="ONNX Runtime on NVIDIA GPUs, in fp16",
            dialect=ORT,
            passes=ORT_PASSES,
            dtype=torch.float16,
            schemes=_by_name(FLOATING, CUDA_INT8, CUDA_INT4, *CUDA_INT4_CALIBRATED, static_int8(FLOATING)),
            image_schemes=_by_name(FLOATING, CUDA_INT8, CUDA_INT4),
            part_operators=ORT_OPERATORS,
            part_passes=PART_PASSES,
            read_first=frozenset(),
            refused=NO_FP8_HERE,
            summarises=True,
            no_int8_cache="ONNX Runtime's CUDA kernel has int8 caches, but none has run on a GPU here yet",
        ),
        "tensorrt": TENSORRT_TARGET,
        "tensorrt-compat": replace(
            TENSORRT_TARGET,
            name="tensorrt-compat",
            summary="TensorRT >= 10.3 (JetPack 6), in fp16",
            dialect=TENSORRT_COMPAT,
            schemes=_with(TENSORRT_TARGET.schemes, TENSORRT_COMPAT_FP8),
            image_schemes=_with(TENSORRT_TARGET.image_schemes, TENSORRT_COMPAT_FP8),
            passes=(*TENSORRT_PASSES, decompose_gelu),
            part_operators=TENSORRT_COMPAT_OPERATORS,
            part_passes=(*TENSORRT_PART_PASSES, decompose_gelu),
        ),
        "rtx": replace(
            TENSORRT_TARGET,
            name="rtx",
            summary="TensorRT-RTX, in fp16",
            passes=(*TENSORRT_PASSES, decompose_early_attention),
        ),
    }
)

AUTO = "auto"
"""As a quantization: the one of `Target.automatic` that turns out to be the fastest."""


def find_target(name: str) -> Target:
    """The row of a name, or of the device of that name, without what that cannot compute. Raises ExportError when there
    is none."""
    if name in DEVICES:
        return _for_device(TARGETS[DEVICES[name].target], DEVICES[name])
    if name not in TARGETS:
        raise ExportError(f"there is no target {name}; choose one of {', '.join((*TARGETS, *DEVICES))}.")
    return TARGETS[name]


def _for_device(target: Target, device: Device) -> Target:
    if device.fp8:
        return target
    why = (
        f"the GPU of {device.name} has compute capability {device.compute_capability}, and tensor cores multiply fp8 "
        "from 8.9 (Ada) on; choose w8a8, int8 or int4 there (int8 or int4 for images)"
    )
    return replace(
        target,
        schemes=_without(target.schemes, TENSORRT_FP8.name),
        image_schemes=_without(target.image_schemes, TENSORRT_FP8.name),
        refused=MappingProxyType({**target.refused, TENSORRT_FP8.name: why}),
    )


def _without(schemes: Mapping[str, Scheme], name: str) -> Mapping[str, Scheme]:
    return _by_name(*(scheme for scheme in schemes.values() if scheme.name != name))


def find_scheme(target: Target, name: str, *, images: bool = False) -> Scheme:
    """The scheme of a name for decoders, or for pipelines that make images, on a target.

    Raises ExportError when there is none.
    """
    schemes = target.image_schemes if images else target.schemes
    if name == AUTO:
        why = f"target {target.name} has none" if images else "decoders have none: speed and quality are yours to weigh"
        raise ExportError(
            f"--quantize auto measures pipelines that make images on this machine's CPU; {why}; choose one of "
            f"{', '.join(schemes)}."
        )
    if name in target.refused:
        raise ExportError(f"target {target.name} has no quantization {name}: {target.refused[name]}.")
    if name not in schemes:
        raise ExportError(f"target {target.name} has no quantization {name}; choose one of {', '.join(schemes)}.")
    return schemes[name]


def find_image_schemes(target: Target, name: str) -> tuple[Scheme, ...]:
    """The schemes in which the parts of a pipeline are built: one, or those of which the fastest is taken.

    Raises ExportError when there is none.
    """
    names = target.automatic if name == AUTO and target.automatic else (name,)
    return tuple(find_scheme(target, each, images=True) for each in names)


def with_options(target: Target, scheme: Scheme, options: WeightOptions) -> Scheme:
    """The scheme with a person's options. Raises ExportError when it has none."""
    if options == USUAL:
        return scheme
    if scheme.vary is None:
        names = [name for name, other in target.schemes.items() if other.vary is not None]
        asked = f"--head-bits {options.head_bits}" if options.symmetric else "--asymmetric"
        raise ExportError(
            f"{asked} means nothing to --quantize {scheme.name} for {target.name}; leave it out, or use --quantize "
            f"{' or '.join(names)}."
        )
    return scheme.vary(options)


def check_cache(target: Target, cache: str) -> None:
    """Raise ExportError when a target cannot keep its cache so."""
    if cache == "int8" and target.no_int8_cache is not None:
        raise ExportError(f"target {target.name} takes no --cache int8: {target.no_int8_cache}; leave it out.")
