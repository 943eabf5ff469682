"""What every export checks and records, whatever it exports."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx_ir as ir
from fmedge_runtimes.devices import DEVICES
from fmedge_runtimes.errors import ExportError, ParityError
from fmedge_runtimes.manifest import MANIFEST, Evidence, GraphFacts, ProfileFacts, TensorFacts
from fmedge_runtimes.version import __version__

from fmedge_converters.export_options import ExportOptions
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.schemes.weight_only import BLOCK_SIZE
from fmedge_converters.targets import find_scheme, find_target

KEEPS_MORE = {
    "int4": ("int4-gptq", "int8"),
    "int4-awq": ("int4-gptq", "int8"),
    "int4-gptq": ("int8",),
    "fp8": ("int8",),
    "w8a8": ("int8",),
    "int8": ("none",),
    "bf16": ("none",),
    "fp16": ("none",),
}
"""By quantization: those to try when it takes too much from a model, the smaller first."""


def check_output(options: ExportOptions) -> None:
    """Raise ExportError when the output cannot be made, or exists and may not be replaced."""
    output = options.output
    if output.name == "..":
        raise ExportError(f"{output} names its folder by another one; give its own name.")
    try:
        present = output.exists() or output.is_symlink()
    except OSError as error:
        raise ExportError(f"cannot write to {output}: {error.strerror}.") from error
    if not present:
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    if not options.force:
        raise ExportError(f"{output} exists; choose another folder, or --force to replace a bundle.")
    if not (output / MANIFEST).is_file():
        raise ExportError(f"{output} exists and is not a bundle; --force replaces bundles only.")
    for given in (
        options.source,
        options.adapter,
        options.text,
        options.prior,
        options.ip_adapter,
        options.statistics,
        *options.controlnets,
        *options.calibrate,
    ):
        if given is not None and Path(given).expanduser().resolve().is_relative_to(output.resolve()):
            raise ExportError(f"{given} lies in {output}, which --force would replace; choose another folder.")


def check_block_size(scheme: Scheme, options: ExportOptions) -> None:
    """Raise ExportError for a block size where there are no blocks."""
    if options.block_size is not None and not scheme.block_size:
        raise ExportError(
            f"--block-size means nothing to --quantize {options.quantize} for {options.target}; leave it out."
        )


def check_bits(scheme: Scheme, options: ExportOptions) -> None:
    """Raise ExportError for a budget of bits where there are no blocks."""
    if options.bits is not None and scheme.vary is None:
        raise ExportError(
            f"--bits means nothing to --quantize {scheme.name} for {options.target}; use --quantize int4, int4-awq or "
            "int4-gptq."
        )


def check_calibration(scheme: Scheme, prefill: Scheme | None, options: ExportOptions) -> None:
    """Raise ExportError for calibration options that neither a scheme nor that of a graph for prompts looks at."""
    if prefill is not None and prefill.calibrate is not None:
        return
    given = [
        name
        for name, value in (
            ("--calibrate", options.calibrate),
            ("--statistics", options.statistics),
            ("--calibrate-tokens", options.calibrate_tokens != ExportOptions.calibrate_tokens),
        )
        if value
    ]
    if given and scheme.calibrate is None:
        raise ExportError(
            f"{given[0]} means nothing to --quantize {scheme.name} for {options.target}, whose weights are rounded "
            "without looking at text; leave it out."
        )
    if given == ["--calibrate-tokens"] and not scheme.needs_calibration:
        raise ExportError(
            f"--calibrate-tokens says how much text is used, and --quantize {scheme.name} looks at text only if "
            "--calibrate or --statistics is given."
        )


def device_name(target: str) -> str | None:
    """The device that was named as the target, None if it is no device."""
    return target if target in DEVICES else None


def check_disk(output: Path, parameters: int, bits: int) -> None:
    """Raise ExportError when the disk has too little room for so many parameters."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    # Scales and an 8-bit head and embedding come on top of the layers' bits.
    need = int(parameters * max(bits, 6) / 8 * 1.05)
    free = shutil.disk_usage(parent).free
    if need > free:
        raise ExportError(f"the bundle needs about {need / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free.")


def judge(evidence: Evidence, options: ExportOptions) -> None:
    """Raise ParityError when a comparison failed, unless --force is given."""
    if evidence.passed or options.force:
        return
    failure = evidence.figures.get("failure")
    if failure is not None:
        raise ParityError(
            f"the export is too far from its source, so nothing was written ({evidence.name}: {evidence.what}): "
            f"{failure}. {_instead(evidence, options)}--force writes it all the same and records that in the manifest."
        )
    figures = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in evidence.figures.items()
    )
    raise ParityError(
        f"the export does not compute what its source computes, so nothing was written ({evidence.name}: "
        f"{evidence.what}: {figures}); --force writes it all the same and records that in the manifest."
    )


def _instead(evidence: Evidence, options: ExportOptions) -> str:
    """What keeps more of a model than what was asked for; nothing where weights and cache are floats."""
    instead = []
    if evidence.name == "cache" or (options.quantize == "none" and options.cache != "float"):
        instead = ["--cache float"]
    elif evidence.name == "prefill":
        instead = ["no --prefill"]
    else:
        blocks = options.block_size or find_scheme(find_target(options.target), options.quantize).block_size
        if options.bits is None and blocks > BLOCK_SIZE:
            instead.append(f"--block-size {BLOCK_SIZE}")
        if options.head_bits == 4:
            instead.append("--head-bits 8")
        if options.bits is not None:
            instead.append("more --bits")
        instead += (f"--quantize {name}" for name in KEEPS_MORE.get(options.quantize, ()))
    return f"What keeps more of the model: {', '.join(instead)}. " if instead else ""


def graph_facts(model: ir.Model, path: Path, profiles: tuple[ProfileFacts, ...] = ()) -> GraphFacts:
    """A graph's inputs and outputs, as the manifest has them."""

    def facts(values: Sequence[ir.Value]) -> tuple[TensorFacts, ...]:
        return tuple(
            TensorFacts(
                name=str(value.name),
                dtype="unknown" if value.dtype is None else str(value.dtype.numpy()),
                shape=tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()),
            )
            for value in values
        )

    inputs, outputs = facts(model.graph.inputs), facts(model.graph.outputs)
    return GraphFacts(file=path.name, inputs=inputs, outputs=outputs, profiles=profiles)


def made_by(*others: str) -> dict[str, str]:
    """Versions of what had a part in an export."""
    packages = ("torch", "transformers", *others, "onnx-ir", "onnxruntime")
    return {
        "fmedge": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
