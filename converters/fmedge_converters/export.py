"""Export a model to a bundle: one function, from a source to a folder that is complete or not there at all.

A folder or repository with model_index.json is a pipeline that makes images (image_export.py), any other a decoder.

export(ExportOptions("path/to/model", Path("out/bundle"), quantize="int4"))
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fmedge_runtimes.bundle import (
    FORMAT,
    Bundle,
    Evidence,
    Golden,
    GraphFacts,
    ImageBundle,
    MatrixFacts,
    SamplingFacts,
    SourceFacts,
    TextFacts,
    TextManifest,
    list_files,
    open_bundle,
    write_manifest,
)
from fmedge_runtimes.chat import ChatTemplate
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.devices import DEVICES
from fmedge_runtimes.errors import ExportError, RequestError, SourceError
from fmedge_runtimes.memory import available_bytes
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.tokenizer import Tokenizer
from transformers import GenerationConfig

from fmedge_converters.build import BuildOptions, BuiltDecoder, Progress, as_they_are, build_decoder
from fmedge_converters.builtin_text import builtin_text
from fmedge_converters.calibration.calibration import Calibration
from fmedge_converters.calibration.model import CalibrationModel
from fmedge_converters.calibration.text import calibration_text
from fmedge_converters.candidates_graph import write_candidates
from fmedge_converters.checkpoint import Checkpoint
from fmedge_converters.decoder import empty_model, find_caches, quiet_libraries, text_config
from fmedge_converters.device_plan import ROWS, STATIC_DEFAULT, decoder_needs, plan_device
from fmedge_converters.evidence import (
    PROMPTS,
    TEXT_TOKENS,
    FullEvidence,
    allocation_evidence,
    estimate_seconds,
    full_evidence,
    graph_evidence,
    layout_evidence,
    output_evidence,
    text_facts,
    weights_evidence,
)
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
from fmedge_converters.export_options import LONGEST_DEFAULT, ExportOptions
from fmedge_converters.first_line import first_line
from fmedge_converters.int8_cache import CALIBRATION_TOKENS, quantize_cache
from fmedge_converters.layouts import find_layout
from fmedge_converters.layouts.layout import Finished, Layout
from fmedge_converters.mixed_precision import candidates
from fmedge_converters.output_folder import flush, sweep, written_aside
from fmedge_converters.pieces import NotLoadedError
from fmedge_converters.profiles import decoder_profiles
from fmedge_converters.reference import open_reference, open_streamed, require_memory
from fmedge_converters.schemes.scheme import Scheme, WeightOptions
from fmedge_converters.sensitivity import Sensitivities, measure_sensitivities
from fmedge_converters.source import Source, is_pipeline, open_source
from fmedge_converters.targets import Target, check_cache, find_scheme, find_target, with_options
from fmedge_converters.tokenizer_files import TokenizerFacts, write_tokenizer

GENERATION_CONFIG = "generation_config.json"
ROOM = 3
"""How many times a written graph must fit into free memory to be run where nothing asks for it."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What a bundle is compared on."""

    prompts: list[list[int]]
    text: list[int]
    calibration: list[int]
    """What follows the text, for scales; the text itself if it is short."""


