"""Export a text-to-image pipeline of diffusers to a bundle, complete or not there at all."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fmedge_runtimes.bundle import (
    FORMAT,
    MODEL_INDEX,
    Evidence,
    GraphFacts,
    ImageBundle,
    ImageFacts,
    ImageManifest,
    ProfileFacts,
    SourceFacts,
    list_files,
    open_image_bundle,
    write_manifest,
)
from fmedge_runtimes.errors import ExportError, SourceError

from fmedge_converters.export_checks import check_block_size, check_disk, device_name, graph_facts, judge, made_by
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.hub import fetch
from fmedge_converters.image_adapter import ImageAdapter
from fmedge_converters.image_evidence import compare_images
from fmedge_converters.image_facts import image_facts
from fmedge_converters.output_folder import flush, written_aside
from fmedge_converters.part_build import BuiltGraph, PartOptions, build_part
from fmedge_converters.part_evidence import Compared, compare, parts_evidence
from fmedge_converters.parts import find_kind
from fmedge_converters.parts.autoencoders import scale_factor
from fmedge_converters.parts.part import Asked, Call
from fmedge_converters.pipeline_files import check_part_files, write_instruction, write_part_files
from fmedge_converters.pipeline_source import PartSource, PipelineSource, empty_part, loaded_part, open_pipeline
from fmedge_converters.profiles import part_profiles
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Scheme
from fmedge_converters.targets import Target, find_scheme, find_target

Progress = Callable[[str, int, int], None]


def export_pipeline(options: ExportOptions, progress: Progress = lambda *_: None) -> ImageBundle:
    """Export a pipeline and prove its graphs.

    Raises SourceError (the pipeline), ExportError (options, output, disk), ParityError (a graph differs from its
    module). Whatever it raises, the output is as it was before.
    """
    target = find_target(options.target)
    scheme = find_scheme(target, options.quantize, images=True)
    _check_options(options)
    check_block_size(scheme, options)
    source = open_pipeline(options.source, options.revision, prior=options.prior, allow_pickle=options.allow_pickle)
    for part in source.parts:
        check_part_files(part)
    modules = {part.name: empty_part(part) for part in source.parts if part.is_module}
    calls = {part.name: _calls(part, modules[part.name], source) for part in source.parts if part.is_module}
    parameters = sum(value.numel() for module in modules.values() for value in module.parameters())
    check_disk(options.output, parameters, scheme.bits)
    adapter = _adapter(source, modules, options)
    with written_aside(options.output) as folder:
        (folder / MODEL_INDEX).write_text(json.dumps(source.index, indent=2, sort_keys=True) + "\n", "utf-8")
        built: list[BuiltGraph] = []
        compared: dict[str, Compared] = {}
        precisions: dict[str, tuple[str, str]] = {}
        for part in source.parts:
            if not part.is_module:
                write_part_files(part, folder)
                continue
            chosen = _part_options(modules[part.name], target, scheme, adapter, options)
            graphs = build_part(part, modules[part.name], calls[part.name], folder, chosen, progress)
            built += graphs
            for graph in graphs:
                shutil.copyfile(part.folder / "config.json", folder / graph.name / "config.json")
                precisions[graph.name] = (
                    str(chosen.dtype).removeprefix("torch."),
                    chosen.scheme.name if graph.quantized else FLOATING.name,
                )
            if options.verify == "full":
                compared |= _compare(part, graphs, adapter, options, progress)
        evidence: tuple[Evidence, ...] = ()
        if options.verify == "full":
            evidence = (parts_evidence(compared, precisions),)
            judge(evidence[0], options)
        write_instruction(source.pipeline, folder)
        image = image_facts(source, modules)
        profiles_of = functools.partial(_profiles, image=image, modules=modules) if target.engines else lambda _: ()
        manifest = ImageManifest(
            format=FORMAT,
            kind="image",
            source=SourceFacts(
                id=source.id,
                revision=source.revision,
                architecture=source.pipeline,
                licence=source.licence,
                adapter=None if options.adapter is None else Path(options.adapter).name,
            ),
            target=target.name,
            device=device_name(options.target),
            precision=scheme.name,
            block_size=(options.block_size or scheme.block_size) or None,
            graphs={graph.name: _graph_facts(graph, profiles_of(graph)) for graph in built},
            image=image,
            evidence=evidence,
            golden=(),
            forced=False,
            files={},
            made_by=made_by("diffusers"),
        )
        if options.verify == "full":
            progress("comparing images with PyTorch's", 0, 0)
            precision = (str(target.dtype).removeprefix("torch."), scheme.name)
            pictured = compare_images(
                ImageBundle(folder, manifest), source, lambda: _modules(source, adapter, options), precision
            )
            for item in pictured.evidence:
                judge(item, options)
            if pictured.why_not is not None:
                progress(f"images were not compared with PyTorch's: {pictured.why_not}", 0, 0)
            evidence += pictured.evidence
            manifest = manifest.model_copy(update={"evidence": evidence, "golden": pictured.goldens})
        flush(folder)
        forced = not all(item.passed for item in evidence)
        files = list_files(folder, {graph.written.data: graph.written.data_sha256 for graph in built})
        # Last, so that a folder with a manifest is whole.
        write_manifest(folder, manifest.model_copy(update={"forced": forced, "files": files}))
    return open_image_bundle(options.output, checksums=False)


def _check_options(options: ExportOptions) -> None:
    """Refuse what means something for text only."""
    meaningless = {
        "--context": options.context is not None,
        "--text": options.text is not None,
        "--cache int8": options.cache != "float",
        "--layout": options.layout is not None,
        "--verify graph": options.verify == "graph",
    }
    if options.adapter is None and options.adapter_scale != ExportOptions.adapter_scale:
        raise ExportError("--adapter-scale is for --adapter, and there is none; leave it out.")
    for name, given in meaningless.items():
        if given:
            raise ExportError(f"{name} is for decoders of text; {options.source} is a pipeline that makes images.")


def _calls(part: PartSource, module: Any, source: PipelineSource) -> Mapping[str, Call]:  # noqa: ANN401 - any module
    kind = find_kind(part.kind)
    if kind is None:
        raise SourceError(
            f"{source.folder}: fmedge does not know how a {part.kind.__name__} (the part {part.name}) is called; it "
            "exports text and image encoders, autoencoders, and denoisers that take a sample, a timestep and the "
            "states of a text."
        )
    return kind.graphs(module, Asked(part.name, source.pipeline))


def _adapter(source: PipelineSource, modules: Mapping[str, Any], options: ExportOptions) -> ImageAdapter | None:
    if options.adapter is None:
        return None
    path = Path(options.adapter).expanduser()
    if not path.exists():
        path = fetch(options.adapter, None, ["*.json", "*.safetensors"])
    return ImageAdapter(path, source.pipeline, options.adapter_scale, list(modules), modules.get("unet"))


def _part_options(
    module: Any,  # noqa: ANN401 - any module
    target: Target,
    scheme: Scheme,
    adapter: ImageAdapter | None,
    options: ExportOptions,
) -> PartOptions:
    config = getattr(module, "config", None)
    # Autoencoders that say so overflow in fp16, and what they make is the picture itself.
    dtype = torch.float32 if getattr(config, "force_upcast", False) else target.dtype
    chosen = target.image_schemes[FLOATING.name] if _autoencodes(module) else scheme
    return PartOptions(target, dtype, chosen, options.block_size, options.allow_pickle, adapter)


def _compare(
    part: PartSource,
    graphs: list[BuiltGraph],
    adapter: ImageAdapter | None,
    options: ExportOptions,
    progress: Progress,
) -> dict[str, Compared]:
    progress(f"{part.name}: comparing with PyTorch", 0, 0)
    reference = _module(part, adapter, options)
    return {graph.name: compare(reference, graph.call, graph.written.graph) for graph in graphs}


def _module(part: PartSource, adapter: ImageAdapter | None, options: ExportOptions) -> Any:  # noqa: ANN401 - any module
    """The module of a part in fp32, with the adapter merged by PyTorch."""
    module = loaded_part(part, torch.float32, allow_pickle=options.allow_pickle)
    if adapter is not None:
        adapter.merge(part.name, module)
    return module


def _modules(source: PipelineSource, adapter: ImageAdapter | None, options: ExportOptions) -> dict[str, Any]:
    return {part.name: _module(part, adapter, options) for part in source.parts if part.is_module}


def _profiles(graph: BuiltGraph, image: ImageFacts, modules: Mapping[str, Any]) -> tuple[ProfileFacts, ...]:
    """The sizes that an engine of a graph is built for."""
    encoders = {name: module for name, module in modules.items() if _autoencodes(module)}
    factor = next((scale_factor(module) for module in encoders.values()), 1)
    # What encodes an image takes pixels, everything else latents.
    takes_pixels = graph.name.removesuffix("_encoder") in encoders
    return part_profiles(graph.call, image, 1 if takes_pixels else factor)


def _autoencodes(module: Any) -> bool:  # noqa: ANN401 - any module
    return hasattr(module, "encode") and hasattr(module, "decode")


def _graph_facts(graph: BuiltGraph, profiles: tuple[ProfileFacts, ...]) -> GraphFacts:
    facts = graph_facts(graph.model, graph.written.graph, profiles)
    return facts.model_copy(update={"file": f"{graph.name}/{facts.file}"})
