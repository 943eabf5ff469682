"""Export a model to a bundle: one function, from a source to a folder that is complete or not there at all.

A folder or repository with model_index.json is a pipeline that makes images (image_export.py), any other a decoder.

export(ExportOptions("path/to/model", Path("out/bundle"), quantize="int4"))
"""

from __future__ import annotations

import math
from pathlib import Path

from fmedge_runtimes.bundle import Bundle, ImageBundle, list_files, open_bundle
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.manifest import (
    FORMAT,
    Evidence,
    GraphFacts,
    MatrixFacts,
    ProfileFacts,
    SourceFacts,
    TextFacts,
    TextManifest,
    write_manifest,
)

from fmedge_converters.build import BuildOptions, BuiltDecoder, Progress, Second, as_they_are, build_decoder
from fmedge_converters.candidates_graph import write_candidates
from fmedge_converters.compared_tokens import compared_text, compared_tokens
from fmedge_converters.decoder_facts import decoder_facts, write_generation_config
from fmedge_converters.decoder_proof import lay_out, prove_decoder
from fmedge_converters.evidence import allocation_evidence, graph_evidence, weights_evidence
from fmedge_converters.export_checks import (
    check_bits,
    check_block_size,
    check_calibration,
    check_disk,
    check_output,
    device_name,
    graph_facts,
    judge,
    made_by,
)
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.fitted_weights import find_sensitivities, looks_at_text, opened_calibration
from fmedge_converters.int8_cache import quantize_cache
from fmedge_converters.layouts import find_layout
from fmedge_converters.layouts.layout import Finished
from fmedge_converters.model_size import ModelSize, require_weights, room
from fmedge_converters.output_folder import flush, sweep, written_aside
from fmedge_converters.prefill import check_rows, find_prefill
from fmedge_converters.profiles import decoder_profiles
from fmedge_converters.reference import require_memory
from fmedge_converters.schemes.scheme import Scheme, WeightOptions
from fmedge_converters.sensitivity import Sensitivities
from fmedge_converters.source import Source, is_pipeline, open_source
from fmedge_converters.targets import Target, check_cache, find_scheme, find_target, with_options
from fmedge_converters.tokenizer_files import write_tokenizer


def export(options: ExportOptions, progress: Progress = lambda *_: None) -> Bundle | ImageBundle:
    """Export a decoder or a pipeline that makes images, and prove the result.

    Raises SourceError (the model), ExportError (options, output, disk), ParityError (the result differs from the
    source). Whatever it raises, the output is as it was before.
    """
    check_cache(find_target(options.target), options.cache)
    sweep(options.output)
    check_output(options)
    if is_pipeline(options.source, options.revision):
        if options.prefill is not None:
            raise ExportError("--prefill is for decoders, which read prompts; pipelines that make images have none.")
        from fmedge_converters.image_export import export_pipeline

        return export_pipeline(options, progress)
    if options.prior is not None:
        raise ExportError("--prior is for pipelines that make images in two stages; leave it out.")
    if options.keep_adapter:
        raise ExportError("--keep-adapter is for pipelines that make images; leave it out.")
    if options.ip_adapter is not None:
        raise ExportError("--ip-adapter is for pipelines that make images; leave it out.")
    if options.controlnets:
        raise ExportError("--controlnet is for pipelines that make images; leave it out.")
    if options.adapter_scale != ExportOptions.adapter_scale:
        raise ExportError("--adapter-scale is for pipelines that make images; a PEFT folder says its own scale.")
    return export_decoder(options, progress)


