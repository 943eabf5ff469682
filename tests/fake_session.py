"""A `Session` in numpy that plays a tiny decoder, and the bundle around it.

It writes what each token leaves into the buffers that it is given, and its logits are a hash of all that the buffers
hold of a row: a row that is moved, grown, shared or cut off wrongly gives other logits. `logits_of` says what they are
for a sequence on its own. Inputs that the operators would reject, or read past their memory with, raise AssertionError.

Layers are of the kinds that models mix: keys and values of all tokens, of a window in a rolling buffer (as
GroupQueryAttention keeps it, `sliding_window_cache`), and recurrent states.
"""

from __future__ import annotations

import hashlib
import operator
import threading
import weakref
import zlib
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from fmedge_runtimes.bundle import Bundle, sha256_of
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.manifest import (
    FORMAT,
    CacheFacts,
    FileFacts,
    GraphFacts,
    SamplingFacts,
    SourceFacts,
    StateFacts,
    TextFacts,
    TextManifest,
)
from fmedge_runtimes.row_cache import RESERVE
from fmedge_runtimes.session import TensorSpec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrst"
VOCABULARY = 24
EOS = 20
CONTEXT = 200
SHARPNESS = 3.0


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a decoder."""

    caches: tuple[CacheFacts, ...]
    states: tuple[StateFacts, ...] = ()

    @property
    def parts(self) -> list[tuple[str, CacheFacts, int]]:
        """Name, facts and size of a head, of all buffers with positions."""
        return [
            (f"{cache.layer}.{part}", cache, size)
            for cache in self.caches
            for part, size in (("key", cache.key_dim), ("value", cache.value_dim))
        ]


def cache_facts(layer, kv_heads, key_dim, value_dim, window=None):
    """A layer whose buffer rolls if it has a window."""
    return CacheFacts(
        layer=layer,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=window,
        rolling=window is not None,
    )


WINDOW = 24
PLAIN = Layers((cache_facts(0, 1, 2, 2), cache_facts(1, 2, 1, 1)))
"""Heads and head sizes differ, as in models that mix kinds of attention."""
WINDOWED = Layers((cache_facts(0, 1, 2, 1), cache_facts(1, 2, 1, 1, WINDOW)))
HYBRID = Layers(
    (cache_facts(1, 1, 1, 2), cache_facts(3, 1, 1, 1, WINDOW)),
    (
        StateFacts(name="0.conv", shape=(3,), dtype="float32", in_place=True),
        StateFacts(name="2.recurrent", shape=(2, 2), dtype="float32", in_place=False),
    ),
)
TOKEN_BYTES = sum(cache.kv_heads * (cache.key_dim + cache.value_dim) for cache in PLAIN.caches) * 4


def row_bytes(tokens: int) -> int:
    """What so many tokens of the plain model take."""
    return tokens * TOKEN_BYTES


def remains(name: str, tokens: tuple[int, ...], start: int = 0) -> np.ndarray:
    """What the tokens from position `start` on leave in a buffer: [S], the same for each head and channel."""
    positions = np.arange(start, start + len(tokens))
    return ((np.array(tokens, np.int64) + 1) * 257 + positions * 6427 + zlib.crc32(name.encode()) % 97).astype(
        np.float32
    )


def state_after(name: str, tokens: tuple[int, ...], state: int = 0) -> int:
    """What a recurrent layer makes of tokens, the same in every place of its state."""
    for token in tokens:
        state = (3 * state + token + 1 + len(name)) % 8191
    return state


def hashed(contents: list[np.ndarray]) -> np.ndarray:
    """Logits [V] of the contents [K, S, D] of all buffers, and of the states."""
    digest = hashlib.blake2b(b"".join(content.tobytes() for content in contents), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return (generator.standard_normal(VOCABULARY) * SHARPNESS).astype(np.float32)


@lru_cache(maxsize=200_000)
def logits_of(tokens: tuple[int, ...], layers: Layers = PLAIN) -> np.ndarray:
    """The logits [V] behind a sequence that is alone in the world."""
    contents = []
    for name, cache, size in layers.parts:
        lines = remains(name, tokens)[-(cache.window or 0) :]
        contents.append(np.ascontiguousarray(np.broadcast_to(lines[None, :, None], (cache.kv_heads, len(lines), size))))
    for state in layers.states:
        contents.append(np.full(state.shape, state_after(state.name, tokens), np.float32))
    return hashed(contents)


@dataclass(frozen=True, slots=True, eq=False)
class FakeBuffer:
    """A numpy array and the allocation that it lies in."""

    array: np.ndarray
    owner: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def rows(self, start, stop):
        assert 0 <= start < stop <= len(self.array), "rows outside the buffer"
        return FakeBuffer(self.array[start:stop], self.owner)


@dataclass(slots=True)
class FakeSession:
    """`room` bytes can be allocated, as `free_memory` says beforehand; `limit` bytes, of which it says nothing.

    Each run takes `leak` bytes of the room away for good. The logits behind a token in `poison` are NaN. The run with
    the number `fail_on` fails, and the allocations whose numbers are in `deny`.
    """

    room: int | None = None
    limit: int | None = None
    leak: int = 0
    poison: frozenset[int] = frozenset()
    fail_on: int | None = None
    deny: set[int] = field(default_factory=set)
    runs: int = 0
    allocations: int = 0
    refused: int = 0
    closed: bool = False
    steps: list[tuple[int, int]] = field(default_factory=list)
    """Rows and tokens of each row, of every run."""
    peak: int = 0
    _owners: list[weakref.ref] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    layers: Layers = PLAIN
    window_slack: bool = True
    captures: bool = False

    @property
    def inputs(self):
        return (
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("position_ids", "int64", ("batch", "sequence")),
            TensorSpec("logits_indices", "int64", ("logits",)),
            TensorSpec("seqlens_k", "int32", ("batch",)),
            TensorSpec("total_sequence_length", "int32", ()),
            *self._kept("past_key_values", "past_states"),
        )

    @property
    def outputs(self):
        return (TensorSpec("logits", "float32", ("logits", VOCABULARY)), *self._kept("present", "present_states"))

    def _kept(self, caches, states):
        return (
            *(
                TensorSpec(f"{caches}.{name}", "float32", ("batch", cache.kv_heads, "capacity", size))
                for name, cache, size in self.layers.parts
            ),
            *(
                TensorSpec(f"{states}.{state.name}", state.dtype, ("batch", *state.shape))
                for state in self.layers.states
            ),
        )

    @property
    def allocated(self) -> int:
        """Bytes of the buffers that somebody still holds."""
        owners = [owner() for owner in self._owners]
        return sum(owner.nbytes for owner in owners if owner is not None)

    def allocate(self, shape, dtype):
        with self._lock:
            self.allocations += 1
            nbytes = int(np.prod(shape)) * dtype.itemsize
            most = self.limit if self.room is None else self.room
            if self.allocations in self.deny or (most is not None and self.allocated + nbytes > most):
                self.refused += 1
                raise MemoryError
            owner = np.zeros(shape, dtype)
            self._owners = [known for known in self._owners if known() is not None] + [weakref.ref(owner)]
            self.peak = max(self.peak, self.allocated)
            return FakeBuffer(owner, owner)

    def copy(self, source, target, shape=None):
        shape = shape or tuple(map(min, source.shape, target.shape))
        assert all(map(operator.le, shape, source.shape)) and all(map(operator.le, shape, target.shape))
        block = tuple(map(slice, shape))
        target.array[block] = source.array[block]

    def read(self, buffer, start=0, stop=None):
        return buffer.array.reshape(-1)[start:stop]

    def bind(self, feeds, results):
        assert not self.closed, "the session is closed"
        return FakeBinding(self, feeds, results)

    def free_memory(self):
        if self.room is None:
            return None
        return RESERVE + self.room - self.allocated

    def run(self, feeds, results):
        with self._lock:
            assert not self.closed, "the session is closed"
            self.runs += 1
            if self.room is not None:
                self.room -= self.leak
            if self.runs == self.fail_on:
                # A graph that stops half-way may have written anything into the rows of the step.
                for bound in results.values():
                    if isinstance(bound, FakeBuffer):
                        bound.array[...] = -7
                raise BackendError("the graph failed")
            logits = results["logits"]
            (logits if isinstance(logits, np.ndarray) else logits.array)[...] = self._logits(feeds, results)
            return {}

    def close(self):
        self.closed = True

    def _logits(self, feeds, results):
        self._check(feeds, results)
        ids, lengths = feeds["input_ids"], feeds["seqlens_k"] + 1  # [R, S], [R]
        rows, step = ids.shape
        self.steps.append((rows, step))
        # What each row's buffers hold when the step is through, and the position where that begins.
        read = [self._read(feeds, results, row, tuple(ids[row].tolist()), int(lengths[row])) for row in range(rows)]
        logits = np.empty((len(feeds["logits_indices"]), VOCABULARY), np.float32)  # [N, V]
        for number, wanted in enumerate(feeds["logits_indices"].tolist()):
            row, position = divmod(wanted, step)
            end = lengths[row] - step + position + 1
            if int(ids[row, position]) in self.poison:
                logits[number] = np.nan
            else:
                logits[number] = hashed(
                    [np.ascontiguousarray(content) for content in read[row](int(end), position + 1)]
                )
        return logits

    def _read(self, feeds, results, row, tokens, length):
        """Run a row's tokens through the layers; gives a function that says what the layers read at a position."""
        past = length - len(tokens)
        lines, states = [], []
        for name, cache, _ in self.layers.parts:
            given, bound = feeds[f"past_key_values.{name}"].array[row], results[f"present.{name}"].array[row]
            held = _held(past, given.shape[1], cache.window)
            new = np.broadcast_to(remains(name, tokens, past)[None, :, None], (len(given), len(tokens), given.shape[2]))
            whole = np.concatenate([given[:, :held], new], axis=1)
            lines.append((whole, past - held, cache.window))
            held = _held(length, given.shape[1], cache.window)
            bound[:, :held] = whole[:, whole.shape[1] - held :]
            if cache.window is not None:
                bound[:, held:] = -1
        for state in self.layers.states:
            given, bound = feeds[f"past_states.{state.name}"].array[row], results[f"present_states.{state.name}"].array
            first = int(given.flat[0])
            assert (given == first).all()
            bound[row] = state_after(state.name, tokens, first)
            states.append((state, first))

        def read(end, taken):
            found = []
            for whole, begin, window in lines:
                start = 0 if window is None else max(0, end - window)
                assert start >= begin, "a window whose beginning is gone"
                found.append(whole[:, start - begin : end - begin])
            for state, first in states:
                found.append(np.full(state.shape, state_after(state.name, tokens[:taken], first), np.float32))
            return found

        return read

    def _check(self, feeds, results):
        assert set(feeds) == {spec.name for spec in self.inputs}
        assert set(results) == {spec.name for spec in self.outputs}
        assert results["logits"].shape == (len(feeds["logits_indices"]), VOCABULARY)
        for spec in self.inputs:
            assert feeds[spec.name].dtype == np.dtype(spec.dtype), spec.name
            assert len(feeds[spec.name].shape) == len(spec.shape), spec.name
        ids, seqlens = feeds["input_ids"], feeds["seqlens_k"]
        rows, step = ids.shape
        past = seqlens + 1 - step
        assert rows > 0 and step > 0
        assert ((ids >= 0) & (ids < VOCABULARY)).all(), "token ids outside the vocabulary"
        assert seqlens.shape == (rows,)
        assert (past >= 0).all(), "negative past"
        assert rows == 1 or step == 1, "a prompt must have the graph for itself"
        assert (feeds["position_ids"] == past[:, None] + np.arange(step)).all(), "wrong positions"
        total = feeds["total_sequence_length"]
        assert total.shape == ()
        if not (self.captures and step == 1):
            assert total == seqlens.max() + 1, "wrong total_sequence_length"
        wanted = feeds["logits_indices"]
        assert ((wanted >= 0) & (wanted < rows * step)).all()
        known = [owner() for owner in self._owners]
        pairs = [(f"past_key_values.{name}", f"present.{name}") for name, _, _ in self.layers.parts]
        pairs += [(f"past_states.{state.name}", f"present_states.{state.name}") for state in self.layers.states]
        apart = {f"past_states.{state.name}" for state in self.layers.states if not state.in_place}
        for source, target in pairs:
            given, bound = feeds[source], results[target]
            assert any(given.owner is owner for owner in known), "memory of another session"
            assert np.shares_memory(given.array, given.owner), "a copy instead of a view"
            assert given.array.flags.c_contiguous
            if source in apart:
                assert not np.shares_memory(given.array, bound.array), "this state needs memory of its own"
            else:
                assert given.array.ctypes.data == bound.array.ctypes.data, "input and output must be the same memory"
            assert given.shape == bound.shape
        for name, cache, size in self.layers.parts:
            given = feeds[f"past_key_values.{name}"]
            length = given.shape[2]
            assert given.shape == (rows, cache.kv_heads, length, size)
            if cache.window is None:
                assert seqlens.max() < total <= length <= CONTEXT, "the cache is too short, or longer than the context"
            else:
                assert length > cache.window if self.window_slack else length == cache.window, "not the window's length"
        for state in self.layers.states:
            assert feeds[f"past_states.{state.name}"].shape == (rows, *state.shape)


