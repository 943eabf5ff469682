"""A graph of ONNX Runtime with its buffers bound, run step by step as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fmedge_runtimes.cuda_memory import CudaBuffer
from fmedge_runtimes.device import Device
from fmedge_runtimes.host_memory import HostBuffer
from fmedge_runtimes.session import Array, Buffer

NOT_CAPTURED = "-1"
"""The id of steps that are not recorded, in a session that records steps."""


def run_options(ort: Any, graph: str) -> Any:  # noqa: ANN401 - ONNX Runtime is imported only where it is used
    """Options of a run for a captured graph's id, or NOT_CAPTURED."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


class BoundGraph:
    """ONNX Runtime's own binding, with inputs and outputs bound by their addresses. It keeps the buffers alive."""

    def __init__(
        self,
        session: Any,  # noqa: ANN401 - ONNX Runtime is imported only where it is used
        device: Device,
        feeds: Mapping[str, Buffer],
        results: Mapping[str, Buffer],
    ) -> None:
        self._session = session
        self._device = device
        self._binding: Any = session.io_binding()
        self._kept = (feeds, results)
        for name, buffer in feeds.items():
            self._bind(self._binding.bind_input, name, buffer)
        for name, buffer in results.items():
            self._bind(self._binding.bind_output, name, buffer)

    def _bind(self, bind: Any, name: str, buffer: Buffer) -> None:  # noqa: ANN401 - a method of ONNX Runtime's
        if not isinstance(buffer, HostBuffer | CudaBuffer):
            raise TypeError(f"{name} is bound to a buffer of another backend")
        kind, index = self._device.kind, self._device.index
        bind(name, kind, index, buffer.dtype.type, buffer.shape, buffer.address)

    def give(self, feeds: Mapping[str, Array]) -> None:
        """Bind inputs to host arrays, which ONNX Runtime copies if it must."""
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)

    def take(self, results: Mapping[str, Array | Buffer], returned: Sequence[str] = ()) -> None:
        """Bind outputs to arrays or buffers, and those in `returned` to memory that ONNX Runtime makes."""
        for name, result in results.items():
            if isinstance(result, np.ndarray):
                self._binding.bind_output(name, "cpu", 0, result.dtype.type, result.shape, result.ctypes.data)
            else:
                self._bind(self._binding.bind_output, name, result)
        for name in returned:
            self._binding.bind_output(name, "cpu")

    def run(self, options: Any = None) -> None:  # noqa: ANN401 - ONNX Runtime's RunOptions
        """Run once."""
        self._session.run_with_iobinding(self._binding, options)

    def last(self, count: int) -> list[Array]:
        """The outputs that were bound last."""
        # Outputs come in the order in which they were bound first.
        return [output.numpy() for output in self._binding.get_outputs()[-count:]] if count else []
