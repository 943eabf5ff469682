"""Choosing the next token: applies the options of `sampling.py` to logits. It knows nothing of text or caches.

    row = Row(Sampling(temperature=0.7, top_p=0.9), vocabulary=32000, seed=1, prompt=[1, 2, 3])
    (token,) = choose(logits, [row])      # logits [1, V]
    row.record(int(token))

The options apply in the order of transformers' logits processors; docs/sampling.md has the list. All tokens that tie
with the k-th one survive top_k, as there; of tokens that tie at the border of top_p, as many as it takes survive, from
the lowest id on (there, whichever the sort leaves). Greedy rows take the lowest id of a tie.

A draw depends on the row's own logits and on (seed, completion index, position); the other rows of the batch have
no part in it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.candidates import divisor, draw, largest
from fmedge_runtimes.completion import TokenLogprob
from fmedge_runtimes.constraint import Constraint
from fmedge_runtimes.device_logits import DeviceLogits
from fmedge_runtimes.errors import BackendError, FmedgeError, RequestError
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.summary import pick

NO_TOKEN = -1
"""What `choose` gives for a row whose logits allow no choice; `fault` says why."""

_DRAWS = 64
"""So many numbers are taken from the generator at a time; making the generator costs more than they do."""


class Row:
    """What the sampling of one sequence needs between steps."""

    __slots__ = (
        "_banned",
        "_biased",
        "_biases",
        "_ends",
        "_eos",
        "_numbers",
        "_numbers_from",
        "_seen",
        "constraint",
        "index",
        "position",
        "sampling",
        "seed",
    )

    def __init__(
        self,
        sampling: Sampling,
        *,
        vocabulary: int,
        seed: int,
        index: int = 0,
        prompt: Sequence[int] = (),
        eos: Collection[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        """`index` tells the completions of a prompt apart. Prompt tokens outside the vocabulary are ignored.

        `eos` are the model's end-of-sequence tokens; `constraint`, which the row makes its own, follows the
        completion from its first token on.
        """
        self.sampling = sampling
        self.constraint = constraint
        self.seed = seed
        self.index = index
        self.position = 0
        self._eos = frozenset(() if sampling.ignore_eos else eos)
        self._ends = np.array(sorted({*self._eos, *sampling.stop_token_ids}), np.int64)  # [E]
        self._banned = np.array(sampling.banned_tokens, np.int64)  # [B]
        self._biased = np.array([token for token, _ in sampling.biases], np.int64)  # [N]
        self._biases = np.array([bias for _, bias in sampling.biases], np.float32)  # [N]
        self._seen: _Seen | None = None
        repeats, counts = sampling.repetition_penalty, (sampling.presence_penalty, sampling.frequency_penalty)
        if repeats != 1.0 or counts != (0.0, 0.0):
            tokens = np.unique(np.asarray(prompt, np.int64)) if repeats != 1.0 else np.empty(0, np.int64)
            self._seen = _Seen(tokens[tokens < vocabulary])
        self._numbers: list[float] = []
        self._numbers_from = 0

    @property
    def complete(self) -> bool:
        """Whether the constraint allows nothing but the end: the completion is over, and says what it should."""
        return self.constraint is not None and self.constraint.complete

    def ends(self, token: int) -> Literal["eos", "stop"] | None:
        """Whether a token ends the completion, and how: by end of sequence, or as one of stop_token_ids."""
        if token in self._eos:
            return "eos"
        return "stop" if token in self.sampling.stop_token_ids else None

    def record(self, token: int) -> None:
        """Take note of the token that follows: it counts for penalties, and the next draw is another one."""
        if self._seen is not None:
            self._seen.add(token)
        if self.constraint is not None and self.ends(token) is None:
            self.constraint.advance(token)
        self.position += 1

    @property
    def edits(self) -> bool:
        """Whether an option says something of single tokens at this position."""
        forced = self.position < len(self.sampling.forced_tokens)
        named = forced or len(self._biased) > 0 or len(self._banned) > 0 or self._early
        return named or self._seen is not None or self.constraint is not None

    @property
    def _early(self) -> bool:
        return self.position < self.sampling.min_new_tokens and len(self._ends) > 0

    def adjusted(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits [V] after bias, penalties, bans and constraint; the array itself if none is on."""
        if not self.edits:
            return logits
        early = self._early
        logits = logits.copy()  # [V]
        logits[self._biased] += self._biases
        if self._seen is not None:
            self._seen.penalise(logits, self.sampling)
        if self.constraint is not None:
            limits = self.constraint.limits()  # [V]
            limits[self._ends] = 0.0 if self.constraint.accepts else -np.inf
            logits += limits
        if early:
            logits[self._ends] = -np.inf
        logits[self._banned] = -np.inf
        return logits

    def uniform(self) -> float:
        """The number in [0, 1) that decides at this position."""
        place = self.position - self._numbers_from
        if not 0 <= place < len(self._numbers):
            self._numbers, self._numbers_from, place = uniforms(self.seed, self.index, self.position), self.position, 0
        return self._numbers[place]