def _held(tokens, length, window):
    """Positions that a buffer of so many holds, when one after the other was put in."""
    if window is None:
        return tokens
    held = 0
    for _ in range(tokens):
        held = window if held == length else held + 1
    return held


@dataclass(slots=True)
class FakeBinding:
    session: FakeSession
    feeds: dict
    results: dict

    def run(self, feeds, results, *, steady=False):
        assert not feeds.keys() & self.feeds.keys() and not results.keys() & self.results.keys()
        self.session.run({**feeds, **self.feeds}, {**results, **self.results})


def letters_tokenizer() -> Tokenizer:
    """A letter a token; <eos> is special, and three ids of the model have no text."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def text_facts(layers: Layers = PLAIN, **changes) -> TextFacts:
    facts = {
        "context": CONTEXT,
        "vocabulary": VOCABULARY,
        "cache_dtype": "float32",
        "caches": layers.caches,
        "states": layers.states,
        "eos_token_ids": (EOS,),
        "special_tokens": {"eos_token": "<eos>"},
        "tokenizer": None,
        "chat_template": None,
        "sampling": SamplingFacts(),
    }
    return TextFacts(**{**facts, **changes})


def make_bundle(folder, *, tokenizer=True, chat_template=None, layers: Layers = PLAIN, **changes) -> Bundle:
    """A bundle whose graph is never opened, with its files in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "decoder.onnx").write_bytes(b"graph")
    if tokenizer:
        letters_tokenizer().save(str(folder / "tokenizer.json"))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, "utf-8")
    facts = text_facts(
        layers,
        tokenizer="tokenizer.json" if tokenizer else None,
        chat_template=None if chat_template is None else "chat_template.jinja",
    )
    files = {
        path.name: FileFacts(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.iterdir())
        if path.name != "fmedge.json"
    }
    manifest = TextManifest(
        format=FORMAT,
        kind="text",
        source=SourceFacts(id="fake", revision=None, architecture="FakeForCausalLM", licence=None),
        target="cpu",
        precision="fp32",
        block_size=None,
        graphs={"decoder": GraphFacts(file="decoder.onnx", inputs=(), outputs=())},
        text=facts.model_copy(update=changes),
        evidence=(),
        golden=(),
        forced=False,
        files=files,
        made_by={"fmedge": "0"},
    )
    return Bundle(folder, manifest)
