"""fmedge: export foundation models to ONNX, quantize them, and run them on edge devices without torch.

    import fmedge

    model = fmedge.load("out/bundle")
    for completion in model.generate(["The list type"], fmedge.Sampling(max_new_tokens=64)):
        print(completion.text)

`fmedge.export` needs the `export` extra; everything else runs on a device. Errors are all `fmedge.FmedgeError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmedge_runtimes.completion import Completion, Delta, FinishReason, Stats, TokenLogprob
from fmedge_runtimes.errors import (
    BackendError,
    BundleDamagedError,
    BundleError,
    BundleFormatError,
    CacheMemoryError,
    DataError,
    ExportError,
    FmedgeError,
    ParityError,
    QueueFullError,
    RequestError,
    SourceError,
    TrainingError,
)
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.version import __version__

if TYPE_CHECKING:
    from fmedge_converters.export import export
    from fmedge_converters.export_options import ExportOptions
    from fmedge_runtimes.load import load
    from fmedge_runtimes.plan import Plan, plan
    from fmedge_runtimes.request import Request
    from fmedge_runtimes.text import TextModel

_LAZY = {
    "load": "fmedge_runtimes.load",
    "Plan": "fmedge_runtimes.plan",
    "plan": "fmedge_runtimes.plan",
    "Request": "fmedge_runtimes.request",
    "TextModel": "fmedge_runtimes.text",
    "export": "fmedge_converters.export",
    "ExportOptions": "fmedge_converters.export_options",
}
"""Names whose modules are heavy: they are imported when they are first used."""

__all__ = [
    "BackendError",
    "BundleDamagedError",
    "BundleError",
    "BundleFormatError",
    "CacheMemoryError",
    "Completion",
    "DataError",
    "Delta",
    "ExportError",
    "ExportOptions",
    "FinishReason",
    "FmedgeError",
    "ParityError",
    "Plan",
    "QueueFullError",
    "Request",
    "RequestError",
    "Sampling",
    "SourceError",
    "Stats",
    "TextModel",
    "TokenLogprob",
    "TrainingError",
    "__version__",
    "export",
    "load",
    "plan",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    if name not in _LAZY:
        raise AttributeError(f"module 'fmedge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
