"""Choosing the next token: applies the options of `sampling.py` to logits. It knows nothing of text or caches.

    row = Row(Sampling(temperature=0.7, top_p=0.9), vocabulary=32000, seed=1, prompt=[1, 2, 3])
    (token,) = choose(logits, [row])      # logits [1, V]
    row.record(int(token))

The options apply in the order of transformers' logits processors: repetition penalty, presence and frequency
penalty (as OpenAI defines them), temperature, top_k, top_p, min_p. All tokens that tie with the k-th one survive
top_k, as there; of tokens that tie at the border of top_p, as many as it takes survive, from the lowest id on (there,
whichever the sort leaves). Greedy rows take the lowest id of a tie.

A draw depends on the row's own logits and on (seed, completion index, position); the other rows of the batch have
no part in it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.sampling import Sampling

NO_TOKEN = -1
"""What `choose` gives for a row whose logits allow no choice; `fault` says why."""

_BLOCKS = 64
"""Into so many interleaved parts logits are cut to find a lower bound of the k-th largest one."""

_SORTED = 256
"""So many weights at most are sorted to find the border of top_p."""


class Row:
    """What the sampling of one sequence needs between steps."""

    __slots__ = ("_counts", "_seen", "index", "position", "sampling", "seed")

    def __init__(
        self, sampling: Sampling, *, vocabulary: int, seed: int, index: int = 0, prompt: Sequence[int] = ()
    ) -> None:
        """`index` tells the completions of a prompt apart. Prompt tokens outside the vocabulary are ignored."""
        self.sampling = sampling
        self.seed = seed
        self.index = index
        self.position = 0
        self._seen: npt.NDArray[np.bool_] | None = None
        self._counts: npt.NDArray[np.int32] | None = None
        if sampling.repetition_penalty != 1.0:
            tokens = np.asarray(prompt, np.int64)  # [S]
            self._seen = np.zeros(vocabulary, np.bool_)  # [V]
            self._seen[tokens[tokens < vocabulary]] = True
        if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
            self._counts = np.zeros(vocabulary, np.int32)  # [V]

    def record(self, token: int) -> None:
        """Take note of the token that follows: it counts for penalties, and the next draw is another one."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        self.position += 1

    def penalised(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits [V] after the penalties; the array itself if none is on."""
        if self._seen is None and self._counts is None:
            return logits
        sampling = self.sampling
        logits = logits.copy()  # [V]
        if self._seen is not None:
            ids = np.flatnonzero(self._seen)  # [N]
            scores = logits[ids].astype(np.float64)  # [N]
            penalty = sampling.repetition_penalty
            logits[ids] = np.where(scores < 0, scores * penalty, scores / penalty)
        if self._counts is not None:
            ids = np.flatnonzero(self._counts > 0)  # [N]
            logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * self._counts[ids]
        return logits


def fresh_seed() -> int:
    """A seed from the system's entropy; 53 bits, so that it survives as a JSON number everywhere."""
    return secrets.randbits(53)


def choose(logits: npt.NDArray[np.floating], rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """The next token [R] of each row, from logits [R, V] in float32 or float16.

    Changes no row: `Row.record` does. A row whose logits hold NaN or +inf, or nothing but -inf, gets NO_TOKEN; the
    others are not affected.
    """
    if len(logits) != len(rows):
        raise ValueError(f"{len(logits)} rows of logits for {len(rows)} rows")
    logits = np.asarray(logits, np.float32)  # [R, V]; argmax and partition are slow on float16
    # Extreme options (temperature 1e-300) overflow on purpose: the limits are right.
    with np.errstate(over="ignore", under="ignore"):
        pairs = zip(logits, rows, strict=True)
        return np.fromiter((_choose(one, row) for one, row in pairs), np.int64, len(rows))  # [R]


def _choose(logits: npt.NDArray[np.float32], row: Row) -> int:
    scores = row.penalised(logits)  # [V]
    if row.sampling.temperature == 0.0:
        best = int(scores.argmax())
        # argmax takes the first NaN if there is one, so the best logit is finite only if all is well.
        return best if np.isfinite(scores[best]) else NO_TOKEN
    if not np.isfinite(scores.max()):
        return NO_TOKEN
    ids, weights = candidates(scores, row.sampling)
    mass = np.cumsum(weights)  # [N]
    # The first token whose cumulated mass exceeds the target; the target stays below the whole in spite of rounding.
    target = min(uniform(row.seed, row.index, row.position) * mass[-1], np.nextafter(mass[-1], 0.0))
    return int(ids[np.searchsorted(mass, target, side="right")])


def candidates(
    scores: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens [N] that can be drawn, by id, and how likely they are [N] in relation to the likeliest.

    `scores` [V] are logits after penalties with a finite maximum; the temperature is above 0.
    """
    best = scores.max()
    ids = np.arange(len(scores))  # [V]
    if 0 < sampling.top_k < len(scores):
        ids = np.flatnonzero(scores >= _kth_largest(scores, sampling.top_k))  # [N]
        scores = scores[ids]  # [N]
    weights = np.exp((scores - best).astype(np.float64) / sampling.temperature)  # [N]
    if sampling.top_p < 1.0 or sampling.min_p > 0.0:
        total = weights.sum()
        # All weights below this sum to less than top_p leaves out: only the others need sorting.
        floor = (1.0 - sampling.top_p) * total / len(weights)
        # The likeliest token weighs 1, so it stays.
        keep = np.flatnonzero(weights >= max(floor, sampling.min_p))  # [M]
        ids, weights = ids[keep], weights[keep]  # [M]
        if sampling.top_p < 1.0:
            keep = _nucleus(weights, sampling.top_p * total)
            ids, weights = ids[keep], weights[keep]
    return ids, weights


def _kth_largest(scores: npt.NDArray[np.float32], k: int) -> np.float32:
    """The k-th largest of scores [V], k < V."""
    width = len(scores) // _BLOCKS
    if width > k:
        # k of the blocks have a maximum at or above the k-th largest maximum, so at least k scores are too: all
        # below it can be left out. That is a few passes over the vocabulary instead of a partition of it.
        maxima = scores[: _BLOCKS * width].reshape(_BLOCKS, width).max(axis=0)  # [V / 64]
        scores = scores[scores >= np.partition(maxima, width - k)[width - k]]  # [N]
    kth: np.float32 = np.partition(scores, len(scores) - k)[len(scores) - k]
    return kth


def _nucleus(weights: npt.NDArray[np.float64], mass: float) -> npt.NDArray[np.int64]:
    """Where the smallest set of the largest of weights [M] is that holds the mass, or all of them if they do not."""
    size, rest = 0, weights
    while len(rest) > _SORTED:
        # Halve what the border lies in; sorting all of a flat distribution would cost ten times as much.
        half = len(rest) // 2
        rest = np.partition(rest, half)
        held = rest[half:].sum()
        if held >= mass:
            rest = rest[half:]
        else:
            size, mass, rest = size + len(rest) - half, mass - held, rest[:half]
    ordered = np.sort(rest)[::-1]
    # A token is in if those above it do not hold the mass yet.
    last = int(np.searchsorted(np.cumsum(ordered[:-1]), mass))
    size, least = size + last + 1, ordered[last]
    above = np.flatnonzero(weights > least)
    ties = np.flatnonzero(weights == least)
    return np.sort(np.concatenate([above, ties[: size - len(above)]]))


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: Philox4x64-10 (Salmon et al. 2011)."""
    key = np.array([seed, index], np.uint64)
    counter = np.array([position, 0, 0, 0], np.uint64)
    bits = int(np.random.Philox(key=key, counter=counter).random_raw())
    return (bits >> 11) * 2.0**-53


def fault(logits: npt.NDArray[np.floating], row: Row) -> BackendError:
    """Why `choose` gave NO_TOKEN for a row with logits [V]."""
    what = f"of {len(logits)} logits at position {row.position}"
    nan, infinite = int(np.isnan(logits).sum()), int(np.isposinf(logits).sum())
    if nan or infinite:
        return BackendError(
            f"the graph gave no usable logits: {what}, {nan} are NaN and {infinite} are infinite; "
            "values may have overflowed float16: a bundle exported with --target cpu computes in float32."
        )
    if np.isneginf(logits).all():
        return BackendError(f"the graph gave no usable logits: all {what} are -inf; export the bundle again.")
    return BackendError(
        f"the penalties make logits infinite at position {row.position}: repetition_penalty "
        f"{row.sampling.repetition_penalty}, presence_penalty {row.sampling.presence_penalty}, frequency_penalty "
        f"{row.sampling.frequency_penalty}; use values nearer to 1, 0 and 0."
    )
