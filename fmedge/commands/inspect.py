"""`fmedge inspect`: what a bundle is, for a person or for a program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fmedge_runtimes.bundle import Bundle, ImageBundle
    from fmedge_runtimes.manifest import Evidence, MatrixFacts


def command(
    bundle: Annotated[
        Path, typer.Argument(help="Folder of the bundle, or of a decoder that optimum or onnxruntime-genai exported.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON line.")] = False,
) -> None:
    """Show what a bundle is, where it comes from, and what was proven about it.

    Checks the manifest and the sizes of the files; `fmedge verify` checks their content too. A decoder that another
    exporter wrote is opened to see whether it can run.
    """
    from fmedge_runtimes.bundle import open_any_bundle
    from fmedge_runtimes.foreign import describe_foreign, find_foreign

    foreign = find_foreign(bundle)
    opened = open_any_bundle(bundle, checksums=False) if foreign is None else describe_foreign(foreign)
    show(opened, as_json=as_json)


def show(bundle: Bundle | ImageBundle, *, as_json: bool) -> None:
    """Print a bundle as a table, or its manifest as one JSON line."""
    if as_json:
        typer.echo(bundle.manifest.model_dump_json())
        return
    from fmedge_runtimes.bundle import ImageBundle

    rows = _image_rows(bundle) if isinstance(bundle, ImageBundle) else _rows(bundle)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def _image_rows(bundle: ImageBundle) -> list[tuple[str, str]]:
    from fmedge_runtimes.pipelines.control import control_nets
    from fmedge_runtimes.pipelines.reference import FACTS, PART

    manifest, image = bundle.manifest, bundle.manifest.image
    parts = []
    for name in manifest.graphs:
        size = sum(facts.bytes for file, facts in manifest.files.items() if file.startswith(f"{name}/model.onnx"))
        parts.append(f"{name} {size / 1e6:.1f} MB")
    guidance = f"guidance {image.guidance:g}" if image.guidance > 1 else "no guidance"
    model = [
        ("pipeline", image.pipeline),
        ("parts", ", ".join(parts)),
        *_target_rows(bundle, ""),
        ("makes", f"{image.width}x{image.height} in {image.steps} steps with {guidance}, unless told otherwise"),
    ]
    if image.adapter_scale is not None:
        model.append(("adapter", f"{manifest.source.adapter}, not merged: scale {image.adapter_scale:g} unless told"))
    if (bundle.folder / PART / FACTS).is_file():
        model.append(("reference", "an IP-Adapter: --ip-adapter-image shows it an image"))
    nets = control_nets(manifest.graphs)
    if nets:
        model.append(("control", f"{len(nets)} ControlNet{'s' * (len(nets) > 1)}: --control shows each an image"))
    return _framed(bundle, model)


def _rows(bundle: Bundle) -> list[tuple[str, str]]:
    manifest, text = bundle.manifest, bundle.manifest.text
    source = manifest.source
    sizes = {None: 4 if text.cache_dtype == "float32" else 2, "int8": 1}
    cache = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) * sizes[layer.quantization] for layer in text.caches)
    codes = ", in int8" if any(layer.quantization for layer in text.caches) else ""
    block = f", blocks of {manifest.block_size}" if manifest.block_size and not manifest.matrices else ""
    if manifest.bits_per_weight is not None:
        block += f", {manifest.bits_per_weight:.3f} bits per weight with scales"
    model = [
        ("model", f"{source.architecture}, {len(text.caches)} layers, vocabulary {text.vocabulary}"),
        *_target_rows(bundle, block),
        *_graphs(bundle),
        *_roundings(manifest.matrices or {}),
        ("context", f"{text.context} tokens; the cache takes {cache / 1024:.0f} KiB for each{codes}"),
        ("chat", "has a chat template" if text.chat_template else "no chat template"),
    ]
    if bundle.exporter is not None:
        return [
            ("folder", f"{bundle.folder} ({bundle.nbytes / 1e6:.1f} MB), written by {bundle.exporter}"),
            *model,
            ("tokenizer", text.tokenizer or "no tokenizer.json: prompts are token ids"),
            ("evidence", "none, and no checksums: it is foreign to fmedge, which has compared it with nothing"),
        ]
    return _framed(bundle, model)


def _graphs(bundle: Bundle) -> list[tuple[str, str]]:
    """The two graphs of a bundle that has one for prompts."""
    manifest = bundle.manifest
    if manifest.prefill_precision is None:
        return []
    file = manifest.graphs["decoder"].file
    decoder = sum(facts.bytes for name, facts in manifest.files.items() if name.startswith(file))
    shared = "what they share counts once"
    sizes = (decoder / 1e6, bundle.prefill_nbytes / 1e6)
    return [
        (
            "graphs",
            f"decoder {sizes[0]:.1f} MB, prefill {sizes[1]:.1f} MB more, in {manifest.prefill_precision} ({shared})",
        )
    ]


def _roundings(matrices: dict[str, MatrixFacts]) -> list[tuple[str, str]]:
    """A row for each rounding and the matrices that have it."""
    names: dict[str, list[str]] = {}
    for name, facts in sorted(matrices.items(), key=lambda item: (item[1].bits, -(item[1].block_size or 0))):
        zeros = "" if facts.symmetric else ", zero points"
        shared = "a scale for each output channel" if facts.block_size is None else f"blocks of {facts.block_size}"
        names.setdefault(f"{facts.bits} bits, {shared}{zeros}", []).append(name)
    return [("matrices", f"{rounding}: {_together(having)}") for rounding, having in names.items()]


def _together(names: list[str]) -> str:
    """Names of matrices in a few words: those that differ in a layer's number are one, with all numbers of layers."""
    layers: dict[str, list[int]] = {}
    for name in (re.sub(r"\.weight\b", "", one) for one in names):
        number = re.search(r"\.(\d+)\.", name)
        if number is None:
            layers[name] = []
        else:
            layers.setdefault(name.replace(number[0], ".#."), []).append(int(number[1]))
    return ", ".join(name.replace(".#.", f".{_ranges(numbers)}.") for name, numbers in layers.items())


