"""The tokens that a draw may take, and how likely each is: temperature, top_k, top_p, min_p and typical_p in numpy.

    ids, weights = candidates(scores, sampling)     # scores [V] -> ids [N], weights [N]
    token = draw(scores, sampling, at=0.37)         # the token where the cumulated probability passes 0.37

Nothing here sorts a vocabulary or goes over it in Python: a few passes of vector operations leave few tokens, which are
looked at closely. Few weights are float64; those of a vocabulary are float32, whose operations are twice as fast.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.sampling import Sampling

_BLOCKS = 64
"""Into so many interleaved parts scores are cut to find the largest ones."""

_FEW = 4096
"""Up to so many weights are computed in float64."""

_BINS = 256
"""Into so many ranges keys are cut to find the border of a mass."""

_SORTED = 256
"""So many keys at most are sorted to find it."""

_DEEPEST = 32.0
"""Gaps beyond this fall into one range: e**-32 of the likeliest's weight each."""

_TINY = 1e-30
"""Keys that differ by less are not cut further."""

_SLACK = 1e-4
"""So much beyond a bound a coarse look keeps tokens: well above the error of float32, and few tokens more."""

_SURER = 1e-3
"""Tokens at least this likely are looked at before those: there are fewer of them, and they often suffice."""

_SURE = 1e-4
"""Tokens at least this likely are looked at first; where they hold what top_p keeps, no others matter."""

LOWEST = np.finfo(np.float32).min
"""Below this is only -inf."""

_STRIDE = 256
"""Weights are summed in runs of this length before one is located in them."""


def draw(scores: npt.NDArray[np.float32], sampling: Sampling, at: float) -> int:
    """The token where the probability cumulated over the ids passes `at`, which is in [0, 1). Scores as below."""
    if 0 < sampling.top_k < len(scores) or sampling.typical_p < 1.0:
        ids, weights = candidates(scores, sampling)
        return int(ids[locate(weights, at)])
    if sampling.top_p == 1.0 and sampling.min_p > 0.0:
        ids, _ = _coarse(scores, sampling)
        if len(ids) <= _FEW:
            ids, weights = remaining(ids, scores[ids], 0.0, sampling)
            return int(ids[locate(weights, at)])
    weights = _gaps(scores, sampling, np.float32)  # [V]
    np.exp(weights, out=weights)
    if keeps_all(sampling, len(scores)):
        return locate(weights, at)
    if sampling.top_p < 1.0:
        total = _total(weights)
        for floor in (_SURER, _SURE):
            ids = np.flatnonzero(weights >= max(total * floor, sampling.min_p) * (1.0 - _SLACK))  # [N]
            if len(ids) > _FEW:
                break
            held = float(weights[ids].sum(dtype=np.float64))
            if held >= sampling.top_p * total * (1.0 + _SLACK):
                ids, weights = remaining(ids, scores[ids], total - held, sampling)
                return int(ids[locate(weights, at)])
    # Thousands may be left: they are weighed in place, since to gather them would cost more than all else.
    keep = weights >= sampling.min_p  # [V]
    if sampling.top_p < 1.0:
        keep &= _wide_nucleus(scores, weights, sampling, sampling.top_p * total)
    np.multiply(weights, keep, out=weights)
    return locate(weights, at)


