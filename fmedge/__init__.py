"""fmedge: export foundation models to ONNX, quantize them, and run them on edge devices without torch.

    import fmedge

    model = fmedge.load("out/bundle")
    for completion in model.generate(["The list type"], fmedge.Sampling(max_new_tokens=64)):
        print(completion.text)

    model = fmedge.load("out/images")
    for made in model.generate(["a red circle"], fmedge.Diffusion(steps=8, seed=7)):
        made.save("red-circle.png")

`fmedge.export` needs the `export` extra; everything else runs on a device. Errors are all `fmedge.FmedgeError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmedge_runtimes.completion import Completion, Delta, FinishReason, Stats, TokenLogprob
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import (
    BackendError,
    BundleDamagedError,
    BundleError,
    BundleFormatError,
    CacheMemoryError,
    DataError,
    ExportError,
    FmedgeError,
    GenerationCancelledError,
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
    from fmedge_runtimes.generated_image import GeneratedImage, ImageStats, ImageUpdate, sheet_of
    from fmedge_runtimes.image import ImageModel
    from fmedge_runtimes.image_plan import ImagePlan, plan_image
    from fmedge_runtimes.load import load, load_image, load_text
    from fmedge_runtimes.plan import Plan, plan
    from fmedge_runtimes.request import Request
    from fmedge_runtimes.text import TextModel

_LAZY = {
    "load": "fmedge_runtimes.load",
    "load_image": "fmedge_runtimes.load",
    "load_text": "fmedge_runtimes.load",
    "GeneratedImage": "fmedge_runtimes.generated_image",
    "ImageModel": "fmedge_runtimes.image",
    "ImagePlan": "fmedge_runtimes.image_plan",
    "ImageStats": "fmedge_runtimes.generated_image",
    "ImageUpdate": "fmedge_runtimes.generated_image",
    "sheet_of": "fmedge_runtimes.generated_image",
    "plan_image": "fmedge_runtimes.image_plan",
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
    "Diffusion",
    "ExportError",
    "ExportOptions",
    "FinishReason",
    "FmedgeError",
    "GeneratedImage",
    "GenerationCancelledError",
    "ImageModel",
    "ImagePlan",
    "ImageStats",
    "ImageUpdate",
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
    "load_image",
    "load_text",
    "plan",
    "plan_image",
    "sheet_of",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    if name not in _LAZY:
        raise AttributeError(f"module 'fmedge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
