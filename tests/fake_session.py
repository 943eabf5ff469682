"""A `Session` in numpy that plays a tiny decoder, and the bundle around it.

It writes what each token leaves into the KV buffers that it is given, and its logits are a hash of all that the buffers
hold of a row: a row that is moved, grown, shared or cut off wrongly gives other logits. `logits_of` says what they are
for a sequence on its own. Inputs that GroupQueryAttention would reject, or read past its memory with, raise
AssertionError.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from fmedge_runtimes.bundle import (
    FORMAT,
    Bundle,
    CacheFacts,
    FileFacts,
    GraphFacts,
    Manifest,
    SamplingFacts,
    SourceFacts,
    TextFacts,
    sha256_of,
)
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.kv_cache import RESERVE
from fmedge_runtimes.session import TensorSpec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrst"
VOCABULARY = 24
EOS = 20
CONTEXT = 200
SHAPES = ((1, 2), (2, 1))
"""Key-value heads and head size of each layer: they differ, as in models that mix kinds of attention."""
PARTS = [(f"{layer}.{part}", shape) for layer, shape in enumerate(SHAPES) for part in ("key", "value")]
TOKEN_BYTES = sum(2 * heads * size for heads, size in SHAPES) * 4
SHARPNESS = 3.0


def row_bytes(tokens: int) -> int:
    return tokens * TOKEN_BYTES


def remains(name: str, tokens: tuple[int, ...], start: int = 0) -> np.ndarray:
    """What the tokens from position `start` on leave in a buffer: [S], the same for each head and channel."""
    positions = np.arange(start, start + len(tokens))
    salt = 1 + [part for part, _ in PARTS].index(name)
    return ((np.array(tokens, np.int64) + 1) * 257 + positions * 6427 + salt).astype(np.float32)


def hashed(contents: list[np.ndarray]) -> np.ndarray:
    """Logits [V] of the contents [K, S, D] of all buffers."""
    digest = hashlib.blake2b(b"".join(content.tobytes() for content in contents), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return (generator.standard_normal(VOCABULARY) * SHARPNESS).astype(np.float32)


@lru_cache(maxsize=200_000)
def logits_of(tokens: tuple[int, ...]) -> np.ndarray:
    """The logits [V] behind a sequence that is alone in the world."""
    contents = []
    for name, (heads, size) in PARTS:
        lines = remains(name, tokens)
        contents.append(np.ascontiguousarray(np.broadcast_to(lines[None, :, None], (heads, len(tokens), size))))
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

    inputs = (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("position_ids", "int64", ("batch", "sequence")),
        TensorSpec("logits_indices", "int64", ("logits",)),
        TensorSpec("seqlens_k", "int32", ("batch",)),
        TensorSpec("total_sequence_length", "int32", ()),
        *(
            TensorSpec(f"past_key_values.{name}", "float32", ("batch", heads, "capacity", size))
            for name, (heads, size) in PARTS
        ),
    )
    outputs = (
        TensorSpec("logits", "float32", ("logits", VOCABULARY)),
        *(
            TensorSpec(f"present.{name}", "float32", ("batch", heads, "capacity", size))
            for name, (heads, size) in PARTS
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

    def copy(self, source, target):
        block = tuple(slice(0, min(pair)) for pair in zip(source.shape, target.shape, strict=True))
        target.array[block] = source.array[block]

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
                raise BackendError("the graph failed")
            results["logits"][...] = self._logits(feeds, results)
            return {}

    def close(self):
        self.closed = True

    def _logits(self, feeds, results):
        self._check(feeds, results)
        ids, lengths = feeds["input_ids"], feeds["seqlens_k"] + 1  # [R, S], [R]
        rows, step = ids.shape
        self.steps.append((rows, step))
        for name, _ in PARTS:
            for row in range(rows):
                past = lengths[row] - step
                lines = remains(name, tuple(ids[row].tolist()), past)  # [S]
                results[f"present.{name}"].array[row, :, past : lengths[row], :] = lines[None, :, None]
        logits = np.empty((len(feeds["logits_indices"]), VOCABULARY), np.float32)  # [N, V]
        for number, wanted in enumerate(feeds["logits_indices"].tolist()):
            row, position = divmod(wanted, step)
            end = lengths[row] - step + position + 1
            if int(ids[row, position]) in self.poison:
                logits[number] = np.nan
            else:
                logits[number] = hashed([feeds[f"past_key_values.{name}"].array[row, :, :end] for name, _ in PARTS])
        return logits

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
        assert total.shape == () and total == seqlens.max() + 1, "wrong total_sequence_length"
        wanted = feeds["logits_indices"]
        assert ((wanted >= 0) & (wanted < rows * step)).all()
        known = [owner() for owner in self._owners]
        for name, (heads, size) in PARTS:
            given, bound = feeds[f"past_key_values.{name}"], results[f"present.{name}"]
            assert any(given.owner is owner for owner in known), "memory of another session"
            assert np.shares_memory(given.array, given.owner), "a copy instead of a view"
            assert given.array.flags.c_contiguous
            assert given.array.ctypes.data == bound.array.ctypes.data, "input and output must be the same memory"
            assert given.shape == bound.shape == (rows, heads, given.shape[2], size)
            assert given.shape[2] >= total, "the cache is too short"
            assert given.shape[2] <= CONTEXT, "the cache is longer than the context"


def letters_tokenizer() -> Tokenizer:
    """A letter a token; <eos> is special, and three ids of the model have no text."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def make_bundle(folder, *, tokenizer=True, chat_template=None, **changes) -> Bundle:
    """A bundle whose graph is never opened, with its files in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "decoder.onnx").write_bytes(b"graph")
    if tokenizer:
        letters_tokenizer().save(str(folder / "tokenizer.json"))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, "utf-8")
    facts = {
        "context": CONTEXT,
        "vocabulary": VOCABULARY,
        "cache_dtype": "float32",
        "caches": tuple(
            CacheFacts(layer=layer, kv_heads=heads, key_dim=size, value_dim=size, window=None, rolling=False)
            for layer, (heads, size) in enumerate(SHAPES)
        ),
        "states": (),
        "eos_token_ids": (EOS,),
        "special_tokens": {"eos_token": "<eos>"},
        "tokenizer": "tokenizer.json" if tokenizer else None,
        "chat_template": None if chat_template is None else "chat_template.jinja",
        "sampling": SamplingFacts(),
    }
    files = {
        path.name: FileFacts(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.iterdir())
        if path.name != "fmedge.json"
    }
    manifest = Manifest(
        format=FORMAT,
        kind="text",
        source=SourceFacts(id="fake", revision=None, architecture="FakeForCausalLM", licence=None),
        target="cpu",
        precision="fp32",
        block_size=None,
        graphs={"decoder": GraphFacts(file="decoder.onnx", inputs=(), outputs=())},
        text=TextFacts(**{**facts, **changes}),
        evidence=(),
        golden=(),
        forced=False,
        files=files,
        made_by={"fmedge": "0"},
    )
    return Bundle(folder, manifest)
