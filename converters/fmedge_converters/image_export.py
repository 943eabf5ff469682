"""Export a text-to-image pipeline of diffusers to a bundle, complete or not there at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fmedge_runtimes.bundle import ImageBundle, list_files, open_image_bundle
from fmedge_runtimes.errors import ExportError, SourceError
from fmedge_runtimes.manifest import (
    FORMAT,
    MODEL_INDEX,
    Evidence,
    GraphFacts,
    ImageFacts,
    ImageManifest,
    ProfileFacts,
    SourceFacts,
    write_manifest,
)

from fmedge_converters.controlnet_source import check_controlnets, is_controlnet, with_controlnets
from fmedge_converters.export_checks import check_block_size, check_disk, device_name, graph_facts, judge, made_by
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.hub import fetch
from fmedge_converters.image_adapter import ImageAdapter
from fmedge_converters.image_calibration import (
    ImageCalibration,
    measure_ranges,
    read_prompts,
    sketched_manifest,
)
from fmedge_converters.image_evidence import Pictured, compare_images
from fmedge_converters.image_facts import image_facts
from fmedge_converters.image_profiles import PipelineParts
from fmedge_converters.ip_adapter import IpAdapter
from fmedge_converters.ip_adapter_source import with_image_encoder, write_processor
from fmedge_converters.kept_adapter import KeptAdapter
from fmedge_converters.output_folder import flush, written_aside
from fmedge_converters.part_build import Adapter, BuiltGraph, PartOptions, build_part
from fmedge_converters.part_evidence import compare, parts_evidence
from fmedge_converters.part_forms import Choice, Form, choose, speed_evidence
from fmedge_converters.parts import find_kind
from fmedge_converters.parts.autoencoders import autoencodes
from fmedge_converters.parts.part import Asked, Call
from fmedge_converters.pipeline_files import check_part_files, write_instruction, write_part_files
from fmedge_converters.pipeline_source import PartSource, PipelineSource, empty_part, loaded_part, open_pipeline
from fmedge_converters.schemes.floating import FLOATING
from fmedge_converters.schemes.scheme import Scheme, WeightOptions
from fmedge_converters.targets import AUTO, Target, find_image_schemes, find_target, with_options

Progress = Callable[[str, int, int], None]
FORMS = ".forms"
"""Where the forms of parts are built, inside the bundle's folder until it is whole."""


def export_pipeline(options: ExportOptions, progress: Progress = lambda *_: None) -> ImageBundle:
    """Export a pipeline and prove its graphs.

    Raises SourceError (the pipeline), ExportError (options, output, disk), ParityError (a graph differs from its
    module). Whatever it raises, the output is as it was before.
    """
    target = find_target(options.target)
    weights = WeightOptions(symmetric=not options.asymmetric)
    schemes = tuple(with_options(target, scheme, weights) for scheme in find_image_schemes(target, options.quantize))
    _check_options(options, schemes)
    for scheme in schemes:
        check_block_size(scheme, options)
    source, file = _source(options)
    modules = {part.name: empty_part(part) for part in source.parts if part.is_module}
    check_controlnets(source, modules)
    calls = {part.name: _calls(part, modules[part.name], source) for part in source.parts if part.is_module}
    parameters = sum(value.numel() for module in modules.values() for value in module.parameters())
    check_disk(options.output, parameters, sum(scheme.bits for scheme in schemes))
    adapters = _adapters(source, modules, file, options)
    prompts = read_prompts(options.calibrate)
    facts = image_facts(source, modules, options.adapter_scale if options.keep_adapter else None)
    planned = PipelineParts(source, facts, target, modules, calls)
    profiles = planned.profiles(planned.reach(options.target, schemes[0].bits, progress)) if target.engines else {}
    with written_aside(options.output) as folder:
        _write_files(source, adapters, folder)
        calibrated = None
        if any(scheme.needs_calibration for scheme in schemes):
            calibrated = calibrate_pipeline(source, facts, calls, adapters, folder, prompts, options, progress)
        choices: list[Choice] = []
        for part in source.parts:
            if not part.is_module:
                continue
            chosen = _part_options(modules[part.name], target, schemes, adapters, options)
            if calibrated is not None:
                chosen = replace(chosen, ranges=calibrated.ranges[part.name])
            choice = _choose(part, modules[part.name], calls[part.name], folder, chosen, adapters, options, progress)
            choice.install(folder)
            choices.append(choice)
        while True:
            manifest = _manifest(source, facts, target, schemes, choices, profiles, options)
            pictures = _pictured(source, folder, manifest, choices, adapters, options, progress)
            if all(item.passed for item in pictures.evidence) or not _step_down(choices, folder, progress):
                break
        for item in (*manifest.evidence, *pictures.evidence):
            judge(item, options)
        calibration = () if calibrated is None else (calibrated.evidence,)
        evidence = (*calibration, *manifest.evidence, *pictures.evidence)
        manifest = manifest.model_copy(update={"evidence": evidence, "golden": pictures.goldens})
        shutil.rmtree(folder / FORMS, ignore_errors=True)
        flush(folder)
        forced = not all(item.passed for item in evidence)
        files = list_files(folder, {graph.written.data: graph.written.data_sha256 for graph in _graphs(choices)})
        # Last, so that a folder with a manifest is whole.
        write_manifest(folder, manifest.model_copy(update={"forced": forced, "files": files}))
    return open_image_bundle(options.output, checksums=False)