def export(options: ExportOptions, progress: Progress = lambda *_: None) -> Bundle | ImageBundle:
    """Export a decoder or a pipeline that makes images, and prove the result.

    Raises SourceError (the model), ExportError (options, output, disk), ParityError (the result differs from the
    source). Whatever it raises, the output is as it was before.
    """
    check_cache(find_target(options.target), options.cache)
    sweep(options.output)
    check_output(options)
    if is_pipeline(options.source, options.revision):
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
    layout = find_layout(target, options.layout)
    source = open_source(options.source, options.revision, adapter=options.adapter, allow_pickle=options.allow_pickle)
    size = _require_weights(source)
    parameters = size.parameters
    context, rows = _room(source, size, target, scheme, options, progress)
    check_block_size(scheme, options)
    check_bits(scheme, options)
    check_calibration(scheme, options)
    check_disk(options.output, parameters, scheme.bits if options.bits is None else math.ceil(options.bits))
    if options.verify == "full" or options.bits is not None:
        require_memory(source, parameters, scheme.bits)
    evaluation_text = _evaluation_text(options.text)
    evidence: list[Evidence] = []
    if options.verify != "none":
        evidence.append(graph_evidence(source.config, target, progress))
        judge(evidence[-1], options)
    with written_aside(options.output) as folder:
        tokenizer = write_tokenizer(source.tokenizer_folder, folder, source.tokenizer_gguf)
        if layout is not None and tokenizer is not None:
            layout.check_tokenizer(folder / tokenizer.tokenizer)
        generation = _generation_config(source, folder)
        found = _sensitivities(source, folder, tokenizer, evaluation_text, context, options, progress)
        prepare = as_they_are if found is None else found.attach
        with _calibration(options, source, scheme, folder, tokenizer, context, evaluation_text) as calibration:
            build = BuildOptions(
                target, scheme, options.block_size, context, layout, prepare, options.bits, calibration
            )
            built = build_decoder(source.config, source.files, folder, build, progress)
        evidence[:0] = _of_weights(built, scheme, found)
        if built.calibration is not None:
            evidence.append(built.calibration)
        facts = _text_facts(source, built, tokenizer, generation, context)
        tokens = _evaluation_tokens(evaluation_text, folder, facts.tokenizer, facts.vocabulary, context)
        if options.cache == "int8":
            facts, proof = quantize_cache(built, facts, tokens.calibration, tokens.text, progress)
            evidence.append(proof)
            judge(proof, options)
        goldens: tuple[Golden, ...] = ()
        if options.verify == "full":
            full = _compare(source, built, facts, parameters, tokens, scheme, progress)
            evidence.append(full.evidence)
            goldens = full.goldens
            judge(full.evidence, options)
        elif options.verify == "graph" and _fits(built):
            evidence.append(_run(built, facts, tokens.prompts, progress))
            judge(evidence[-1], options)
        profiles = decoder_profiles(rows, context) if target.engines else ()
        graphs = {"decoder": graph_facts(built.model, built.written.graph, profiles)}
        if target.summarises:
            logits = next(output for output in graphs["decoder"].outputs if output.name == "logits")
            graphs["candidates"] = graph_facts(*write_candidates(folder, facts.vocabulary, logits.dtype))
        if layout is not None:
            finished = Finished(folder, built.written.graph, source.config, generation, facts, target)
            graphs[layout.name], proofs = _lay_out(layout, finished, goldens, progress)
            evidence += proofs
            for proof in proofs:
                judge(proof, options)
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
                parameters=parameters,
            ),
            target=target.name,
            device=device_name(options.target),
            precision=scheme.name,
            block_size=built.quantization.block_size,
            bits_per_weight=built.quantization.bits_per_weight,
            matrices=_matrices(built),
            graphs=graphs,
            text=facts,
            evidence=tuple(evidence),
            golden=goldens,
            forced=not all(item.passed for item in evidence),
            files=list_files(folder, {built.written.data: built.written.data_sha256}),
            made_by=made_by(),
        )
        flush(folder)
        # Last, so that a folder with a manifest is whole.
        write_manifest(folder, manifest)
    return open_bundle(options.output, checksums=False)


@dataclass(frozen=True, slots=True)
class _Size:
    """Numbers of weights."""

    parameters: int
    embedding: int
    vocabulary: int


def _require_weights(source: Source) -> _Size:
    """How large the model is, if the checkpoint has all of it; read from names and shapes, before anything is traced.

    Raises SourceError.
    """
    with Checkpoint(source.files, np.dtype(np.float32)) as checkpoint:
        model = empty_model(source.config, torch.float32)
        checkpoint.weights(model)
        embedding = model.get_input_embeddings().weight
        return _Size(checkpoint.parameters, embedding.numel(), embedding.shape[0])


def _room(
    source: Source, size: _Size, target: Target, scheme: Scheme, options: ExportOptions, progress: Progress
) -> tuple[int, int]:
    """Tokens of a row, and rows of an engine; both as the memory of the device allows, if one is named."""
    context = _context(source, options, STATIC_DEFAULT if target.dialect.static else LONGEST_DEFAULT)
    device = DEVICES.get(options.target)
    if device is None:
        return context, ROWS
    caches = find_caches(source.config, target.dialect, target.dtype, context)
    needs = decoder_needs(caches, target.dtype.itemsize, scheme.bits, size.parameters, size.embedding, size.vocabulary)
    found = plan_device(device, needs, context, asked=options.context is not None)
    progress(f"{device.name} is target {target.name} (JetPack {device.jetpack}); {found}", 0, 0)
    return found.context, found.rows


def _context(source: Source, options: ExportOptions, default: int) -> int:
    text = text_config(source.config)
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if longest is not None and longest < 1:
        longest = None  # how some say that there is no limit
    if options.context is None:
        # A model that states no limit has none: its positions are relative, or it has a state instead.
        return default if longest is None else min(int(longest), default)
    if longest is not None and options.context > longest:
        raise ExportError(f"--context {options.context} is more than the {longest} positions that {source.id} knows.")
    return options.context


