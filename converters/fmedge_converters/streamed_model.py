"""Run a PyTorch model of any size whose weights are never in memory together.

Parameters stay on the meta device; a part of the model gets its weights when it is about to run and loses them when
another one does. Every pass over the parts reads the whole checkpoint, so all rows share one pass: each row runs the
model's own forward in a thread that waits in front of every part, and the parts are loaded one after the other. One
thread runs at a time, each row alone in its batch: the numbers are those of the ordinary model. Embeddings and heads
of large vocabularies are never loaded: their lookups and products read them piece by piece (pieces.py).

Gradients go the same way back: a part keeps its input only, and runs again, with its weights, when its gradient is due.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fmedge_converters.layers import layer_list
from fmedge_converters.pieces import NotLoadedError, Pieces
from fmedge_converters.weight import Weight

PIECES_BYTES = 256 << 20
"""In fp32; what is larger, and in no layer, is read in pieces."""

Consume = Callable[[int, torch.Tensor], None]
"""Takes the number of a row and its logits [S, V], which are gone afterwards."""
Mode = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes what each row's forward runs in."""


class Visitor(Protocol):
    """Looks at each layer while it has its weights, and may change them."""

    def __call__(self, parameters: Mapping[str, torch.nn.Parameter], rehearse: Callable[[], None]) -> None:
        """`parameters` are the layer's, by their names in the model. `rehearse` runs all rows through the layer and
        forgets what comes out; afterwards they run through it as the visitor has left it."""
        ...


Visit = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes the input of a product [B, S, K] and the gradient of its output [B, S, N]."""
VisitLookup = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Takes token ids [B, S], their embeddings [B, S, E] and the gradient of these."""


