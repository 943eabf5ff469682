"""What TensorRT says when a build fails, and what usually helps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cure:
    """What usually helps against an error."""

    pattern: str
    """A regular expression of TensorRT's message."""
    advice: str


CURES = (
    Cure(
        r"NvMapMemAllocInternalTagged|NvMapMemHandleAlloc",
        "memory is short, or in pieces: L4T 36.4.7 refuses large ones on some boards: free it (sudo sysctl "
        "vm.drop_caches=3), close what else runs, give `--workspace 256MiB`, or update to JetPack 6.2.2",
    ),
    Cure(
        r"insufficient memory|Device memory is insufficient|[Oo]ut ?[Oo]f ?[Mm]emory|OUT_OF_MEMORY|amount of GPU",
        "memory is short: close what else runs (a desktop takes 1 GiB), add swap for the build, and give "
        "`--workspace 256MiB`, fewer `--rows` or a smaller `--size`",
    ),
    Cure(
        r"Could not find any implementation for node",
        "often for want of workspace: give `--workspace 1GiB` or more; else this TensorRT has no kernel for the node's "
        "types on this GPU: `fmedge check` with the version says which rule",
    ),
    Cure(
        r"[Nn]o importer registered|No Op registered|getPluginCreator could not find|Plugin not found"
        r"|failed to load \w+ plugin",
        "this TensorRT does not know the operator: `fmedge check BUNDLE --target` with its version names all of them; "
        "export with --target tensorrt-compat for versions before 10.15",
    ),
    Cure(
        r"HW-specific datatypes|(fp8|FP8|E4M3).*(not support|unsupported)",
        "this GPU does not multiply that type: fp8 needs compute capability 8.9 (Ada) or later; export with w8a8, int8 "
        "or int4",
    ),
    Cure(
        r"must have same input types|requires? .*same type|STRONGLY_TYPED|mixed types",
        "the graph mixes types where TensorRT wants one: export it again with this fmedge, for --target tensorrt",
    ),
    Cure(
        r"[Zz]ero.?[Pp]oint|shiftIsAllZeros",
        "TensorRT takes symmetric quantization only: export with --target tensorrt, not for ONNX Runtime",
    ),
    Cure(
        r"[Nn]o dedicated kernel|is_decomposable",
        "attention in fp32, or with heads that the fused kernel has not: export in fp16",
    ),
    Cure(
        r"profile|dimensions? .*(min|opt|max)",
        "an optimization profile does not suit the graph: give other --rows, --tokens, --size or --batch, or none",
    ),
    Cure(
        r"CUDA initialization failure|error 35|no CUDA-capable device|insufficient driver",
        "CUDA does not start: `fmedge doctor` says what is missing; in a container, run it with --runtime nvidia",
    ),
    Cure(
        r"[Vv]ersion tag does not match|not compatible with this version of TensorRT|serializationVersion",
        "the engine is another TensorRT's: build it on this device",
    ),
    Cure(
        r"[Ff]ailed to (open|read|parse)|external data|[Cc]annot open|No such file",
        "a file of the graph is missing or damaged: `fmedge verify` says which; copy the bundle again",
    ),
)
"""Most telling first."""

PLACES = (
    r"Could not find any implementation for node (?P<place>\S+?)[.\s]",
    r"[Nn]ode:? \d* ?\[?(?P<place>[^\]\s:]+ ?[-:]? ?\"?[^\]\"\s]*)\"?\]?",
    r"\((?P<place>[\w/.:]+)\):",
)
"""Where a message names the layer."""


def cure_of(messages: Sequence[str]) -> str | None:
    """What usually helps against the first message that is known."""
    for message in messages:
        for cure in CURES:
            if re.search(cure.pattern, message):
                return cure.advice
    return None


def place_of(messages: Sequence[str]) -> str | None:
    """The layer that a message names."""
    for message in messages:
        for pattern in PLACES:
            found = re.search(pattern, message)
            if found:
                return found["place"].strip(" .:\"'")
    return None


def explain(what: str, messages: Sequence[str]) -> str:
    """A sentence for a failed build: what, where, TensorRT's words, what helps."""
    told = [message for number, message in enumerate(messages) if message not in messages[:number]]
    place = place_of(told)
    words = "; ".join(told[:3]) or "TensorRT gives no reason"
    advice = cure_of(told) or "run it again with --debug, and look at what the layer does in the ONNX file"
    return f"{what} failed{f' at {place}' if place else ''}: {words}. What usually helps: {advice}."
