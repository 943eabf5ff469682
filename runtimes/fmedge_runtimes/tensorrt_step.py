"""A step of an engine: the profile that its shapes are in, the addresses of its tensors, and what travels with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmedge_runtimes.cuda import CapturedGraph, Cuda, DeviceMemory, PinnedMemory
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.session import Array, TensorSpec

ALIGNMENT = 4096
"""What is staged gets memory in multiples of this, so that a slightly larger step needs no new one."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """The sizes that an engine was built for: the least and the largest shape of each input."""

    number: int
    least: Mapping[str, Shape]
    most: Mapping[str, Shape]

    def holds(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether all these shapes are in it."""
        return all(self.holds_one(name, shape) for name, shape in shapes.items())

    def holds_one(self, name: str, shape: Shape) -> bool:
        """Whether the shape of one input is in it."""
        least, most = self.least[name], self.most[name]
        if len(shape) != len(most):
            return False
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))


def read_profiles(engine: Any, inputs: Sequence[TensorSpec]) -> tuple[Profile, ...]:  # noqa: ANN401 - an ICudaEngine
    """The profiles of an engine."""
    found = []
    for number in range(engine.num_optimization_profiles):
        shapes = {spec.name: engine.get_tensor_profile_shape(spec.name, number) for spec in inputs}
        least = {name: tuple(sizes[0]) for name, sizes in shapes.items()}
        found.append(Profile(number, least, {name: tuple(sizes[2]) for name, sizes in shapes.items()}))
    return tuple(found)


def largest_of(profiles: Sequence[Profile], name: str) -> Shape:
    """The largest size of each axis of an input, over all profiles."""
    return tuple(max(sizes) for sizes in zip(*(profile.most[name] for profile in profiles), strict=True))


def find_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape], rebuild: str) -> Profile:
    """The first profile that holds all shapes. Raises BackendError naming an input that is in none."""
    for profile in profiles:
        if profile.holds(shapes):
            return profile
    name = next(
        (name for name, shape in shapes.items() if not any(each.holds_one(name, shape) for each in profiles)),
        next(iter(shapes)),
    )
    ranges = [
        ", ".join(
            str(low) if low == high else f"{low} to {high}"
            for low, high in zip(each.least[name], each.most[name], strict=True)
        )
        for each in profiles
    ]
    raise BackendError(
        f"{name} is {list(shapes[name])} in this step, and the engine was built for "
        f"{' or '.join(f'[{sizes}]' for sizes in ranges)}; build it for more: {rebuild} with "
        f"{_option(profiles, name, shapes[name])}."
    )


def _option(profiles: Sequence[Profile], name: str, shape: Shape) -> str:
    """What `fmedge build` is told to serve a shape: of rows, of places of an image, or else of a text."""
    outside = [
        axis
        for axis, size in enumerate(shape)
        if not any(each.least[name][axis] <= size <= each.most[name][axis] for each in profiles)
    ]
    if not outside or outside[0] == 0:
        return "--rows (text) or --batch (images)"
    return "--size" if len(shape) == 4 else "--tokens"


@dataclass(slots=True, eq=False)
class Step:
    """One kind of step, prepared once for all steps with the same buffers and shapes."""

    profile: Profile
    shapes: Mapping[str, Shape]
    """Of all inputs."""
    addresses: Mapping[str, int]
    """Of all inputs and outputs."""
    brought: Mapping[str, int]
    """Inputs that are copied to the device, and their bytes."""
    fetched: Mapping[str, tuple[Shape, np.dtype[np.generic]]]
    """Outputs that are copied back."""
    generation: int
    """Of the staging memory that the addresses are in."""
    runs: int = 0
    context: Any = field(default=None)
    """The execution context that its captured graph is of."""
    graph: CapturedGraph | None = None

    def prepare(self, context: Any, stream: int) -> None:  # noqa: ANN401 - an IExecutionContext
        """Tell a context of profile and shapes; raises BackendError if it refuses them."""
        number = self.profile.number
        if context.active_optimization_profile != number and not context.set_optimization_profile_async(number, stream):
            raise BackendError(f"TensorRT refuses optimization profile {number}; report this.")
        for name, shape in self.shapes.items():
            if not context.set_input_shape(name, shape):
                raise BackendError(f"TensorRT refuses {name} as {list(shape)}; report this.")

    def address(self, context: Any) -> None:  # noqa: ANN401 - an IExecutionContext
        """Tell a context where everything lies."""
        for name, address in self.addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(f"TensorRT refuses the address of {name}; report this.")


class Staging:
    """The memory of what a step brings and takes: pinned on the host, and on the device unless that is the same."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._held: dict[str, tuple[PinnedMemory, DeviceMemory | None]] = {}
        self.generation = 0
        """Changes when something gets another address."""

    def reserve(self, name: str, nbytes: int) -> int:
        """The device's address for so many bytes of an input or output. Raises MemoryError."""
        held = self._held.get(name)
        if held is None or held[0].nbytes < nbytes:
            self._held.pop(name, None)
            size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
            # An integrated GPU reads the host's memory where it is.
            device = None if self._cuda.device.integrated else self._cuda.allocate(size)
            held = self._held[name] = self._cuda.allocate_pinned(size), device
            self.generation += 1
        pinned, device = held
        return pinned.device if device is None else device.address

    def fill(self, name: str, array: Array) -> None:
        """Put an input into the pinned memory."""
        self._held[name][0].bytes[: array.nbytes].view(array.dtype)[...] = array.reshape(-1)

    def read(self, name: str, shape: Shape, dtype: np.dtype[np.generic]) -> Array:
        """An output in the pinned memory, until the next step."""
        count = int(np.prod(shape, dtype=np.int64))
        found: Array = self._held[name][0].bytes[: count * dtype.itemsize].view(dtype).reshape(shape)
        return found

    def upload(self, name: str, nbytes: int) -> None:
        """Queue the copy of an input to the device, if there is one."""
        pinned, device = self._held[name]
        if device is not None:
            self._cuda.upload(device.address, pinned.address, nbytes)

    def download(self, name: str, nbytes: int) -> None:
        """Queue the copy of an output to the host, if there is one."""
        pinned, device = self._held[name]
        if device is not None:
            self._cuda.download(pinned.address, device.address, nbytes)

    def clear(self) -> None:
        """Give the memory back."""
        self._held.clear()
        self.generation += 1