@contextmanager
def _calibration(
    options: ExportOptions,
    source: Source,
    scheme: Scheme,
    folder: Path,
    tokenizer: TokenizerFacts | None,
    context: int,
    evaluation_text: str,
) -> Iterator[Calibration | None]:
    """The calibration that a scheme needs, or that was asked for, while its codes are needed. Raises ExportError."""
    asked = bool(options.calibrate) or options.statistics is not None
    if scheme.calibrate is None or not (asked or scheme.needs_calibration):
        yield None
        return
    if tokenizer is None:
        raise ExportError(f"{source.id} has no tokenizer, without which calibration text cannot be read.")
    reader = Tokenizer(folder / tokenizer.tokenizer)
    template = None
    if tokenizer.chat_template is not None:
        template = ChatTemplate((folder / tokenizer.chat_template).read_text("utf-8"), tokenizer.special_tokens)
    compared = reader.encode(evaluation_text)[:TEXT_TOKENS]
    text = calibration_text(options, reader, template, context, compared, evaluation_text)
    model = CalibrationModel(source.config, source.files, context, text.rows)
    # Inside the folder that disappears if the export does.
    with tempfile.TemporaryDirectory(prefix="calibration-", dir=folder) as scratch:
        yield Calibration(model, text, options.statistics, Path(scratch))


def _compare(
    source: Source,
    built: BuiltDecoder,
    facts: TextFacts,
    parameters: int,
    tokens: _Tokens,
    scheme: Scheme,
    progress: Progress,
) -> FullEvidence:
    """Compare what was written with PyTorch on the real weights."""
    seconds = estimate_seconds(parameters)
    progress(f"comparing with PyTorch (about {seconds:.0f} s; --verify graph skips it)", 0, 0)
    with open_reference(source, parameters, facts.context) as reference:
        session = OnnxRuntimeSession(built.written.graph, "cpu", None)
        decoder = Decoder(session, facts)
        full = full_evidence(decoder, reference, tokens.prompts, tokens.text, scheme.name, progress)
        session.close()
    return full


def _fits(built: BuiltDecoder) -> bool:
    """Whether memory is free for the written graph several times over: --verify graph is for small machines, too."""
    free = available_bytes()
    return free is None or built.written.weight_bytes * ROOM < free


def _run(built: BuiltDecoder, facts: TextFacts, prompts: Sequence[Sequence[int]], progress: Progress) -> Evidence:
    """What the written graph says by itself."""
    session = OnnxRuntimeSession(built.written.graph, "cpu", None)
    try:
        return output_evidence(Decoder(session, facts), prompts, progress)
    finally:
        session.close()


def _lay_out(
    layout: Layout, finished: Finished, goldens: Sequence[Golden], progress: Progress
) -> tuple[GraphFacts, list[Evidence]]:
    """Write a layout's files, and compare its graph with the bundle's own where there are golden continuations."""
    graph = finished.folder / layout.graph
    facts = graph_facts(layout.finish(finished), graph)
    if not goldens:
        return facts, []
    progress(f"comparing {graph.name} with {finished.decoder.name}", 0, 0)
    session = layout.open(graph, finished.facts)
    return facts, [layout_evidence(layout.name, session, finished.facts, goldens)]


def _text_facts(
    source: Source,
    built: BuiltDecoder,
    tokenizer: TokenizerFacts | None,
    generation: GenerationConfig,
    context: int,
) -> TextFacts:
    eos = generation.eos_token_id
    if eos is None:
        eos = text_config(source.config).eos_token_id
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos_token_id
    ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(isinstance(token, int) for token in ids):
        raise SourceError(f"{source.id}: eos_token_id is {eos!r}; it must be a token id, or a list of them.")
    # Added tokens may lie beyond the model (an image's place in a text model); a prompt with one is refused.
    if tokenizer is not None and tokenizer.base_size > built.vocabulary:
        raise SourceError(
            f"{source.id}: its tokenizer has {tokenizer.base_size} tokens but the model knows {built.vocabulary}; "
            "the tokenizer belongs to another model."
        )
    return text_facts(built, context).model_copy(
        update={
            "eos_token_ids": tuple(int(token) for token in ids if 0 <= int(token) < built.vocabulary),
            "special_tokens": tokenizer.special_tokens if tokenizer else {},
            "tokenizer": tokenizer.tokenizer if tokenizer else None,
            "chat_template": tokenizer.chat_template if tokenizer else None,
            "sampling": _sampling(source, generation),
        }
    )


