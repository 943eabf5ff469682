"""Which backend serves a device. A new backend is a file that implements `session.Session`, and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from fmedge_runtimes.device import parse_device
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.session import Session
from fmedge_runtimes.tensorrt_session import TensorRTSession

Open = Callable[[Path, str, int | None, bool], Session]
"""Opens a graph on a device with a number of threads (None: as the backend likes), with CUDA graphs or without."""

BACKENDS: Mapping[str, Open] = MappingProxyType(
    {
        "cpu": OnnxRuntimeSession,
        "cuda": OnnxRuntimeSession,
        "tensorrt": TensorRTSession,
        "tensorrt-compat": TensorRTSession,
        "rtx": TensorRTSession,
    }
)
"""By kind of device. tensorrt-compat is how a bundle calls what older versions of TensorRT parse."""


def open_session(graph: Path, device: str, threads: int | None, cuda_graphs: bool = False) -> Session:
    """Open a graph on a device such as "cpu" or "cuda:1"; `cuda_graphs` lets a GPU record steady steps.

    Raises BackendError, and RequestError for a number of threads that cannot be.
    """
    if threads is not None and threads < 1:
        raise RequestError(f"threads is {threads}; it must be at least 1.")
    kind = parse_device(device).kind
    if kind not in BACKENDS:
        raise BackendError(f"there is no device {device}; choose one of {', '.join(BACKENDS)}.")
    return BACKENDS[kind](graph, device, threads, cuda_graphs)
