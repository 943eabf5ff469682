"""Steps of the same shape that a GPU records once and replays: CUDA graphs, as ONNX Runtime captures them.

A replay launches the kernels of a step with one call, with the addresses, the shapes and whatever was read on the host
when they were recorded. So each recorded step has memory of its own on the GPU for what goes in and out, and the values
of scalars, which operators read on the host, are a part of what tells steps apart: attention gets the cache's capacity
for total_sequence_length while steps are recorded, and each row's own length on the GPU.

ONNX Runtime runs a step that it records more than once. That does no harm where a step only writes what it has written
already - keys and values at their positions - and would in rolling windows and states that are updated in place:
whoever runs a step says whether it may be recorded.

Recorded steps are gone with their binding, hence when the cache is given other memory. ONNX Runtime keeps its record of
them until the session is closed, so there is a largest number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmedge_runtimes.cuda_memory import CudaBuffer, CudaMemory
from fmedge_runtimes.device import Device
from fmedge_runtimes.onnxruntime_binding import BoundGraph, run_options
from fmedge_runtimes.session import Array, Buffer

WARM_UP = 4
"""A step is recorded when its shape has come so often: recording costs as much as several steps."""
MOST_GRAPHS = 256
"""So many steps are recorded in the life of a session; others run as they are."""
_ALIGNED = 256
"""Inputs begin at multiples of this, as allocations do."""

Key = tuple[object, ...]


class CudaGraphs:
    """What the recorded steps of one session share."""

    def __init__(self, memory: CudaMemory) -> None:
        self.memory = memory
        self.recorded = 0

    def next_id(self) -> str | None:
        """An id that no step of this session has had; None when there were enough."""
        if self.recorded == MOST_GRAPHS:
            return None
        self.recorded += 1
        return str(self.recorded)


class RecordedSteps:
    """The steps of one binding that came often enough."""

    def __init__(
        self,
        ort: Any,  # noqa: ANN401 - ONNX Runtime is imported only where it is used
        session: Any,  # noqa: ANN401 - ONNX Runtime is imported only where it is used
        device: Device,
        graphs: CudaGraphs,
        bound: tuple[Mapping[str, Buffer], Mapping[str, Buffer]],
    ) -> None:
        self._ort = ort
        self._session = session
        self._device = device
        self._graphs = graphs
        self._bound = bound
        self._seen: Counter[Key] = Counter()
        self._steps: dict[Key, RecordedStep] = {}

    def step(self, feeds: Mapping[str, Array], results: Mapping[str, Array | Buffer]) -> RecordedStep | None:
        """The recorded step for inputs and outputs of these shapes; None while it has not come often enough."""
        key = _key(feeds, results)
        found = self._steps.get(key)
        if found is not None:
            return found
        self._seen[key] += 1
        number = self._graphs.next_id() if self._seen[key] > WARM_UP else None
        if number is None:
            return None
        options = run_options(self._ort, number)
        found = RecordedStep(self._session, self._device, self._graphs.memory, self._bound, feeds, results, options)
        self._steps[key] = found
        return found


class RecordedStep:
    """A step with fixed memory on the GPU for what goes in and out: its first run is recorded, the others replay it."""

    def __init__(
        self,
        session: Any,  # noqa: ANN401 - ONNX Runtime is imported only where it is used
        device: Device,
        memory: CudaMemory,
        bound: tuple[Mapping[str, Buffer], Mapping[str, Buffer]],
        feeds: Mapping[str, Array],
        results: Mapping[str, Array | Buffer],
        options: Any,  # noqa: ANN401 - ONNX Runtime's RunOptions
    ) -> None:
        self._memory = memory
        self._options = options
        # All inputs lie in one block, so that one copy brings them.
        sizes = {name: -(-array.nbytes // _ALIGNED) * _ALIGNED for name, array in feeds.items() if array.ndim}
        self._block = memory.allocate((sum(sizes.values()),), np.dtype(np.uint8))
        self._host = np.zeros(self._block.shape, np.uint8)  # [bytes]
        self._places: dict[str, Array] = {}
        inputs, offset = dict(bound[0]), 0
        for name, size in sizes.items():
            array = feeds[name]
            self._places[name] = self._host[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
            inputs[name] = CudaBuffer(self._block.owner, self._block.address + offset, array.shape, array.dtype)
            offset += size
        self._outputs = {
            name: memory.allocate(result.shape, result.dtype)
            for name, result in results.items()
            if isinstance(result, np.ndarray)
        }
        buffers = {name: result for name, result in results.items() if not isinstance(result, np.ndarray)}
        self._graph = BoundGraph(session, device, inputs, {**bound[1], **buffers, **self._outputs})
        # Scalars are read on the host. The copies live as long as the binding that points to them.
        self._graph.give({name: array.copy() for name, array in feeds.items() if not array.ndim})

    def run(self, feeds: Mapping[str, Array], results: Mapping[str, Array | Buffer]) -> None:
        """Run the step with these inputs; the outputs that are host arrays are filled."""
        for name, place in self._places.items():
            place[...] = feeds[name]
        self._memory.write(self._host, self._block)
        self._graph.run(self._options)
        for name, buffer in self._outputs.items():
            result = results[name]
            assert isinstance(result, np.ndarray)
            result[...] = self._memory.read(buffer, 0, math.prod(buffer.shape)).reshape(buffer.shape)


def _key(feeds: Mapping[str, Array], results: Mapping[str, Array | Buffer]) -> Key:
    """What must be the same in a replay as it was when a step was recorded."""
    given = tuple((name, array.shape or array.item()) for name, array in feeds.items())
    taken = tuple(
        (name, result.shape, getattr(result, "address", None) if not isinstance(result, np.ndarray) else None)
        for name, result in results.items()
    )
    return (given, taken)