def _generation_config(source: Source, folder: Path) -> GenerationConfig:
    if source.files.gguf is not None or not (source.folder / GENERATION_CONFIG).is_file():
        return GenerationConfig()
    try:
        with quiet_libraries():
            generation = GenerationConfig.from_pretrained(source.folder)
    except Exception as error:
        path = source.folder / GENERATION_CONFIG
        raise SourceError(f"{path}: transformers cannot read it: {first_line(error)}") from error
    shutil.copyfile(source.folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    return generation


def _sampling(source: Source, generation: GenerationConfig) -> SamplingFacts:
    """The recommended sampling. Raises SourceError when the runtime would refuse it in every request."""
    try:
        facts = _recommended(generation)
        Sampling(**facts.model_dump())
    except (RequestError, TypeError, ValueError) as error:
        raise SourceError(f"{source.folder / GENERATION_CONFIG}: {first_line(error)}") from error
    return facts


def _recommended(generation: GenerationConfig) -> SamplingFacts:
    """What transformers leaves unsaid counts as its own default."""
    penalty = float(generation.repetition_penalty or 1.0)
    if not generation.do_sample:
        return SamplingFacts(repetition_penalty=penalty)
    return SamplingFacts(
        temperature=float(1.0 if generation.temperature is None else generation.temperature),
        top_k=max(0, int(50 if generation.top_k is None else generation.top_k)),
        top_p=float(1.0 if generation.top_p is None else generation.top_p),
        min_p=float(generation.min_p or 0.0),
        repetition_penalty=penalty,
    )


def _evaluation_tokens(
    evaluation_text: str, folder: Path, tokenizer_file: str | None, vocabulary: int, context: int
) -> _Tokens:
    """Fixed prompts, and a text, as token ids; random ids for a model without a tokenizer."""
    most = TEXT_TOKENS + CALIBRATION_TOKENS
    if tokenizer_file is None:
        random = np.random.default_rng(0)
        draw = [random.integers(0, vocabulary, length).tolist() for length in (1, 17, 5, 30)]
        ids = random.integers(0, vocabulary, most).tolist()
        return _Tokens(draw, ids[:TEXT_TOKENS], ids[TEXT_TOKENS:])
    tokenizer = Tokenizer(folder / tokenizer_file)
    longest = max(1, context // 2)
    prompts = [tokenizer.encode(prompt)[:longest] for prompt in PROMPTS]
    ids = tokenizer.encode(evaluation_text)[:most]
    if len(ids) < 2:
        raise ExportError(f"the text of --text gives {len(ids)} tokens; the comparison needs at least 2.")
    text = ids[:TEXT_TOKENS]
    rest = ids[TEXT_TOKENS:]
    return _Tokens([prompt for prompt in prompts if prompt], text, rest if len(rest) >= TEXT_TOKENS else text)


def _sensitivities(
    source: Source,
    folder: Path,
    tokenizer: TokenizerFacts | None,
    text: str,
    context: int,
    options: ExportOptions,
    progress: Progress,
) -> Sensitivities | None:
    """What each rounding of each matrix costs on other text than the comparison's, if that is long enough; None where
    nothing is to be chosen."""
    if options.bits is None:
        return None
    stage = "measuring what each matrix's rounding costs"
    progress(stage, 0, 0)
    roundings = candidates(symmetric=not options.asymmetric)
    name = tokenizer.tokenizer if tokenizer else None
    try:
        with open_streamed(source, context) as streamed, quiet_libraries():
            vocabulary = streamed.model.get_output_embeddings().weight.shape[0]
            tokens = _evaluation_tokens(text, folder, name, vocabulary, context).calibration
            return measure_sensitivities(streamed, tokens, roundings, functools.partial(progress, stage))
    except NotLoadedError as error:
        raise SourceError(
            f"PyTorch cannot compute this model layer by layer: a layer uses the weights of another ({error}); leave "
            "--bits out."
        ) from error


def _of_weights(built: BuiltDecoder, scheme: Scheme, found: Sensitivities | None) -> list[Evidence]:
    """What became of the weights, where that is not the same for all."""
    kept = [] if built.source_format is None else [weights_evidence(built, scheme)]
    return kept if found is None else [*kept, allocation_evidence(built, found.tokens)]


def _matrices(built: BuiltDecoder) -> dict[str, MatrixFacts] | None:
    """What was chosen for each matrix, if there was a choice."""
    allocation = built.quantization.allocation
    if allocation is None:
        return None
    return {
        matrix.name: MatrixFacts(
            bits=option.rounding.bits, block_size=option.rounding.block_size, symmetric=option.rounding.symmetric
        )
        for matrix, option in zip(allocation.matrices, allocation.chosen, strict=True)
        if option.rounding is not None
    }


def _evaluation_text(path: Path | None) -> str:
    if path is None:
        return builtin_text()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the text {path}: {error}.") from error
