"""A decoder's graph of another exporter, as the graph of a bundle: the same steps in, the same logits out.

Such graphs differ from a bundle's in what a step feeds them: an attention mask [B, T] in place of lengths, and logits
of every position, or of each row's last one. Their caches are of one of two kinds. *In place*, as a bundle's: the graph
writes into the buffers that it reads. *Growing*: the graph reads the past [B, K, P, D] and returns it with the new
tokens behind it [B, K, P + S, D]; then the buffers lie in host memory, and a step takes the past out of them and puts
the new tokens in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.host_memory import HostBuffer
from fmedge_runtimes.manifest import CacheFacts
from fmedge_runtimes.session import Array, Binding, Buffer, Session, TensorSpec

Ids = npt.NDArray[np.int64]
GROWING_COPIES = 3
"""A growing cache exists so often during a step: in the buffers, as the past, and as what the graph returns."""


@dataclass(frozen=True, slots=True)
class GraphNames:
    """What a graph calls its inputs and outputs; %d stands for a layer. The defaults are what most exporters write."""

    input_ids: str = "input_ids"
    attention_mask: str = "attention_mask"
    position_ids: str = "position_ids"
    branch: str = "use_cache_branch"
    """Whether there is a past, in graphs merged of one that takes a past and one that does not."""
    past_key: str = "past_key_values.%d.key"
    past_value: str = "past_key_values.%d.value"
    logits: str = "logits"
    present_key: str = "present.%d.key"
    present_value: str = "present.%d.value"


@dataclass(frozen=True, slots=True)
class ForeignGraph:
    """What is known of a graph."""

    names: GraphNames
    caches: tuple[CacheFacts, ...]
    cache_dtype: Literal["float32", "float16"]
    vocabulary: int
    in_place: bool
    last_only: bool
    """The logits are [B, 1, V], of each row's last token."""
    extends: bool = False
    """Several new tokens on top of a past give what they give one by one; foreign_check.py finds out."""
    ragged: bool = False
    """Rows of different lengths can be decoded together; foreign_check.py finds out."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The keys, or the values, of one layer: their names in a bundle's graph without the prefix, and in this one."""

    name: str
    past: str
    present: str
    heads: int
    size: int


class ForeignSession:
    """Implements `session.Session` with the inputs and outputs of docs/bundle.md over a foreign graph's session."""

    def __init__(self, session: Session, graph: ForeignGraph) -> None:
        self.graph = graph
        self._session = session
        self._dtypes = {spec.name: np.dtype(spec.dtype) for spec in (*session.inputs, *session.outputs)}
        self._parts = tuple(_parts(graph))
        self.window_slack = session.window_slack
        # A step is several runs where the graph wants it so.
        self.captures = False
        self.inputs = (
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("logits_indices", "int64", ("logits",)),
            TensorSpec("seqlens_k", "int32", ("batch",)),
            TensorSpec("total_sequence_length", "int32", ()),
            *self._caches("past_key_values"),
        )
        logits = TensorSpec("logits", str(self._dtypes[graph.names.logits]), ("logits", graph.vocabulary))
        self.outputs = (logits, *self._caches("present"))

    def _caches(self, prefix: str) -> Iterator[TensorSpec]:
        for part in self._parts:
            shape = ("batch", part.heads, "capacity", part.size)
            yield TensorSpec(f"{prefix}.{part.name}", str(self._dtypes[part.past]), shape)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Buffer:
        """A zeroed buffer, in host memory if the caches grow. Raises MemoryError."""
        return self._session.allocate(shape, dtype) if self.graph.in_place else HostBuffer(np.zeros(shape, dtype))

    def copy(self, source: Buffer, target: Buffer, shape: tuple[int, ...] | None = None) -> None:
        """Copy the leading block of that shape, or the one that both buffers have in common."""
        if self.graph.in_place:
            self._session.copy(source, target, shape)
            return
        block = tuple(map(slice, map(min, source.shape, target.shape) if shape is None else shape))
        _host(target)[block] = _host(source)[block]

    def read(self, buffer: Buffer, start: int = 0, stop: int | None = None) -> Array:
        """The elements start:stop of a flattened buffer, on the host."""
        return self._session.read(buffer, start, stop) if self.graph.in_place else _host(buffer).reshape(-1)[start:stop]

    def free_memory(self) -> int | None:
        """Bytes that `allocate` can still hand out; where the caches grow, a step needs more beside each."""
        free = self._session.free_memory()
        return free if free is None or self.graph.in_place else free // GROWING_COPIES

    def bind(self, feeds: Mapping[str, Buffer], results: Mapping[str, Buffer]) -> ForeignBinding:
        """Bind the caches; inputs and outputs are the same buffers."""
        del results
        buffers = {part.name: feeds[f"past_key_values.{part.name}"] for part in self._parts}
        return ForeignBinding(self._session, self.graph, self._dtypes, self._parts, buffers)

    def run(self, feeds: Mapping[str, Array | Buffer], results: Mapping[str, Array | Buffer]) -> dict[str, Array]:
        """Run one step; see `Session.run`. Every output is bound."""
        buffers = {name: value for name, value in feeds.items() if not isinstance(value, np.ndarray)}
        arrays = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        self.bind(buffers, {}).run(arrays, {"logits": np.asarray(results["logits"])})
        return {}

    def close(self) -> None:
        """Give the session's memory back."""
        self._session.close()


