"""A `Session` over a part's PyTorch module, so that a pipeline of the runtime runs it as it runs the part's graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import numpy as np
import torch
from fmedge_runtimes.session import Array, Buffer, TensorSpec

from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.part_evidence import random_inputs
from fmedge_converters.parts.part import Call

SMALL = {"batch": 1, "height": 16, "width": 16, "sequence": 8, "image_sequence": 16, "steps": 1}
"""Sizes of a call that is made to see which outputs there are."""


class ModuleSession:
    """One call of a module in fp32."""

    window_slack = False
    captures = False

    def __init__(
        self,
        module: Any,  # noqa: ANN401 - any module
        call: Call,
        watched: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`watched` makes the context in which every run takes place."""
        self._module, self._call, self._watched = module, call, watched
        self.inputs = tuple(
            TensorSpec(item.name, "int64" if item.integer else "float32", item.dims) for item in call.inputs
        )
        example = self._run(random_inputs(call, SMALL, np.random.default_rng(0)))
        self.outputs = tuple(
            TensorSpec(name, "float32", tuple(f"{name}.{axis}" for axis in range(value.ndim)))
            for name, value in example.items()
        )

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with quiet_libraries(), torch.no_grad():
            given = {name: torch.from_numpy(np.array(value)) for name, value in feeds.items()}
            found = self._call.run(self._module, given)
        return {name: value.detach().float().numpy() for name, value in found.items()}

    def run(self, feeds: Mapping[str, Array | Buffer], results: Mapping[str, Array | Buffer]) -> dict[str, Array]:
        """Run the module once; see `Session.run`."""
        with self._watched():
            found = self._run({name: value for name, value in feeds.items() if isinstance(value, np.ndarray)})
        for name, value in results.items():
            if isinstance(value, np.ndarray):
                value[...] = found.pop(name)
        return found

    def _nothing(self, *_: object) -> NoReturn:
        raise NotImplementedError("parts of image pipelines have no buffers on a device")

    allocate = copy = read = bind = _nothing

    def free_memory(self) -> None:
        """Unknown."""

    def close(self) -> None:
        """Let the module go."""
        self._module = None