def _ranges(numbers: list[int]) -> str:
    """Such as 0-2,5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _target_rows(bundle: Bundle | ImageBundle, block: str) -> list[tuple[str, str]]:
    """What a bundle was written for, and how it fills the memory of a device that was named."""
    from fmedge_runtimes.bundle import Bundle
    from fmedge_runtimes.devices import DEVICES
    from fmedge_runtimes.row_cache import parts_of

    manifest = bundle.manifest
    device = None if manifest.device is None else DEVICES.get(manifest.device)
    named = "" if manifest.device is None else f" for {manifest.device}"
    rows = [("target", f"{manifest.target}{named}, quantization {manifest.precision}{block}")]
    if device is not None:
        size = f"weights {bundle.nbytes / 1e9:.2f} GB"
        if isinstance(bundle, Bundle):
            profiles = {profile.name: profile.axes for profile in manifest.graphs["decoder"].profiles}
            count = profiles["decode"]["batch"][2]
            parts = parts_of(bundle.manifest.text, slack=False)
            cache = sum(part.nbytes(count, bundle.manifest.text.context) for part in parts)
            size += f", cache {cache / 1e9:.2f} GB for {count} rows"
        rows.append(("device", f"{device.product}, JetPack {device.jetpack}: {size}, of {device.usable / 1e9:.1f} GB"))
    return rows


def _of_source(evidence: Sequence[Evidence], vocabulary: int) -> list[tuple[str, str]]:
    """A warning where the source finds the evidence's text less likely than any tokens: the evidence says only that a
    bundle computes the same."""
    perplexities = [item.figures.get("source_perplexity", 0) for item in evidence if item.name == "full"]
    return [
        (
            "warning",
            f"the source itself predicts the text worse than guessing among its {vocabulary} tokens does (perplexity "
            f"{perplexity:.4g}): its weights are damaged or untrained, or it is not for such text (--text)",
        )
        for perplexity in perplexities
        if float(perplexity) > vocabulary
    ]


def _framed(bundle: Bundle | ImageBundle, model: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What is known of a model, between where it comes from and what was proven about it."""
    from fmedge_runtimes.bundle import Bundle

    manifest = bundle.manifest
    source = manifest.source
    rows = [
        ("bundle", f"{bundle.folder} ({bundle.nbytes / 1e6:.1f} MB, format {manifest.format})"),
        ("source", source.id + (f" at {source.revision}" if source.revision else "")),
        ("licence", source.licence or "not stated by the source"),
        *model,
    ]
    rows += [(f"evidence ({item.name})", _evidence(item)) for item in manifest.evidence]
    if not manifest.evidence:
        rows.append(("evidence", "none: exported with --verify none"))
    if isinstance(bundle, Bundle):
        rows += _of_source(manifest.evidence, bundle.manifest.text.vocabulary)
    if manifest.forced:
        rows.append(("warning", "written with --force although its evidence spoke against it"))
    rows.append(("made by", ", ".join(f"{name} {version}" for name, version in manifest.made_by.items())))
    return rows


def _evidence(evidence: Evidence) -> str:
    figures = ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in evidence.figures.items()
    )
    # An evaluation has no bounds to pass.
    verdict = "measured" if evidence.name == "eval" else "passed" if evidence.passed else "FAILED"
    return f"{verdict}: {evidence.what}: {figures}"
