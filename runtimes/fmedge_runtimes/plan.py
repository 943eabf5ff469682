"""How much memory a bundle takes, and what fits: said from its manifest, before anything is loaded.

    found = plan(bundle, slots=8, context=4096, memory=2 << 30)
    found.fits, found.total, found.largest_context, found.largest_slots

Cache and states are exact. Weights are the bytes of the files. What the graph needs while it runs is an estimate, since
the manifest does not say how wide the layers are: their width is told from the size of the weights. Of a bundle whose
engine is there both are TensorRT's own figures. Python and ONNX Runtime themselves take about 60 MiB beside all that,
CUDA and TensorRT some hundreds.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass

from fmedge_runtimes.bundle import Bundle
from fmedge_runtimes.decoder import PREFILL_CHUNK
from fmedge_runtimes.engine_file import EngineFacts, read_engine
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.row_cache import STEP, parts_of
from fmedge_runtimes.tensorrt_library import LIBRARIES

MOST_SLOTS = 4096
"""Larger numbers of slots are not looked for."""
SCALE_BITS = 0.5
"""What scales and zero points add to each weight of a quantized model."""
BLOCK_WEIGHTS = 12
"""Weights of a decoder layer, as a multiple of its squared width: 4 for attention, 8 for the MLP."""
BLOCK_ACTIVATIONS = 14
"""Values that a layer holds of each token at once, as a multiple of its width: measured."""

_SPOKEN_CONTEXT = 4096
"""The context that errors speak of, if the model's own is longer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a bundle takes with `slots` rows of `context` tokens; all sizes are bytes."""

    slots: int
    context: int
    memory: int | None
    """What it may take; None: nobody said."""
    weights: int
    prefill: int
    """Weights of the graph for prompts, beside those of the decoder's; 0 without one, or if it is left out."""
    working: int
    """While a step runs: activations, attention scores, logits. An estimate."""
    cache: int
    """Keys and values, which grow with the context."""
    states: int
    """Rolling windows and recurrent states, which do not."""
    largest_context: int | None
    """That fits in the memory with so many slots; 0 if none does."""
    largest_slots: int | None
    """That fit in the memory with this context; 0 if not even one does."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.prefill + self.working + self.cache + self.states

    @property
    def fits(self) -> bool:
        """Whether all of it fits in the memory."""
        return self.memory is None or self.total <= self.memory


def plan(
    bundle: Bundle, slots: int, context: int | None = None, memory: int | None = None, *, prefill: bool = True
) -> Plan:
    """Say what `slots` rows of `context` tokens (None: all that the model can hold) take, and what fits in `memory`.

    `prefill` False leaves out a bundle's graph for prompts, as `load` can (prefill_graph="off").

    Raises RequestError for slots or a context that cannot be.
    """
    most = bundle.manifest.text.context
    context = most if context is None else context
    if not 1 <= slots <= MOST_SLOTS:
        raise RequestError(f"{slots} slots cannot be planned; give 1 to {MOST_SLOTS}.")
    if not 1 <= context <= most:
        raise RequestError(f"a context of {context} tokens cannot be; {bundle.folder} holds 1 to {most}.")
    shape = _Shape(bundle, prefill=prefill)
    largest_context = largest_slots = None
    if memory is not None:
        contexts = [*range(STEP, most, STEP), most]
        fitting = bisect_right(contexts, memory, key=lambda tokens: shape.total(slots, tokens))
        largest_context = contexts[fitting - 1] if fitting else 0
        largest_slots = bisect_right(range(1, MOST_SLOTS + 1), memory, key=lambda rows: shape.total(rows, context))
    return Plan(
        slots,
        context,
        memory,
        shape.weights,
        shape.prefill,
        shape.working(slots, context),
        shape.kept(slots, context, grows=True),
        shape.kept(slots, context, grows=False),
        largest_context,
        largest_slots,
    )


def what_fits(bundle: Bundle, slots: int, memory: int | None) -> str:
    """A sentence that says what a bundle takes with so many slots, and what fits in the memory if that is known."""
    context = min(bundle.manifest.text.context, _SPOKEN_CONTEXT)
    found = plan(bundle, slots, context, memory)
    weights = found.weights + found.prefill
    mib = [f"{part / 2**20:.0f} MiB" for part in (weights, found.working, found.cache + found.states)]
    said = (
        f"Weights take {mib[0]}, a step about {mib[1]}, the cache for {slots} x {context} tokens {mib[2]} "
        f"(fmedge plan {bundle.folder})."
    )
    if memory is None:
        return said
    if not found.largest_slots and not found.largest_context:
        return f"{said} Not even a short row fits in {memory / 2**20:.0f} MiB: export with fewer bits."
    return (
        f"{said} In {memory / 2**20:.0f} MiB fit {found.largest_slots} rows of {context} tokens, or {slots} of "
        f"{found.largest_context}: load with a smaller max_batch, or shorten prompts and completions."
    )


def _engine(bundle: Bundle) -> EngineFacts | None:
    """What is known of the engine of a bundle's decoder; None if it has none."""
    library = LIBRARIES.get(bundle.manifest.target)
    if library is None:
        return None
    try:
        return read_engine(bundle.file(bundle.manifest.graphs["decoder"].file), library.name).facts
    except BackendError:
        return None


