"""What a foreign graph can do, found out by asking it: nothing in a folder says so, and wrong text looks like text.

The graph's own answer to a short text in one run is the reference: no cache takes part in it. What it answers with a
past must be the same; what it does not answer the same is not asked of it later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import BackendError, BundleError
from fmedge_runtimes.foreign_session import ForeignGraph, ForeignSession
from fmedge_runtimes.manifest import TextFacts
from fmedge_runtimes.row_cache import RowCache
from fmedge_runtimes.session import Session

TEXT, EQUAL, SHORT = (11, 48, 85, 122, 159, 196), (23, 4, 77, 140, 9, 62), (101, 7, 66)
"""Texts as token ids, two of the same length; any will do."""
LEVEL = 0.02
"""A difference of two logits [V], relative to their spread, that is rounding."""
NOISE = 3.0
"""So much of the difference that another row in the batch makes is rounding, too: graphs that quantize activations on
the fly round differently in each step. Measured on random models: that difference is 0 in fp32 and 0.03 in int8, where
steps with a past differ by 1e-6 and 0.08; steps that a graph gets wrong differ by 0.04 to 0.6."""


def adapt(session: Session, graph: ForeignGraph, facts: TextFacts, path: Path) -> ForeignSession:
    """The session as that of a bundle, which asks of its graph what the graph can do.

    Raises BundleError when the graph cannot continue a text at all.
    """
    try:
        return ForeignSession(session, _able(session, graph, facts, path))
    except BackendError as error:
        words = " ".join(str(error).split())
        raise BundleError(f"{path} fails on its first steps: {words}") from error


def _able(session: Session, graph: ForeignGraph, facts: TextFacts, path: Path) -> ForeignGraph:
    """The graph with what it can do."""
    text, equal, short = ([token % facts.vocabulary for token in tokens] for tokens in (TEXT, EQUAL, SHORT))
    if facts.context < len(text):
        return graph
    careful, cache = _empty(session, graph, facts)
    whole, whole_short = _answer(careful, cache, 0, text), _answer(careful, cache, 0, short)
    _answer(careful, cache, 1, equal[:-1])
    alone = _answer(careful, cache, 0, text[:-1], text[-1:])
    _answer(careful, cache, 0, text[:-1])
    noise = _difference(careful.decode(cache, [text[-1], equal[-1]])[0], alone)
    limit = LEVEL + NOISE * noise
    if not _difference(_answer(careful, cache, 0, text[:4], text[4:5], text[5:]), whole) <= limit:
        raise BundleError(
            f"{path} does not continue a text from its cache: the logits behind {len(text)} tokens differ when the "
            "last 2 come in steps of their own; export the model again."
        )
    able, cache = _empty(session, replace(graph, extends=True, ragged=True), facts)
    extends = _difference(_answer(able, cache, 0, text[:4], text[4:]), whole) <= limit
    ragged = graph.in_place or graph.names.position_ids in {spec.name for spec in session.inputs}
    if ragged:
        _answer(able, cache, 0, text[:-1])
        _answer(able, cache, 1, short[:-1])
        found = able.decode(cache, [text[-1], short[-1]])  # [2, V]
        ragged = _difference(found[0], whole) <= limit and _difference(found[1], whole_short) <= limit
    return replace(graph, extends=extends, ragged=ragged)


def _empty(session: Session, graph: ForeignGraph, facts: TextFacts) -> tuple[Decoder, RowCache]:
    """A decoder that believes this of its graph, and a cache of two rows for it."""
    decoder = Decoder(ForeignSession(session, graph), facts)
    cache = decoder.new_cache()
    cache.reserve(2, len(TEXT))
    return decoder, cache


def _answer(decoder: Decoder, cache: RowCache, row: int, *chunks: Sequence[int]) -> npt.NDArray[np.floating]:
    """The logits [V] behind a text that comes in these chunks, into a row that is emptied for it."""
    cache.start(row)
    return [decoder.extend(cache, row, chunk) for chunk in chunks][-1]


def _difference(found: npt.NDArray[np.floating], wanted: npt.NDArray[np.floating]) -> float:
    """How far logits [V] are from those wanted, relative to the spread of these; NaN if one of them is."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - wanted.mean()))