def _source(options: ExportOptions) -> tuple[PipelineSource, Path | None]:
    """The pipeline with all that is added to it, and the file of an IP-Adapter. Raises SourceError."""
    source = open_pipeline(options.source, options.revision, prior=options.prior, allow_pickle=options.allow_pickle)
    source = with_controlnets(source, options.controlnets, allow_pickle=options.allow_pickle)
    file = None
    if options.ip_adapter is not None:
        source, file = with_image_encoder(source, options.ip_adapter, allow_pickle=options.allow_pickle)
    for part in source.parts:
        check_part_files(part)
    return source, file


def _write_files(source: PipelineSource, adapters: Sequence[Adapter], folder: Path) -> None:
    """Write what the runtime reads beside the parts that are modules. Raises SourceError."""
    (folder / MODEL_INDEX).write_text(json.dumps(source.index, indent=2, sort_keys=True) + "\n", "utf-8")
    for part in source.parts:
        if not part.is_module:
            write_part_files(part, folder)
    write_instruction(source.pipeline, folder)
    for one in adapters:
        if isinstance(one, IpAdapter):
            one.write_facts(folder)
            write_processor(source, folder)


def calibrate_pipeline(
    source: PipelineSource,
    facts: ImageFacts,
    calls: Mapping[str, Mapping[str, Call]],
    adapters: tuple[Adapter, ...],
    folder: Path,
    prompts: Sequence[str],
    options: ExportOptions,
    progress: Progress,
) -> ImageCalibration:
    """See what goes into the products of all parts while the pipeline makes images. Raises FmedgeError."""
    parts = {part.name: part for part in source.parts if part.is_module}
    with tempfile.TemporaryDirectory(prefix="calibration-", dir=folder) as name:
        sketch = Path(name)
        _write_files(source, adapters, sketch)
        adapted: dict[str, dict[str, Call]] = {}
        for part in parts.values():
            adapted[part.name] = dict(calls[part.name])
            for adapter in adapters:
                adapted[part.name] = {each: adapter.call(part.name, call) for each, call in adapted[part.name].items()}
            for each in adapted[part.name]:
                (sketch / each).mkdir(exist_ok=True)
                shutil.copyfile(part.folder / "config.json", sketch / each / "config.json")
        return measure_ranges(
            ImageBundle(sketch, sketched_manifest(source, facts)),
            adapted,
            lambda part: _module(parts[part], adapters, options),
            prompts,
            sum(map(is_controlnet, source.parts)),
            progress,
        )


def _check_options(options: ExportOptions, schemes: Sequence[Scheme]) -> None:
    """Refuse what means something for text only."""
    meaningless = {
        "--calibrate": bool(options.calibrate) and not any(scheme.needs_calibration for scheme in schemes),
        "--calibrate-chat": options.calibrate_chat,
        "--context": options.context is not None,
        "--text": options.text is not None,
        "--calibrate-tokens": options.calibrate_tokens != ExportOptions.calibrate_tokens,
        "--statistics": options.statistics is not None,
        "--cache int8": options.cache != "float",
        "--head-bits": options.head_bits is not None,
        "--bits": options.bits is not None,
        "--layout": options.layout is not None,
        "--verify graph": options.verify == "graph",
    }
    if options.adapter is None and options.adapter_scale != ExportOptions.adapter_scale:
        raise ExportError("--adapter-scale is for --adapter, and there is none; leave it out.")
    if options.quantize == AUTO and options.verify != "full":
        raise ExportError("--quantize auto takes what holds its tolerance, so it has to compare; leave --verify out.")
    if options.adapter is None and options.keep_adapter:
        raise ExportError("--keep-adapter is for --adapter, and there is none; leave it out.")
    for name, given in meaningless.items():
        if given:
            raise ExportError(f"{name} is for decoders of text; {options.source} is a pipeline that makes images.")