class _Seen:
    """The distinct tokens of a sequence and how often each came in the completion: nothing as large as a vocabulary."""

    __slots__ = ("_counts", "_places", "_tokens")

    def __init__(self, prompt: npt.NDArray[np.int64]) -> None:
        """`prompt` [P] has each of its tokens once."""
        self._tokens = np.concatenate([prompt, np.empty(_DRAWS, np.int64)])  # [capacity]
        self._counts = np.zeros(len(self._tokens), np.int64)  # [capacity]
        self._places = {token: place for place, token in enumerate(prompt.tolist())}

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1

    def penalise(self, logits: npt.NDArray[np.float32], sampling: Sampling) -> None:
        """Change logits [V] in place: repetition penalty (Keskar et al. 2019), then presence and frequency (OpenAI)."""
        tokens, counts = self._tokens[: len(self._places)], self._counts[: len(self._places)]  # [N]
        scores = logits[tokens].astype(np.float64)  # [N]
        penalty = sampling.repetition_penalty
        if penalty != 1.0:
            scores = np.where(scores < 0, scores * penalty, scores / penalty)
        logits[tokens] = scores - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts


def fresh_seed() -> int:
    """A seed from the system's entropy; 53 bits, so that it survives as a JSON number everywhere."""
    return secrets.randbits(53)


def choose(logits: npt.NDArray[np.floating] | DeviceLogits, rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """The next token [R] of each row, from logits [R, V] in float32 or float16, on the host or on a device.

    Changes no row: `Row.record` does. A row whose logits hold NaN or +inf, or nothing but -inf, gets NO_TOKEN; the
    others are not affected.
    """
    if len(logits) != len(rows):
        raise ValueError(f"{len(logits)} rows of logits for {len(rows)} rows")
    if isinstance(logits, DeviceLogits):
        return _choose_on_device(logits, rows)
    logits = np.asarray(logits, np.float32)  # [R, V]; argmax and partition are slow on float16
    # Extreme options (temperature 1e-300) overflow on purpose: the limits are right.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        pairs = zip(logits, rows, strict=True)
        return np.fromiter((_choose(one, row) for one, row in pairs), np.int64, len(rows))  # [R]


def _choose_on_device(logits: DeviceLogits, rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """The same from what the device made of the logits; only where that does not say enough is a row fetched."""
    tokens = np.empty(len(rows), np.int64)  # [R]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        summaries = logits.summaries([divisor(row.sampling) if row.sampling.temperature else 1.0 for row in rows])
        for number, (row, summary) in enumerate(zip(rows, summaries, strict=True)):
            token = None if row.edits else pick(summary, row.sampling, row.uniform)
            tokens[number] = _choose(logits[number].astype(np.float32), row) if token is None else token
    return tokens


def _choose(logits: npt.NDArray[np.float32], row: Row) -> int:
    if row.position < len(row.sampling.forced_tokens):
        return row.sampling.forced_tokens[row.position] if np.isfinite(logits.max()) else NO_TOKEN
    scores = row.adjusted(logits)  # [V]
    best = int(scores.argmax())
    # argmax takes the first NaN if there is one, so the best score is finite only if all is well.
    if not np.isfinite(scores[best]):
        return NO_TOKEN
    return best if row.sampling.temperature == 0.0 else draw(scores, row.sampling, row.uniform())


def logprob_of(logits: npt.NDArray[np.floating], token: int, top: int) -> TokenLogprob:
    """How likely the model holds a token, and the `top` likeliest: log(softmax(logits)), with its own logits [V]."""
    logits = np.asarray(logits, np.float32)
    best = logits.max()
    # Of the whole vocabulary; float32 is enough for the terms, not for their sum.
    whole = float(best) + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
    ids = largest(logits, top) if top else np.empty(0, np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")[:top]]  # [top]; of a tie, the lowest id first
    likeliest = tuple((int(one), float(logits[one]) - whole) for one in ids)
    return TokenLogprob(token, float(logits[token]) - whole, likeliest)


def uniforms(seed: int, index: int, position: int) -> list[float]:
    """Numbers in [0, 1) for the positions from `position` on; each depends on (seed, index, its position) alone.

    Philox4x64-10 (Salmon et al. 2011) with the key (seed, index); the first word of block `position` is the number.
    """
    generator = np.random.Philox(
        key=np.array([seed, index], np.uint64), counter=np.array([position, 0, 0, 0], np.uint64)
    )
    words = generator.random_raw(4 * _DRAWS)[::4]  # [D] uint64
    numbers: list[float] = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    return numbers


def fault(logits: npt.NDArray[np.floating], row: Row) -> FmedgeError:
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
    if row.constraint is not None and row.constraint.error is not None:
        return RequestError(f"the constraint cannot go on at position {row.position}: {row.constraint.error}")
    with np.errstate(over="ignore"):
        scores = row.adjusted(np.asarray(logits, np.float32))
    if np.isneginf(scores).all():
        return RequestError(
            f"no token is left at position {row.position}: banned_tokens, min_new_tokens and the constraint together "
            "exclude all of them; ban fewer."
        )
    return BackendError(
        f"the penalties make logits infinite at position {row.position}: repetition_penalty "
        f"{row.sampling.repetition_penalty}, presence_penalty {row.sampling.presence_penalty}, frequency_penalty "
        f"{row.sampling.frequency_penalty}; use values nearer to 1, 0 and 0."
    )
