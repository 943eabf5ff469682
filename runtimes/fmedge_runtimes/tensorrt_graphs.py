"""Steps as CUDA graphs: a step that comes again with the same shapes and addresses is launched as one piece.

TensorRT's documentation asks for an execution context for each captured graph, left alone from then on: a graph of a
context whose shapes or profile have changed since is undefined. Contexts share their working memory, so one more is
cheap.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fmedge_runtimes.cuda import Cuda
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.tensorrt_step import Step

CAPTURE_AFTER = 3
"""Runs of a step before it is captured: pieces of prompts come in many lengths, and most of them never again."""
MOST = 8
"""Steps that stay captured."""


class Graphs:
    """The captured steps of a session."""

    def __init__(self, cuda: Cuda, new_context: Callable[[], Any], queue: Callable[[Any, Step], None]) -> None:
        """`queue` puts a step on the stream, given a context that knows of it."""
        self._cuda = cuda
        self._new_context = new_context
        self._queue = queue
        self._captured: OrderedDict[int, Step] = OrderedDict()
        self.problem: str | None = None
        """Why steps are not captured; None as long as they can be."""

    def run(self, step: Step) -> bool:
        """Queue a step by its graph, which is captured when it is due; False if it has to go without."""
        if step.graph is not None:
            step.graph.launch()
            self._captured.move_to_end(id(step))
            return True
        step.runs += 1
        if step.runs < CAPTURE_AFTER or self.problem is not None:
            return False
        context = self._new_context()
        step.prepare(context, self._cuda.stream)
        step.address(context)
        # Once for real: this is the step itself, and TensorRT's own setup happens in it.
        self._queue(context, step)
        self._cuda.synchronize()
        try:
            step.graph = self._cuda.capture(lambda: self._queue(context, step))
        except BackendError as error:
            # An engine may have layers that cannot be captured; steps then go one by one, and the reason is kept.
            self.problem = str(error)
        else:
            step.context = context
            self._captured[id(step)] = step
            if len(self._captured) > MOST:
                self._forget(self._captured.popitem(last=False)[1])
        return True

    @staticmethod
    def _forget(step: Step) -> None:
        step.graph = step.context = None
        step.runs = 0

    def clear(self) -> None:
        """Forget all of them."""
        while self._captured:
            self._forget(self._captured.popitem()[1])