def _calls(part: PartSource, module: Any, source: PipelineSource) -> Mapping[str, Call]:  # noqa: ANN401 - any module
    kind = find_kind(part.kind)
    if kind is None:
        raise SourceError(
            f"{source.folder}: fmedge does not know how a {part.kind.__name__} (the part {part.name}) is called; it "
            "exports text and image encoders, autoencoders, denoisers that take a sample, a timestep and the states "
            "of a text, and ControlNets of Stable Diffusion."
        )
    controlled = part.name == "unet" and any(map(is_controlnet, source.parts))
    return kind.graphs(module, Asked(part.name, source.pipeline, residuals=controlled))


def _adapters(
    source: PipelineSource, modules: Mapping[str, Any], file: Path | None, options: ExportOptions
) -> tuple[Adapter, ...]:
    """The LoRA and the IP-Adapter (`file`) that are asked for. Raises SourceError."""
    found: list[Adapter] = []
    if options.adapter is not None:
        path = Path(options.adapter).expanduser()
        if not path.exists():
            path = fetch(options.adapter, None, ["*.json", "*.safetensors"])
        scale = 1.0 if options.keep_adapter else options.adapter_scale
        lora = ImageAdapter(path, source.pipeline, scale, list(modules), modules.get("unet"))
        found.append(KeptAdapter(lora, options.adapter_scale) if options.keep_adapter else lora)
    if file is not None:
        found.append(IpAdapter(file, modules["unet"], modules["image_encoder"], allow_pickle=options.allow_pickle))
    return tuple(found)


def _part_options(
    module: Any,  # noqa: ANN401 - any module
    target: Target,
    schemes: tuple[Scheme, ...],
    adapters: tuple[Adapter, ...],
    options: ExportOptions,
) -> PartOptions:
    config = getattr(module, "config", None)
    # Autoencoders that say so overflow in fp16, and what they make is the picture itself.
    dtype = torch.float32 if getattr(config, "force_upcast", False) else target.dtype
    floating = target.image_schemes[FLOATING.name]
    return PartOptions(
        target,
        dtype,
        (floating,) if autoencodes(module) else schemes,
        options.block_size,
        options.allow_pickle,
        adapters,
    )


def _choose(
    part: PartSource,
    module: Any,  # noqa: ANN401 - any module
    calls: Mapping[str, Call],
    folder: Path,
    chosen: PartOptions,
    adapters: tuple[Adapter, ...],
    options: ExportOptions,
    progress: Progress,
) -> Choice:
    """Build every form of a part, compare each with the module, and take the fastest that holds."""
    places = [folder / FORMS / scheme.name for scheme in chosen.schemes]
    config = getattr(module, "config", None)
    built = build_part(part, module, calls, places, chosen, progress)
    # What has nothing to quantize has one form.
    count = next((number for number, graphs in enumerate(built) if any(graph.quantized for graph in graphs)), None)
    if count is None:
        built, places = built[:1], places[:1]
    dtype = str(chosen.dtype).removeprefix("torch.")
    forms = []
    reference = None
    if options.verify == "full":
        progress(f"{part.name}: comparing with PyTorch", 0, 0)
        reference = _module(part, adapters, options)
    for scheme, place, graphs in zip(chosen.schemes, places, built, strict=False):
        compared = {
            graph.name: compare(reference, graph.call, graph.written.graph)
            for graph in (graphs if reference is not None else ())
        }
        forms.append(Form(scheme.name, place, tuple(graphs), compared, dtype))
    del reference
    if len(forms) > 1:
        progress(f"{part.name}: measuring {', '.join(form.scheme for form in forms)}", 0, 0)
    choice = choose(part.name, forms, config, part.folder / "config.json")
    if choice.measured:
        progress(f"{part.name}: {_said(choice)}", 0, 0)
    return choice