class ForeignBinding:
    """A foreign graph over the buffers [B, K, C, D] of some rows; implements `session.Binding`."""

    def __init__(
        self,
        session: Session,
        graph: ForeignGraph,
        dtypes: Mapping[str, np.dtype[np.generic]],
        parts: Sequence[_Part],
        buffers: Mapping[str, Buffer],
    ) -> None:
        self._session = session
        self._graph = graph
        self._dtypes = dtypes
        self._parts = parts
        self._buffers = buffers
        self._bound: dict[tuple[int, int], Binding] = {}

    def run(self, feeds: Mapping[str, Array], results: Mapping[str, Array | Buffer], *, steady: bool = False) -> None:
        """Run one step of a bundle's decoder, in as many runs of the graph as it needs. Raises BackendError."""
        del steady
        ids, logits = feeds["input_ids"], results["logits"]  # [B, S], [N, V]
        if not isinstance(logits, np.ndarray):
            raise TypeError("the logits of a foreign graph are put together on the host")
        length = ids.shape[1]
        past = feeds["seqlens_k"].astype(np.int64) + 1 - length  # [B]
        row, column = np.divmod(feeds["logits_indices"], length)  # [N], [N]
        for rows, columns in self._pieces(past, length, column):
            found = self._advance(ids[rows, columns], past[rows] + columns.start, rows)  # [R, S or 1, V]
            here = (row >= rows.start) & (row < rows.stop) & (column >= columns.start) & (column < columns.stop)
            position = np.minimum(column[here] - columns.start, found.shape[1] - 1)
            logits[here] = found[row[here] - rows.start, position]

    def _pieces(self, past: Ids, length: int, column: Ids) -> Iterator[tuple[slice, slice]]:
        """Rows and positions of a step that the graph can take in one run."""
        together = self._graph.ragged or bool((past == past[0]).all())
        singly = bool(past.any()) and not self._graph.extends
        singly = singly or (self._graph.last_only and bool((column < length - 1).any()))
        for rows in [slice(0, len(past))] if together else [slice(row, row + 1) for row in range(len(past))]:
            for columns in [slice(at, at + 1) for at in range(length)] if singly else [slice(0, length)]:
                yield rows, columns

    def _advance(self, ids: Ids, past: Ids, rows: slice) -> npt.NDArray[np.floating]:
        """Append tokens [R, S] to rows with so many tokens [R]; the logits [R, S, V], or [R, 1, V] of the last ones."""
        count, length = ids.shape
        names, longest = self._graph.names, int(past.max())
        if self._graph.in_place:
            mask = np.arange(longest + length) < (past + length)[:, None]  # [R, T]
        else:
            # Each row's past ends where the new tokens begin: distances between its tokens are as in a row alone.
            mask = np.arange(longest + length) >= longest - past[:, None]  # [R, P + S]
        step: dict[str, Array] = {
            names.input_ids: ids,
            names.attention_mask: mask,
            names.position_ids: past[:, None] + np.arange(length),  # [R, S]
            names.branch: np.array([longest > 0]),
        }
        feeds = {
            name: np.ascontiguousarray(array, self._dtypes[name])
            for name, array in step.items()
            if name in self._dtypes
        }
        shape = (count, 1 if self._graph.last_only else length, self._graph.vocabulary)
        logits: npt.NDArray[np.floating] = np.empty(shape, self._dtypes[names.logits])
        if self._graph.in_place:
            self._binding(rows).run(feeds, {names.logits: logits})
        else:
            self._grow(feeds, logits, past, rows)
        return logits

    def _binding(self, rows: slice) -> Binding:
        """The graph with the rows' buffers as past and as present."""
        key = (rows.start, rows.stop)
        if key not in self._bound:
            views = {part: self._buffers[part.name].rows(*key) for part in self._parts}
            self._bound[key] = self._session.bind(
                {part.past: view for part, view in views.items()}, {part.present: view for part, view in views.items()}
            )
        return self._bound[key]

    def _grow(self, feeds: dict[str, Array], logits: Array, past: Ids, rows: slice) -> None:
        """Run the graph on copies of the rows' past [R], and put what is new behind it in the buffers."""
        longest, length = int(past.max()), feeds[self._graph.names.input_ids].shape[1]
        pasts: dict[str, Array] = {}
        presents: dict[str, Array] = {}
        for part in self._parts:
            buffer = _host(self._buffers[part.name])[rows]  # [R, K, C, D]
            kept = np.zeros((len(past), part.heads, longest, part.size), buffer.dtype)  # [R, K, P, D]
            for row, tokens in enumerate(past):
                kept[row, :, longest - tokens :] = buffer[row, :, :tokens]
            pasts[part.past] = kept
            presents[part.present] = np.empty((*kept.shape[:2], longest + length, part.size), buffer.dtype)
        self._session.run({**feeds, **pasts}, {self._graph.names.logits: logits, **presents})
        for part in self._parts:
            buffer = _host(self._buffers[part.name])[rows]
            for row, tokens in enumerate(past):
                buffer[row, :, tokens : tokens + length] = presents[part.present][row, :, longest:]


def _parts(graph: ForeignGraph) -> Iterator[_Part]:
    names = graph.names
    for facts in graph.caches:
        layer, heads = facts.layer, facts.kv_heads
        yield _Part(f"{layer}.key", names.past_key % layer, names.present_key % layer, heads, facts.key_dim)
        yield _Part(f"{layer}.value", names.past_value % layer, names.present_value % layer, heads, facts.value_dim)


def _host(buffer: Buffer) -> Array:
    if not isinstance(buffer, HostBuffer):
        raise TypeError("a growing cache is bound to a buffer of another backend")
    return buffer.array
