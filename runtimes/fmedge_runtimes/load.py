"""Open a bundle and make it a model."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Literal

from fmedge_runtimes.backends import open_session
from fmedge_runtimes.bundle import Bundle, open_bundle, open_image_bundle
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.device import parse_device
from fmedge_runtimes.engine import DEFAULTS, EngineOptions
from fmedge_runtimes.engine_limits import read_limits
from fmedge_runtimes.errors import DeviceMemoryError, RequestError
from fmedge_runtimes.foreign import find_foreign, open_foreign
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.manifest import TextManifest, read_manifest
from fmedge_runtimes.parts import MODES, MemoryMode, Parts
from fmedge_runtimes.plan import plan, what_fits
from fmedge_runtimes.prefill_graph import PrefillGraph, check_prefill_graph
from fmedge_runtimes.session import Session
from fmedge_runtimes.tensorrt_library import LIBRARIES
from fmedge_runtimes.text import TextModel


def load(
    path: str | PathLike[str],
    *,
    device: str | None = None,
    max_batch: int | None = None,
    max_waiting: int = DEFAULTS.max_waiting,
    memory: int | None = None,
    prefix_reuse: bool = DEFAULTS.prefix_reuse,
    prompt_lookup: bool = DEFAULTS.prompt_lookup,
    prefill_graph: PrefillGraph = "prompts",
    memory_mode: MemoryMode = MODES[0],
    threads: int | None = None,
    cuda_graphs: bool = True,
    checksums: bool = True,
) -> Any:  # noqa: ANN401 - a TextModel or an ImageModel, as the bundle says; a union would fit no call of either
    """Load a `TextModel` from a bundle or foreign decoder that writes text, an `ImageModel` from one for images.

    `load_text` and `load_image` do the same for one kind, with its type; their options are described there. Raises
    RequestError for an option of the other kind, and what they raise.
    """
    if kind_of(path) == "image":
        for name, given, usual in (
            ("max_waiting", max_waiting, DEFAULTS.max_waiting),
            ("prefix_reuse", prefix_reuse, DEFAULTS.prefix_reuse),
            ("prompt_lookup", prompt_lookup, DEFAULTS.prompt_lookup),
            ("prefill_graph", prefill_graph, "prompts"),
            ("cuda_graphs", cuda_graphs, True),
        ):
            if given != usual:
                raise RequestError(f"{name} is an option of models that write text; {path} makes images.")
        return load_image(
            path,
            device=device,
            max_batch=max_batch,
            memory=memory,
            memory_mode=memory_mode,
            threads=threads,
            checksums=checksums,
        )
    if memory_mode != MODES[0]:
        raise RequestError(f"memory_mode is an option of models that make images; {path} writes text.")
    return load_text(
        path,
        device=device,
        max_batch=DEFAULTS.max_batch if max_batch is None else max_batch,
        max_waiting=max_waiting,
        memory=memory,
        prefix_reuse=prefix_reuse,
        prompt_lookup=prompt_lookup,
        prefill_graph=prefill_graph,
        threads=threads,
        cuda_graphs=cuda_graphs,
        checksums=checksums,
    )


def kind_of(path: str | PathLike[str]) -> Literal["text", "image"]:
    """What a folder makes, from its manifest; decoders of other exporters write text. Raises BundleError."""
    if find_foreign(Path(path)) is not None:
        return "text"
    return "text" if isinstance(read_manifest(Path(path)), TextManifest) else "image"


def load_text(
    path: str | PathLike[str],
    *,
    device: str | None = None,
    max_batch: int = DEFAULTS.max_batch,
    max_waiting: int = DEFAULTS.max_waiting,
    memory: int | None = None,
    prefix_reuse: bool = DEFAULTS.prefix_reuse,
    prompt_lookup: bool = DEFAULTS.prompt_lookup,
    prefill_graph: PrefillGraph = "prompts",
    threads: int | None = None,
    cuda_graphs: bool = True,
    checksums: bool = True,
) -> TextModel:
    """Load a text bundle, or a decoder that onnxruntime-genai's builder or optimum exported (docs/interop.md).

    `device` is "cpu", "cuda", "cuda:1" for the second GPU, "tensorrt" or "rtx"; None takes the one that the bundle was
    exported for. `max_batch` rows are decoded together at most; `max_waiting` completions may wait while all are taken,
    later ones are refused. `memory` is what weights, working memory and cache may take together, in bytes (`plan` says
    how that is divided); None: what the GPU, the machine, or the control group of the process, has free when the cache
    grows. With `prefix_reuse` prompts start from what other rows have cached; with `prompt_lookup` a text that repeats
    itself is decoded several tokens at a time while few rows are served. `threads` None leaves the number to the
    backend. `prefill_graph` says what a bundle's second graph serves, if it has one (docs/quantization.md): "prompts",
    "batches" for steps of many rows, too, which then influence each other, or "off", which leaves its memory free. With
    `cuda_graphs` a GPU records the steps that come often, and replays them. `checksums` reads every byte
    of the bundle once; sizes are compared always.

    Raises BundleError (no bundle, damaged, of a newer format, or a foreign decoder that lacks something), BackendError
    (DeviceMemoryError where a GPU has no room for the weights), and RequestError for options that cannot be, or a
    memory in which nothing fits.
    """
    foreign = find_foreign(Path(path))
    session = None
    if foreign is None:
        bundle = open_bundle(Path(path), checksums=checksums)
    else:
        bundle, session = open_foreign(foreign, device, threads)
    options = EngineOptions(
        max_batch=max_batch,
        max_waiting=max_waiting,
        cache_bytes=None if memory is None else _cache_bytes(bundle, max_batch, memory, prefill_graph),
        prefix_reuse=prefix_reuse,
        prompt_lookup=prompt_lookup,
    )
    candidates = None
    if session is None:
        session, candidates = open_graphs(bundle, device, threads, cuda_graphs)
    prefill = open_prefill(bundle, device, threads, prefill_graph)
    return TextModel(bundle, session, options, candidates, prefill, batches=prefill_graph == "batches")


def open_graphs(
    bundle: Bundle, device: str | None, threads: int | None, cuda_graphs: bool
) -> tuple[Session, Session | None]:
    """The decoder of a bundle, and the graph that summarises its logits if they are on a GPU and it has one.

    Raises BackendError.
    """
    device = device or bundle.manifest.target
    graphs = bundle.manifest.graphs
    try:
        decoder = open_session(bundle.file(graphs["decoder"].file), device, threads, cuda_graphs)
    except DeviceMemoryError as error:
        raise DeviceMemoryError(f"{error} {what_fits(bundle, 1, None)}") from error
    if parse_device(device).kind == "cpu" or "candidates" not in graphs:
        return decoder, None
    return decoder, open_session(bundle.file(graphs["candidates"].file), device, threads, cuda_graphs)


def open_prefill(bundle: Bundle, device: str | None, threads: int | None, use: PrefillGraph) -> Session | None:
    """The graph for a bundle's prompts, on the CPU, whose kernels it is for; None if there is none, or it is "off".

    Raises BackendError, and RequestError for a use that cannot be.
    """
    check_prefill_graph(use)
    device = device or bundle.manifest.target
    if use != "off" and "prefill" in bundle.manifest.graphs and parse_device(device).kind == "cpu":
        return open_session(bundle.file(bundle.manifest.graphs["prefill"].file), device, threads)
    if use == "batches":
        raise RequestError(
            f"prefill_graph is 'batches', and {bundle.folder} has no second graph for {device}: export with --target "
            "cpu --quantize int4 --prefill w8a8, or leave it out."
        )
    return None


def open_decoder(
    path: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    prefill_graph: PrefillGraph = "prompts",
    checksums: bool = True,
) -> tuple[Bundle, Decoder]:
    """The decoder of a text bundle, or of another exporter's folder, without an engine around it.

    Close it at the end. Raises BundleError and BackendError as `load_text` does.
    """
    foreign = find_foreign(path)
    if foreign is None:
        bundle = open_bundle(path, checksums=checksums)
        graph = bundle.file(bundle.manifest.graphs["decoder"].file)
        session = open_session(graph, device or bundle.manifest.target, threads, cuda_graphs=False)
    else:
        bundle, session = open_foreign(foreign, device, threads)
    prefill = open_prefill(bundle, device, threads, prefill_graph)
    return bundle, Decoder(session, bundle.manifest.text, None, prefill, batches=prefill_graph == "batches")


def load_image(
    path: str | PathLike[str],
    *,
    device: str | None = None,
    max_batch: int | None = None,
    memory: int | None = None,
    memory_mode: MemoryMode = MODES[0],
    threads: int | None = None,
    checksums: bool = True,
) -> ImageModel:
    """Load an image bundle.

    `device`, `threads` and `checksums` are as for `load_text`. `max_batch` images are denoised together at most; None:
    4, or as many fewer as fit. `memory` is what all of it may take, in bytes (`plan_image` says how that is divided);
    None: what the machine, or the control group of the process, has free. With `memory_mode` "sequential" each part is
    loaded when its turn comes, and freed behind it: the largest part has to fit, not all of them.

    Raises BundleError (no bundle, damaged, of a newer format, or with a part missing), BackendError, and RequestError
    for options that cannot be, or a memory in which nothing fits.
    """
    bundle = open_image_bundle(Path(path), checksums=checksums)
    device = device or bundle.manifest.target

    kind = parse_device(device).kind

    def open_part(name: str) -> Session:
        # Of a denoiser's engine all steps are alike; ONNX Runtime records steps of bound buffers only.
        return open_session(bundle.file(bundle.manifest.graphs[name].file), device, threads, kind in LIBRARIES)

    limits = read_limits(bundle, kind)
    axes = {} if limits is None else limits.axes
    parts = Parts(bundle.folder, frozenset(bundle.manifest.graphs), open_part, memory_mode, axes)
    model = ImageModel(bundle, parts, max_batch=max_batch, memory=memory, limits=limits)
    parts.load()
    return model


def _cache_bytes(bundle: Bundle, rows: int, memory: int, prefill_graph: PrefillGraph) -> int:
    """What is left for the cache. Raises RequestError when not even a short row fits."""
    prefill = prefill_graph != "off"
    longest = plan(bundle, 1, memory=memory, prefill=prefill).largest_context
    if not longest:
        least = plan(bundle, 1, 1, prefill=prefill)
        weights = least.weights + least.prefill
        if least.prefill and plan(bundle, 1, memory=memory, prefill=False).largest_context:
            raise RequestError(
                f"{bundle.folder} fits in {memory / 2**20:.0f} MiB only without its graph for prompts, which takes "
                f"{least.prefill / 2**20:.0f} MiB; load it with prefill_graph 'off', or allow more."
            )
        raise RequestError(
            f"{bundle.folder} needs {least.total / 2**20:.0f} MiB for one short row, {weights / 2**20:.0f} MiB of it "
            f"weights, and memory allows {memory / 2**20:.0f} MiB; allow more, or export with fewer bits."
        )
    one, all_rows = (plan(bundle, count, longest, prefill=prefill) for count in (1, rows))
    # One row that fits is served, even if the logits of all rows leave nothing for it.
    return max(memory - all_rows.weights - all_rows.prefill - all_rows.working, one.cache + one.states)