def _said(choice: Choice) -> str:
    times = ", ".join(
        f"{form.scheme} differs too much" if form.seconds is None else f"{form.scheme} {form.seconds * 1e3:.3g} ms"
        for form in choice.measured
    )
    return f"{choice.chosen.scheme} is taken ({times})"


def _graphs(choices: Sequence[Choice]) -> list[BuiltGraph]:
    return [graph for choice in choices for graph in choice.chosen.graphs]


def _step_down(choices: Sequence[Choice], folder: Path, progress: Progress) -> bool:
    """Take a more precise form of a part; whether there is one.

    Of those in the least precise scheme, by whose tolerance images are judged, it is the one that differs most.
    """
    for choice in sorted(choices, key=lambda choice: (choice.precise, -choice.chosen.error)):
        before = choice.chosen.scheme
        if choice.step_down(folder):
            progress(
                f"{choice.part}: images differ too much, {choice.chosen.scheme} is taken instead of {before}", 0, 0
            )
            return True
    return False


def _manifest(
    source: PipelineSource,
    facts: ImageFacts,
    target: Target,
    schemes: tuple[Scheme, ...],
    choices: Sequence[Choice],
    profiles: Mapping[str, tuple[ProfileFacts, ...]],
    options: ExportOptions,
) -> ImageManifest:
    """Without golden images, and without the files."""
    evidence: list[Evidence] = []
    compared = {name: item for choice in choices for name, item in choice.chosen.compared.items()}
    if options.verify == "full":
        precisions = {
            graph.name: choice.chosen.precision(graph) for choice in choices for graph in choice.chosen.graphs
        }
        evidence.append(parts_evidence(compared, precisions))
    if len(schemes) > 1:
        evidence.append(speed_evidence(choices))
    taken = {choice.chosen.scheme for choice in choices if choice.measured} or {schemes[0].name}
    block_size = (options.block_size or schemes[0].block_size) or None
    return ImageManifest(
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
        precision=taken.pop() if len(taken) == 1 else AUTO,
        block_size=block_size,
        graphs={graph.name: _graph_facts(graph, profiles.get(graph.name, ())) for graph in _graphs(choices)},
        image=facts,
        evidence=tuple(evidence),
        golden=(),
        forced=False,
        files={},
        made_by=made_by("diffusers"),
    )


def _pictured(
    source: PipelineSource,
    folder: Path,
    manifest: ImageManifest,
    choices: Sequence[Choice],
    adapters: tuple[Adapter, ...],
    options: ExportOptions,
    progress: Progress,
) -> Pictured:
    if options.verify != "full":
        return Pictured()
    for item in manifest.evidence:
        judge(item, options)
    progress("comparing images with PyTorch's", 0, 0)
    target = find_target(options.target)
    order = list(target.automatic) if options.quantize == AUTO else [options.quantize]
    # Of the form that is the least precise.
    worst = max((choice.chosen.scheme for choice in choices if choice.chosen.scheme in order), key=order.index)
    precision = (str(target.dtype).removeprefix("torch."), worst)
    pictured = compare_images(
        ImageBundle(folder, manifest), source, lambda: _modules(source, adapters, options), precision
    )
    if pictured.why_not is not None:
        progress(f"images were not compared with PyTorch's: {pictured.why_not}", 0, 0)
    return pictured


def _module(part: PartSource, adapters: tuple[Adapter, ...], options: ExportOptions) -> Any:  # noqa: ANN401 - any module
    """The module of a part in fp32, with the adapters merged by PyTorch."""
    module = loaded_part(part, torch.float32, allow_pickle=options.allow_pickle)
    for adapter in adapters:
        adapter.merge(part.name, module)
    return module


def _modules(source: PipelineSource, adapters: tuple[Adapter, ...], options: ExportOptions) -> dict[str, Any]:
    return {part.name: _module(part, adapters, options) for part in source.parts if part.is_module}


def _graph_facts(graph: BuiltGraph, profiles: tuple[ProfileFacts, ...]) -> GraphFacts:
    facts = graph_facts(graph.model, graph.written.graph, profiles)
    return facts.model_copy(update={"file": f"{graph.name}/{facts.file}"})