def candidates(
    scores: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
    """The tokens [N] that can be drawn, by id, and how likely they are [N] in relation to the likeliest.

    `scores` [V] are logits after penalties, with a finite maximum; the temperature is above 0. The result is that of
    transformers' warpers in their order: temperature, top_k, top_p, min_p, typical_p.
    """
    ids, rest = _coarse(scores, sampling)  # [N]
    return remaining(ids, scores[ids], rest, sampling)


def remaining(
    ids: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], rest: float, sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
    """What top_p, min_p and typical_p leave of tokens [N] with these scores [N], the likeliest among them.

    `rest` is the weight of the tokens that top_k let pass and that are not among them.
    """
    gaps = _gaps(scores, sampling, np.float64 if len(scores) <= _FEW else np.float32)
    weights = np.exp(gaps)  # [N]
    if sampling.top_p < 1.0 or sampling.min_p > 0.0:
        keep = weights >= sampling.min_p  # the likeliest weighs 1
        if sampling.top_p < 1.0:
            mass = sampling.top_p * (float(weights.sum(dtype=np.float64)) + rest)
            keep &= _nucleus(scores, weights, mass)
        ids, gaps, weights = ids[keep], gaps[keep], weights[keep]
    if sampling.typical_p < 1.0:
        keep = _typical(gaps, weights, sampling.typical_p)
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def largest(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """The ids of the k largest of scores [V], ascending, without -inf; all that tie with the k-th are among them."""
    width = len(scores) // _BLOCKS
    ids = np.arange(len(scores)) if width <= k else _columns(scores, width, k)
    few = scores[ids]
    kth = np.partition(few, len(few) - k)[len(few) - k] if k < len(few) else few.min()
    found: npt.NDArray[np.int64] = ids[few >= max(kth, LOWEST)]
    return found


def _columns(scores: npt.NDArray[np.float32], width: int, k: int) -> npt.NDArray[np.int64]:
    """Ids, ascending, of some scores among which the k largest are.

    Cut into blocks of `width` that are laid below each other, k columns have a maximum at or above the k-th largest
    maximum, so at least k scores are. Only such columns need looking at: one pass over the vocabulary.
    """
    cut = _BLOCKS * width
    maxima = scores[:cut].reshape(_BLOCKS, width).max(axis=0)  # [V / 64]
    # A constraint may leave fewer than k columns that are not -inf.
    least = max(np.partition(maxima, width - k)[width - k], LOWEST)
    columns = np.flatnonzero(maxima >= least)  # [C]
    ids = np.arange(0, cut, width)[:, None] + columns  # [64, C]
    ids = np.concatenate([ids.ravel(), np.arange(cut, len(scores))])
    reaching: npt.NDArray[np.int64] = ids[scores[ids] >= least]
    return reaching


def keeps_all(sampling: Sampling, vocabulary: int) -> bool:
    """Whether every token can be drawn."""
    top_k = 0 < sampling.top_k < vocabulary
    return not top_k and sampling.top_p == 1.0 and sampling.min_p == 0.0 and sampling.typical_p == 1.0


def divisor(sampling: Sampling) -> float:
    """The temperature, kept where float32 can divide by it; beyond, the limits are reached long since."""
    return min(max(sampling.temperature, 1e-30), 1e30)


def _gaps(
    scores: npt.NDArray[np.float32], sampling: Sampling, dtype: type[np.float32] | type[np.float64]
) -> npt.NDArray[np.floating]:
    """(score - best) / temperature [N]: the logarithms of the weights."""
    gaps: npt.NDArray[np.floating] = (scores - scores.max()).astype(dtype, copy=False)
    if sampling.temperature != 1.0:
        gaps /= dtype(divisor(sampling))
    return gaps


def _coarse(scores: npt.NDArray[np.float32], sampling: Sampling) -> tuple[npt.NDArray[np.int64], float]:
    """Ids [N], ascending, among which the candidates are; and the weight of the others, which top_p still counts."""
    if 0 < sampling.top_k < len(scores):
        return largest(scores, sampling.top_k), 0.0
    if sampling.top_p < 1.0:
        weights = _gaps(scores, sampling, np.float32)  # [V]
        np.exp(weights, out=weights)
        total = _total(weights)
        # Few tokens hold the mass if the model is sure; all weights below the second floor together are less than what
        # top_p leaves out.
        for floor in (total * _SURE, (1.0 - sampling.top_p) * total / len(scores)):
            ids = np.flatnonzero(weights >= max(floor, sampling.min_p) * (1.0 - _SLACK))  # [N]
            held = float(weights[ids].sum(dtype=np.float64))
            if held >= sampling.top_p * total * (1.0 + _SLACK):
                break
        return ids, max(total - held, 0.0)
    if sampling.min_p > 0.0:
        reach = (math.log(sampling.min_p) - _SLACK) * divisor(sampling)
        return np.flatnonzero(scores - scores.max() >= reach), 0.0
    return np.flatnonzero(scores >= LOWEST), 0.0


def _nucleus(scores: npt.NDArray[np.float32], weights: npt.NDArray[np.floating], mass: float) -> npt.NDArray[np.bool_]:
    """Which of N tokens are the smallest set of the likeliest that holds the mass; of a tie, those of lowest id."""
    border, rest = _border(-scores, weights, mass)
    keep: npt.NDArray[np.bool_] = scores > -border
    ties = np.flatnonzero(scores == -border)
    weight = weights[ties[0]]
    needed = math.ceil(min(rest / weight, len(ties))) if weight > 0.0 else len(ties)
    keep[ties[: max(needed, 1)]] = True
    return keep


def _wide_nucleus(
    scores: npt.NDArray[np.float32], weights: npt.NDArray[np.floating], sampling: Sampling, mass: float
) -> npt.NDArray[np.bool_]:
    """The same for a whole vocabulary [V]: one pass finds the range of gaps where the border lies."""
    gaps = _gaps(scores, sampling, np.float32)  # [V]
    lowest = max(float(gaps.min()), -_DEEPEST)
    scaled = gaps * gaps.dtype.type((1 - _BINS) / lowest) if lowest else np.zeros_like(gaps)  # [V]
    bins = np.minimum(scaled, _BINS - 1, out=scaled).astype(np.uint8)  # [V]
    held = np.cumsum(np.bincount(bins, weights))  # [256 at most]
    chosen = min(int(np.searchsorted(held, mass)), len(held) - 1)
    keep: npt.NDArray[np.bool_] = bins < chosen
    inside = np.flatnonzero(bins == chosen)
    rest = mass - (float(held[chosen - 1]) if chosen else 0.0)
    keep[inside[_nucleus(scores[inside], weights[inside], rest)]] = True
    return keep


def _typical(gaps: npt.NDArray[np.floating], weights: npt.NDArray[np.floating], mass: float) -> npt.NDArray[np.bool_]:
    """Which of N tokens have information nearest to the entropy, until they hold the mass (Meister et al. 2022).

    Information is -log(weight / total) = log(total) - gap, entropy its mean: the distance is that of a gap to the mean.
    """
    possible = weights > 0.0
    total = float(weights.sum(dtype=np.float64))
    mean = float(np.multiply(weights, gaps, where=possible, out=np.zeros_like(weights)).sum(dtype=np.float64)) / total
    distance = np.abs(gaps - gaps.dtype.type(mean))  # [N]
    border, _ = _border(distance, weights, mass * total)
    return possible & (distance <= border)


def _border(keys: npt.NDArray[np.floating], weights: npt.NDArray[np.floating], mass: float) -> tuple[float, float]:
    """The key up to which tokens, in the order of their keys [N], hold the mass; the last one if they do not.

    Also what of the mass the tokens with exactly that key have to give. Keys may be infinite where weights are 0.
    """
    while len(keys) > _SORTED:
        low = keys.min()
        span = float(keys.max()) - float(low)
        if not _TINY < span < math.inf:  # all are equal, or too near to be told apart by the division
            break
        # The first and the last key fall into different bins, so every round leaves fewer.
        bins = ((keys - low) * keys.dtype.type(_BINS / span)).astype(np.intp)  # [N]
        held = np.cumsum(np.bincount(bins, weights))  # [257 at most]
        chosen = min(int(np.searchsorted(held, mass)), len(held) - 1)
        mass -= float(held[chosen - 1]) if chosen else 0.0
        inside = bins == chosen
        keys, weights = keys[inside], weights[inside]
    order = np.argsort(keys, kind="stable")
    keys, held = keys[order], np.cumsum(weights[order], dtype=np.float64)
    last = keys[min(int(np.searchsorted(held, mass)), len(keys) - 1)]
    before = int(np.searchsorted(keys, last))
    return float(last), mass - (float(held[before - 1]) if before else 0.0)


def locate(weights: npt.NDArray[np.floating], at: float) -> int:
    """Where among weights [N] the part `at` of their sum is passed; never a token of no weight."""
    first = 0
    if len(weights) > 4 * _STRIDE:
        # Find the run first: cumulating a vocabulary one by one costs more than all else in a draw.
        run, at = _passed(_sums(weights), at)
        first = run * _STRIDE
        weights = weights[first : first + _STRIDE]
    return first + _passed(weights, at)[0]


def _sums(weights: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The sums of runs [N / 256] of weights, in their own type: einsum is several times as fast as reduceat."""
    whole = len(weights) // _STRIDE * _STRIDE
    sums: npt.NDArray[np.floating] = np.einsum("ij->i", weights[:whole].reshape(-1, _STRIDE))  # [N // 256]
    return sums if whole == len(weights) else np.append(sums, weights[whole:].sum())


def _total(weights: npt.NDArray[np.floating]) -> float:
    """The sum of weights [N], of runs of them in float64."""
    return float(_sums(weights).sum(dtype=np.float64))


def _passed(weights: npt.NDArray[np.floating], at: float) -> tuple[int, float]:
    """The first of weights [N] with which the cumulated weight exceeds the part `at`, and how far into it that is."""
    held = weights.cumsum(dtype=np.float64)  # [N]
    whole = float(held[-1])
    # Below the whole in spite of rounding.
    target = min(at * whole, math.nextafter(whole, 0.0))
    index = int(held.searchsorted(target, side="right"))
    before = float(held[index - 1]) if index else 0.0
    return index, (target - before) / (float(held[index]) - before)