def export_decoder(options: ExportOptions, progress: Progress = lambda *_: None) -> Bundle:
    """Export a decoder and prove the result.

    Raises SourceError (the model), ExportError (options, output, disk), ParityError (the result differs from the
    source). Whatever it raises, the output is as it was before.
    """
    target = find_target(options.target)
    weights = WeightOptions(symmetric=not options.asymmetric, head_bits=options.head_bits)
    scheme = with_options(target, find_scheme(target, options.quantize), weights)
    prefill = find_prefill(target, scheme, options.prefill)
    layout = find_layout(target, options.layout)
    source = open_source(options.source, options.revision, adapter=options.adapter, allow_pickle=options.allow_pickle)
    size = require_weights(source)
    context, rows = room(source, size, target, scheme, options, progress)
    _check(scheme, prefill, source, size, options)
    text = compared_text(options.text)
    evidence: list[Evidence] = []
    if options.verify != "none":
        evidence.append(graph_evidence(source.config, target, progress))
        judge(evidence[-1], options)
    with written_aside(options.output) as folder:
        tokenizer = write_tokenizer(source.tokenizer_folder, folder, source.tokenizer_gguf)
        if layout is not None and tokenizer is not None:
            layout.check_tokenizer(folder / tokenizer.tokenizer)
        generation = write_generation_config(source, folder)
        found = find_sensitivities(source, scheme, folder, tokenizer, text, context, options, progress)
        schemes = (scheme,) if prefill is None else (scheme, prefill)
        prepare = as_they_are if options.bits is None or found is None else found.attach
        with opened_calibration(options, source, schemes, folder, tokenizer, context, text, found) as calibration:
            fits = calibration if looks_at_text(scheme, options) else None
            second = None if prefill is None else Second(prefill, calibration)
            build = BuildOptions(
                target, scheme, options.block_size, context, layout, prepare, options.bits, fits, second
            )
            built = build_decoder(source.config, source.files, folder, build, progress)
        if built.prefill is not None:
            check_rows(built.prefill.model.graph)
        evidence[:0] = _of_weights(built, scheme, found)
        facts = decoder_facts(source, built, tokenizer, generation, context)
        tokens = compared_tokens(text, folder, facts.tokenizer, facts.vocabulary, context)
        if options.cache == "int8":
            facts, proof = quantize_cache(built, facts, tokens.calibration, tokens.text, progress)
            evidence.append(proof)
            judge(proof, options)
        proofs, goldens = prove_decoder(source, size.parameters, built, facts, tokens, scheme, options, progress)
        graphs = _graphs(built, folder, facts, target, decoder_profiles(rows, context) if target.engines else ())
        if layout is not None:
            finished = Finished(folder, built.written.graph, source.config, generation, facts, target)
            graphs[layout.name], more = lay_out(layout, finished, goldens, progress)
            proofs += more
        for proof in proofs:
            judge(proof, options)
        evidence += proofs
        manifest = TextManifest(
            format=FORMAT,
            kind="text",
            source=SourceFacts(
                id=source.id,
                revision=source.revision,
                architecture=source.architecture,
                licence=source.licence,
                adapter=source.adapter,
                quantization=built.source_format,
                parameters=size.parameters,
            ),
            target=target.name,
            device=device_name(options.target),
            precision=scheme.name,
            block_size=built.quantization.block_size,
            bits_per_weight=built.quantization.bits_per_weight,
            prefill_precision=options.prefill,
            matrices=_matrices(built),
            graphs=graphs,
            text=facts,
            evidence=tuple(evidence),
            golden=goldens,
            forced=not all(item.passed for item in evidence),
            files=list_files(folder, {each.written.data: each.written.data_sha256 for each in built.graphs}),
            made_by=made_by(),
        )
        flush(folder)
        # Last, so that a folder with a manifest is whole.
        write_manifest(folder, manifest)
    return open_bundle(options.output, checksums=False)


def _check(scheme: Scheme, prefill: Scheme | None, source: Source, size: ModelSize, options: ExportOptions) -> None:
    """What can be refused before anything is traced."""
    check_block_size(scheme, options)
    check_bits(scheme, options)
    check_calibration(scheme, prefill, options)
    check_disk(options.output, size.parameters, scheme.bits if options.bits is None else math.ceil(options.bits))
    if options.verify == "full" or options.bits is not None:
        require_memory(source, size.parameters, scheme.bits)


def _graphs(
    built: BuiltDecoder, folder: Path, facts: TextFacts, target: Target, profiles: tuple[ProfileFacts, ...]
) -> dict[str, GraphFacts]:
    """The graphs of the bundle; what summarises logits is written here."""
    graphs = {
        name: graph_facts(graph.model, graph.written.graph, profiles)
        for name, graph in zip(("decoder", "prefill"), built.graphs, strict=False)
    }
    if target.summarises:
        logits = next(output for output in graphs["decoder"].outputs if output.name == "logits")
        graphs["candidates"] = graph_facts(*write_candidates(folder, facts.vocabulary, logits.dtype))
    return graphs


def _of_weights(built: BuiltDecoder, scheme: Scheme, found: Sensitivities | None) -> list[Evidence]:
    """What became of the weights, where that is not the same for all."""
    found_out = [] if built.source_format is None else [weights_evidence(built, scheme)]
    if found is not None and built.allocation is not None:
        found_out.append(allocation_evidence(built, found.tokens))
    return found_out if built.calibration is None else [*found_out, built.calibration]


def _matrices(built: BuiltDecoder) -> dict[str, MatrixFacts] | None:
    """What was chosen for each matrix, if there was a choice."""
    allocation = built.allocation
    if allocation is None:
        return None
    return {
        matrix.name: MatrixFacts(
            bits=option.rounding.bits,
            block_size=option.rounding.block_size or None,
            symmetric=option.rounding.symmetric,
        )
        for matrix, option in zip(allocation.matrices, allocation.chosen, strict=True)
        if option.rounding is not None
    }
