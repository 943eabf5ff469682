"""TensorRT and TensorRT-RTX: their Python bindings, and what they log.

On a Jetson the bindings are the system's (package python3-libnvinfer), seen from an environment that was made with
`--system-site-packages`; elsewhere they are pip's. Importing them needs no GPU. Constructing a `Runtime` without one
ends the process, so nothing here does: `tensorrt_session` and `fmedge build` ask CUDA first.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fmedge_runtimes.errors import BackendError


@dataclass(frozen=True, slots=True)
class Library:
    """One of the two libraries."""

    name: str
    modules: tuple[tuple[str, ...], ...]
    """Ways to import it: the last module of each is the bindings, those before it load the libraries."""
    install: str


TENSORRT = Library(
    "tensorrt",
    (("tensorrt",),),
    "on a Jetson make the environment with --system-site-packages (apt install python3-libnvinfer), elsewhere "
    "pip install 'tensorrt-cu12>=10.3' or tensorrt-cu13, as the driver needs",
)
RTX = Library(
    "tensorrt_rtx",
    (("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings"), ("tensorrt_rtx",)),
    "pip install 'fmedge[rtx]'",
)
LIBRARIES: Mapping[str, Library] = MappingProxyType({"tensorrt": TENSORRT, "tensorrt-compat": TENSORRT, "rtx": RTX})
"""By device, as BACKENDS names it."""


def import_bindings(library: Library) -> Any:  # noqa: ANN401 - the bindings have no types
    """The bindings' module. Raises BackendError when they are not installed, or do not find their libraries."""
    problems = []
    for names in library.modules:
        try:
            modules = [importlib.import_module(name) for name in names]
        except (ImportError, OSError) as error:
            problems.append(str(error))
        else:
            return modules[-1]
    raise BackendError(f"{library.name} cannot be imported ({'; '.join(problems)}): {library.install}.")


def collecting_logger(trt: Any) -> Any:  # noqa: ANN401 - the bindings have no types
    """A logger whose `errors` are the messages of errors, oldest first, and `warnings` those of warnings.

    Its class can only be made when the bindings are there.
    """

    class Collector(trt.ILogger):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:  # noqa: ANN401 - TensorRT calls it
            level = int(severity)
            if level <= int(trt.ILogger.Severity.WARNING):
                kept = self.errors if level <= int(trt.ILogger.Severity.ERROR) else self.warnings
                kept.append(" ".join(msg.split()))

    return Collector()


def register_plugins(trt: Any, logger: Any) -> None:  # noqa: ANN401 - the bindings have no types
    """Make TensorRT's own plugins known: some operators of ONNX are such, in the parser and in engines."""
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