class _Shape:
    """The sizes of a bundle, as functions of rows and tokens."""

    def __init__(self, bundle: Bundle, *, prefill: bool) -> None:
        self._facts = bundle.manifest.text
        # The larger form of rolling windows; some backends take the smaller one.
        self._parts = parts_of(self._facts, slack=True)
        # Backends rearrange weights and keep one form of them; a tokenizer takes about its file's size, too.
        self.weights = bundle.nbytes - bundle.prefill_nbytes
        self._engine = _engine(bundle)
        if self._engine is not None:
            graph = bundle.manifest.graphs["decoder"].file
            files = (facts.bytes for name, facts in bundle.manifest.files.items() if name.startswith(graph))
            self.weights += self._engine.bytes - sum(files)
        self._width = self._estimated_width(bundle.manifest.precision)
        # The head's bytes are shared on the disk; each session rearranges it for itself, in 8 bits.
        head = round(self._facts.vocabulary * self._width)
        self.prefill = bundle.prefill_nbytes + head if prefill and bundle.prefill_nbytes else 0
        sizes = [(cache.key_dim, cache.kv_heads) for cache in self._facts.caches]
        self._heads = max((max(heads, math.ceil(self._width / size)) for size, heads in sizes), default=0)

    def _estimated_width(self, precision: str) -> float:
        """The width of the layers: the root of layers * BLOCK_WEIGHTS * width² + vocabulary * width = weights."""
        named = re.search(r"\d+", precision)
        bits = float(named[0]) + SCALE_BITS if named else (16.0 if self._facts.cache_dtype == "float16" else 32.0)
        count = 8 * self.weights / bits
        layers = len(self._facts.caches) + len({state.name.partition(".")[0] for state in self._facts.states}) or 1
        square, vocabulary = layers * BLOCK_WEIGHTS, self._facts.vocabulary
        return (math.sqrt(vocabulary**2 + 4 * square * count) - vocabulary) / (2 * square)

    def kept(self, rows: int, tokens: int, *, grows: bool) -> int:
        """Bytes of the buffers that rows keep between steps: those that grow with the tokens, or the others."""
        capacity = min(self._facts.context, -(-tokens // STEP) * STEP)
        # A cache whose length the graph fixes is a cache all the same.
        return sum(
            part.nbytes(rows, capacity) for part in self._parts if (None in part.axes and not part.window) == grows
        )

    def working(self, rows: int, tokens: int) -> int:
        """Bytes that a step takes beside them: a piece of a prompt on one row, or a token for all rows."""
        piece = min(PREFILL_CHUNK, tokens)
        size = 2 if self._facts.cache_dtype == "float16" else 4
        scores = max(piece, rows) * self._heads * tokens * size
        activations = max(piece, rows) * BLOCK_ACTIVATIONS * self._width * size
        logits = rows * self._facts.vocabulary * (size + 4)  # as they come, and as float32 for the sampler
        if self._engine is not None:  # which knows what it takes
            return round(self._engine.device_memory + logits)
        return round(scores + activations + logits)

    def total(self, rows: int, tokens: int) -> int:
        """All bytes."""
        kept = sum(self.kept(rows, tokens, grows=grows) for grows in (True, False))
        return self.weights + self.prefill + self.working(rows, tokens) + kept
