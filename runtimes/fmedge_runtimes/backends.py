"""Which backend serves a device. A new backend is a file that implements `session.Session`, and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.session import Session
from fmedge_runtimes.tensorrt_session import TensorRTSession

Open = Callable[[Path, str, int | None], Session]
"""Opens a graph on a device with a number of threads (None: as the backend likes)."""

BACKENDS: Mapping[str, Open] = MappingProxyType(
    {
        "cpu": OnnxRuntimeSession,
        "cuda": OnnxRuntimeSession,
        "tensorrt": TensorRTSession,
        "tensorrt-compat": TensorRTSession,
        "rtx": TensorRTSession,
    }
)
"""By device. Both of TensorRT's run its engines: tensorrt-compat is how a bundle calls what older versions parse."""


def open_session(graph: Path, device: str, threads: int | None) -> Session:
    """Open a graph. Raises BackendError, and RequestError for a number of threads that cannot be."""
    if threads is not None and threads < 1:
        raise RequestError(f"threads is {threads}; it must be at least 1.")
    if device not in BACKENDS:
        raise BackendError(f"there is no device {device}; choose one of {', '.join(BACKENDS)}.")
    return BACKENDS[device](graph, device, threads)