class StreamedModel:
    """A model whose parameters are on the meta device, and where to read them."""

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Weight]) -> None:
        self._model = model
        self._weights = weights
        self._names = {id(module): name for name, module in model.named_modules()}
        self._pieces = {value: weights[name] for name, value in model.named_parameters(remove_duplicate=False)}
        self._parts: list[torch.nn.Module] = []
        self._divide(parts(model), [*parts(model), *in_pieces(model)])

    def run(self, rows: Sequence[Sequence[int]], consume: Consume) -> None:
        """Compute the logits of each row. Raises what the model or a reader of weights raises, and NotLoadedError when
        one layer uses the weights of another."""
        try:
            self._pass(rows, consume, contextlib.nullcontext)
        except NotLoadedError:
            layers = _layers(self._model)
            if len(layers) == len(self._parts):
                raise
            # Something outside the layers uses the weights of a module without running it, or in ways of its own.
            self._divide(layers, layers)
            self._pass(rows, consume, contextlib.nullcontext)

    @property
    def layers(self) -> int:
        """How many a visitor sees."""
        return len(_layers(self._model))

    def visit(
        self,
        rows: Sequence[Sequence[int]],
        mode: Mode,
        visitor: Visitor,
        head: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """Run the rows, each in a `mode`, through all layers, which a visitor sees in the order in which they run. What
        comes behind the layers does not run, unless `head` is to take the inputs [1, S, K] of the head, whose products
        are never computed. Raises as `run` does."""
        if head is None:
            self._pass(rows, lambda _number, _logits: None, mode, visitor)
            return

        def take(x: torch.Tensor) -> torch.Tensor:
            head(x)
            return x[..., :0]

        with _replaced_forward(self._model.get_output_embeddings(), take):
            self._pass(rows, lambda _number, _logits: None, mode, visitor, beyond=True)

    def run_back(
        self,
        rows: torch.Tensor,
        gradient: Callable[[torch.Tensor], torch.Tensor],
        visits: Mapping[torch.nn.Module, Visit],
        visit_lookup: VisitLookup,
    ) -> None:
        """Run rows [B, S] together and back. `gradient` says, given the logits [B, S, V], what goes back into them;
        `visits` are told, for each module, what went in and what comes back, and `visit_lookup` that of the token
        embedding. Raises as `run` does."""
        try:
            self._pass_back(rows, gradient, visits, visit_lookup)
        except NotLoadedError:
            layers = _layers(self._model)
            if len(layers) == len(self._parts):
                raise
            self._divide(layers, layers)
            self._pass_back(rows, gradient, visits, visit_lookup)

    @property
    def model(self) -> PreTrainedModel:
        """The modules; most parameters are on the meta device."""
        return self._model

    @property
    def weights(self) -> Mapping[str, Weight]:
        """Where to read the parameters, by their names."""
        return self._weights

    def _pass_back(
        self,
        rows: torch.Tensor,
        gradient: Callable[[torch.Tensor], torch.Tensor],
        visits: Mapping[torch.nn.Module, Visit],
        visit_lookup: VisitLookup,
    ) -> None:
        def looked_up(_module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            embeddings = output.detach().clone()  # some models change what they get
            output.requires_grad_()
            output.register_hook(lambda back: visit_lookup(args[0], embeddings, back))  # type: ignore[no-untyped-call]  # torch gives it no type

        begin = self._model.get_input_embeddings().register_forward_hook(looked_up)
        try:
            with contextlib.ExitStack() as stack:
                for module, visit in visits.items():
                    stack.enter_context(_replaced_forward(module, _visited(module, visit)))
                for part in self._parts:
                    stack.enter_context(_replaced_forward(part, self._run_again(part)))
                with torch.enable_grad():
                    with Pieces(self._pieces):
                        logits = self._model(input_ids=rows, use_cache=False).logits
                    logits.backward(gradient(logits.detach()))
        finally:
            begin.remove()

    def _run_again(self, part: torch.nn.Module) -> Callable[..., Any]:
        """The forward of a part, with its weights, once for its output and once more for its gradient."""
        forward = part.forward

        def with_weights(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of any module
            with self._loaded(part), Pieces(self._pieces):
                return forward(*args, **kwargs)

        return lambda *args, **kwargs: checkpoint(with_weights, *args, use_reentrant=False, **kwargs)

    def _divide(self, found: list[torch.nn.Module], later: list[torch.nn.Module]) -> None:
        """Load these parts one by one, and now what is not in a module of `later`."""
        self._parts = found
        inside = {id(parameter) for module in later for parameter in module.parameters()}
        for module in self._model.modules():
            self._fill(module, inside)

    def _pass(
        self,
        rows: Sequence[Sequence[int]],
        consume: Consume,
        mode: Mode,
        visitor: Visitor | None = None,
        *,
        beyond: bool = False,
    ) -> None:
        workers = [_Worker(self._model, row, Pieces(self._pieces), mode()) for row in rows]
        hooks = [part.register_forward_pre_hook(self._wait, with_kwargs=True) for part in self._parts]
        try:
            self._take_turns(workers, consume, visitor, beyond=beyond)
        finally:
            for hook in hooks:
                hook.remove()
            for worker in workers:
                worker.end()

    @staticmethod
    def _wait(part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        worker = threading.current_thread()
        if isinstance(worker, _Worker):
            worker.wait_for(part, args, kwargs)

    def _take_turns(
        self, workers: Sequence[_Worker], consume: Consume, visitor: Visitor | None, *, beyond: bool
    ) -> None:
        order = {part: number for number, part in enumerate(self._parts)}
        layers = set(_layers(self._model))
        last = max((order[layer] for layer in layers), default=-1)
        running = list(enumerate(workers))
        for _, worker in running:
            worker.proceed()
        while running:
            waiting = [worker.part for _, worker in running if worker.part is not None]
            following = min(waiting, key=order.__getitem__, default=None)
            if visitor is not None and not beyond and (following is None or order[following] > last):
                return
            with self._loaded(following) if following is not None else contextlib.nullcontext() as part:
                if visitor is not None and part in layers:
                    here = [worker for _, worker in running if worker.part is part]
                    self._visit(visitor, part, here)
                for number, worker in list(running):
                    while worker.part is not None and worker.part is part:
                        worker.proceed()
                    if worker.part is None:
                        consume(number, worker.result())
                        running.remove((number, worker))

    def _visit(self, visitor: Visitor, layer: torch.nn.Module, workers: Sequence[_Worker]) -> None:
        def rehearse() -> None:
            for worker in workers:
                worker.rehearse()

        visitor(
            {
                f"{self._names[id(module)]}.{name}": parameter
                for module in layer.modules()
                for name, parameter in module.named_parameters(recurse=False)
            },
            rehearse,
        )

    @contextlib.contextmanager
    def _loaded(self, part: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """A part while it has its weights."""
        empty = [item for module in part.modules() for item in self._fill(module, frozenset())]
        try:
            yield part
        finally:
            for module, name, parameter in empty:
                module.register_parameter(name, parameter)

    def _fill(
        self, module: torch.nn.Module, without: Container[int]
    ) -> list[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
        """Give a module's own parameters their values, but those with these ids; returns what was there before."""
        before = []
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta and id(parameter) not in without:
                before.append((module, name, parameter))
                full = f"{self._names[id(module)]}.{name}".removeprefix(".")
                module.register_parameter(name, _read(self._weights[full]))
        return before


@contextlib.contextmanager
def _replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module while it has another forward."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _visited(module: torch.nn.Module, visit: Visit) -> Callable[..., Any]:
    forward = module.forward

    def visited(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of any module
        return _Visited.apply(x, forward(x, *args, **kwargs), visit)  # type: ignore[no-untyped-call]  # torch gives apply no type

    return visited


class _Visited(torch.autograd.Function):
    """The output of a product, unchanged; when its gradient is due, a visit."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, output: torch.Tensor, visit: Visit) -> torch.Tensor:  # noqa: ANN401 - torch's
        """As torch.autograd.Function says."""
        ctx.save_for_backward(x)
        ctx.visit = visit
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:  # noqa: ANN401 - torch's
        """As torch.autograd.Function says."""
        (x,) = ctx.saved_tensors
        ctx.visit(x.detach(), gradient)
        return None, gradient, None


class _Worker(threading.Thread):
    """The forward pass of one row. It runs only while its owner waits for it, and the other way round."""

    def __init__(
        self,
        model: PreTrainedModel,
        row: Sequence[int],
        pieces: Pieces,
        mode: contextlib.AbstractContextManager[object],
    ) -> None:
        super().__init__(daemon=True)
        self.part: torch.nn.Module | None = None
        """The part in front of which it waits; None once it has ended."""
        self._model = model
        self._row = row
        self._pieces = pieces
        self._mode = mode
        self._rehearsing = False
        self._turn = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._cancelled = False
        self._logits: torch.Tensor | None = None
        self._error: BaseException | None = None

    def proceed(self) -> None:
        """Let it run up to the next part, or to the end. Raises what it raises."""
        if self.ident is None:
            self.start()
        else:
            self._turn.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def rehearse(self) -> None:
        """Let it run the part in front of which it waits, and forget the result. Raises what the part raises."""
        self._rehearsing = True
        self.proceed()

    def result(self) -> torch.Tensor:
        """The logits [S, V]; once."""
        if self._logits is None:
            raise RuntimeError("a row without logits")
        logits, self._logits = self._logits, None
        return logits

    def end(self) -> None:
        """Stop it where it waits."""
        if self.is_alive():
            self._cancelled = True
            self._turn.release()
            self.join()

    def wait_for(self, part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called by the thread itself in front of a part, which is about to run with these arguments."""
        self.part = part
        self._pause()
        while self._rehearsing:
            self._rehearsing = False
            # Copies, because some layers add to what they are given.
            part.forward(*_copied(args), **_copied(kwargs))
            self._pause()

    def _pause(self) -> None:
        self._stopped.release()
        self._turn.acquire()
        if self._cancelled:
            raise _Cancelled

    def run(self) -> None:
        """The thread."""
        try:
            with torch.no_grad(), self._pieces, self._mode:
                output: Any = self._model(input_ids=torch.tensor([list(self._row)]), use_cache=False)
            self._logits = output.logits[0]
        except BaseException as error:
            self._error = error
        self.part = None
        self._stopped.release()


class _Cancelled(BaseException):
    """The owner does not need the row any more."""


def _copied(arguments: Any) -> Any:  # noqa: ANN401 - a tree of any arguments
    return tree_map_only(torch.Tensor, torch.Tensor.clone, arguments)


def parts(model: PreTrainedModel) -> list[torch.nn.Module]:
    """What gets its weights at once, in the order in which it runs: the layers, and every module without children
    elsewhere (norms, small embeddings and heads). Parameters of other modules stay in memory."""
    layers = {id(layer) for layer in _layers(model)}
    leaves = {id(leaf) for leaf in _leaves(model)} - {id(leaf) for leaf in in_pieces(model)}
    return [module for module in model.modules() if id(module) in layers | leaves]


def in_pieces(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Embeddings and heads that are too large to be loaded."""
    return [leaf for leaf in _leaves(model) if any(_is_large(parameter) for parameter in leaf.parameters())]


def _is_large(parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() == 2 and parameter.numel() * 4 > PIECES_BYTES


def _leaves(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules with parameters and without children that are in no layer."""
    inside = {id(module) for layer in _layers(model) for module in layer.modules()}
    modules = (module for module in model.modules() if id(module) not in inside)
    return [module for module in modules if not list(module.children()) and list(module.parameters())]


def _layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    listed = layer_list(model)
    return [] if listed is None else list(model.get_submodule(listed).children())


def largest_part(model: PreTrainedModel) -> int:
    """Numbers in the parameters of the part with most of them."""
    return max((sum(parameter.numel() for parameter in part.parameters()) for part in parts(model)), default=0)


def _read(weight: Weight) -> torch.nn.Parameter:
    """A weight as a parameter, read block by block."""
    whole = np.empty(weight.shape, weight.dtype)
    row = 0
    for block in weight.blocks():
        if weight.shape:
            whole[row : row + len(block)] = block
            row += len(block)
        else:
            whole[...] = block
    return torch.nn.Parameter(torch.from_numpy(whole), requires_grad=False)
