"""Open a bundle and make it a model."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fmedge_runtimes.backends import open_session
from fmedge_runtimes.bundle import open_bundle
from fmedge_runtimes.engine import DEFAULTS, EngineOptions
from fmedge_runtimes.text import TextModel


def load(
    path: str | PathLike[str],
    *,
    device: str | None = None,
    max_batch: int = DEFAULTS.max_batch,
    max_waiting: int = DEFAULTS.max_waiting,
    prefix_reuse: bool = DEFAULTS.prefix_reuse,
    threads: int | None = None,
    checksums: bool = True,
) -> TextModel:
    """Load a bundle.

    `device` is "cpu" or "cuda"; None takes the one that the bundle was exported for. `max_batch` rows are decoded
    together at most. `threads` None leaves the number to the backend. `checksums` reads every byte of the bundle once;
    sizes are compared always.

    Raises BundleError (no bundle, damaged, or of a newer format) and BackendError.
    """
    bundle = open_bundle(Path(path), checksums=checksums)
    graph = bundle.file(bundle.manifest.graphs["decoder"].file)
    session = open_session(graph, device or bundle.manifest.target, threads)
    options = EngineOptions(max_batch=max_batch, max_waiting=max_waiting, prefix_reuse=prefix_reuse)
    return TextModel(bundle, session, options)
