"""The seam between the pipelines and the backends: a graph that runs, and arrays that stay on its device.

A backend implements two protocols. `Buffer` is an array on the device whose address does not change;
`Session` runs the graph. A buffer may be bound as an input and as an output at once: that is how a KV cache
is updated in place. Pipelines know nothing else about a backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (as numpy spells it) and shape of a graph input or output; a str names a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    largest: tuple[int, ...] | None = None
    """The largest sizes that are served, of a graph that was built for some; None: any."""


class Buffer(Protocol):
    """A C-contiguous array on the session's device."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[np.generic]: ...
    def rows(self, start: int, stop: int) -> Buffer:
        """The rows start:stop of axis 0, sharing this buffer's memory."""
        ...


class Binding(Protocol):
    """A session with its buffers bound, once for many steps: what changes from step to step is given to `run`."""

    def run(self, feeds: Mapping[str, Array], results: Mapping[str, Array | Buffer], *, steady: bool = False) -> object:
        """Run the graph once with the inputs that are not bound; the outputs that are not bound fill arrays or buffers.

        `steady` says that steps of these shapes come again and again, and that to run one twice does no harm: then the
        session may record it. Not for several threads at once. Raises BackendError when the graph fails.
        """
        ...


class Session(Protocol):
    """One graph, opened on one device."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def window_slack(self) -> bool:
        """Whether the buffer of a rolling cache may be longer than its window."""
        ...

    @property
    def captures(self) -> bool:
        """Whether steady steps are recorded, so that scalars should be the same in all of them."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Buffer:
        """A zeroed buffer on the device. Raises MemoryError when there is no room."""
        ...

    def copy(self, source: Buffer, target: Buffer, shape: tuple[int, ...] | None = None) -> None:
        """Copy the leading block of that shape, or the one that both buffers have in common."""
        ...

    def read(self, buffer: Buffer, start: int = 0, stop: int | None = None) -> Array:
        """The elements start:stop of a flattened buffer, on the host; good until the next run."""
        ...

    def free_memory(self) -> int | None:
        """Bytes that `allocate` can still hand out on the device; None where the backend cannot tell."""
        ...

    def bind(self, feeds: Mapping[str, Buffer], results: Mapping[str, Buffer]) -> Binding:
        """Bind inputs and outputs to buffers that stay where they are."""
        ...

    def run(self, feeds: Mapping[str, Array | Buffer], results: Mapping[str, Array | Buffer]) -> dict[str, Array]:
        """Run the graph once.

        `feeds` gives every input; `results` binds outputs to buffers, or to host arrays that are filled. The outputs
        that are not bound come back as host arrays. Raises BackendError when the graph fails.
        """
        ...

    def close(self) -> None: ...
