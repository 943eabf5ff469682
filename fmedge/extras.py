"""One sentence for a missing extra, instead of a traceback."""

from __future__ import annotations

from importlib.util import find_spec

from fmedge_runtimes.errors import BackendError

EXPORT = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "accelerate")


def require_export() -> None:
    """Raise BackendError unless what exporting and training need is installed."""
    missing = [name for name in EXPORT if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"exporting needs {', '.join(missing)}, which this environment lacks: pip install 'fmedge[export,cpu]'."
        )


def require_onnx() -> None:
    """Raise BackendError unless what reads graphs is installed."""
    missing = [name for name in ("onnx", "onnx_ir") if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"checking graphs needs {' and '.join(missing)}, which this environment lacks: "
            "pip install onnx-ir (or 'fmedge[export]')."
        )
