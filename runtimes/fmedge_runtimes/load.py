"""Open a bundle and make it a model."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fmedge_runtimes.backends import open_session
from fmedge_runtimes.bundle import Bundle, open_bundle
from fmedge_runtimes.engine import DEFAULTS, EngineOptions
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.foreign import find_foreign, open_foreign
from fmedge_runtimes.plan import plan
from fmedge_runtimes.text import TextModel


def load(
    path: str | PathLike[str],
    *,
    device: str | None = None,
    max_batch: int = DEFAULTS.max_batch,
    max_waiting: int = DEFAULTS.max_waiting,
    memory: int | None = None,
    prefix_reuse: bool = DEFAULTS.prefix_reuse,
    prompt_lookup: bool = DEFAULTS.prompt_lookup,
    threads: int | None = None,
    checksums: bool = True,
) -> TextModel:
    """Load a bundle, or a decoder that onnxruntime-genai's builder or optimum exported (docs/interop.md).

    `device` is "cpu" or "cuda"; None takes the one that the bundle was exported for. `max_batch` rows are decoded
    together at most; `max_waiting` completions may wait while all are taken, later ones are refused. `memory` is what
    weights, working memory and cache may take together, in bytes (`plan` says how that is divided); None: what the
    machine, or the control group of the process, has free when the cache grows. With `prefix_reuse` prompts start from
    what other rows have cached; with `prompt_lookup` a text that repeats itself is decoded several tokens at a time
    while few rows are served. `threads` None leaves the number to the backend. `checksums` reads every byte of the
    bundle once; sizes are compared always.

    Raises BundleError (no bundle, damaged, of a newer format, or a foreign decoder that lacks something), BackendError,
    and RequestError for options that cannot be, or a memory in which nothing fits.
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
        cache_bytes=None if memory is None else _cache_bytes(bundle, max_batch, memory),
        prefix_reuse=prefix_reuse,
        prompt_lookup=prompt_lookup,
    )
    if session is None:
        graph = bundle.file(bundle.manifest.graphs["decoder"].file)
        session = open_session(graph, device or bundle.manifest.target, threads)
    return TextModel(bundle, session, options)


def _cache_bytes(bundle: Bundle, rows: int, memory: int) -> int:
    """What is left for the cache. Raises RequestError when not even a short row fits."""
    longest = plan(bundle, 1, memory=memory).largest_context
    if not longest:
        least = plan(bundle, 1, 1)
        raise RequestError(
            f"{bundle.folder} needs {least.total / 2**20:.0f} MiB for one short row, {least.weights / 2**20:.0f} MiB "
            f"of it weights, and memory allows {memory / 2**20:.0f} MiB; allow more, or export with fewer bits."
        )
    one, all_rows = plan(bundle, 1, longest), plan(bundle, rows, longest)
    # One row that fits is served, even if the logits of all rows leave nothing for it.
    return max(memory - all_rows.weights - all_rows.working, one.cache + one.states)
