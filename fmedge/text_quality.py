"""How well a text bundle predicts a text, and how far it is from its original.

    quality = evaluate_text(bundle, decoder, TextInWindows(tokens, cut, prefix), original=None, report=print)

A window goes through the graph alone; the part that is context only asks for no logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from fmedge_runtimes.bundle import Bundle
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import DataError, ParityError
from fmedge_runtimes.likelihood import Logits, Sums

from fmedge.held_out_text import Cut, TextInWindows, Window

TOGETHER = 16
"""Windows that the original computes in one pass: each pass over a large one reads all of its weights."""
FIRST_BUCKET = 16
"""Positions up to this one are the first bucket; each following bucket is twice as wide."""

Report = Callable[[int, int], None]
"""Told how many tokens are scored, of how many bytes of text."""


class Original(Protocol):
    """What a bundle is compared with."""

    @property
    def how(self) -> str:
        """What it is, as evidence says it."""
        ...

    def each_logits(self, rows: Sequence[Sequence[int]], consume: Callable[[int, Logits], None]) -> None:
        """Hand the logits [S, V] of each row [S] to `consume`, with the number of the row."""
        ...


class BundleOriginal:
    """Another bundle in the place of the original."""

    def __init__(self, bundle: Bundle, decoder: Decoder) -> None:
        self.how = f"bundle {bundle.folder.name} ({bundle.manifest.precision})"
        self._decoder = decoder
        self._cache = decoder.new_cache()

    def each_logits(self, rows: Sequence[Sequence[int]], consume: Callable[[int, Logits], None]) -> None:
        """As Original says."""
        for number, row in enumerate(rows):
            consume(number, self._decoder.score(self._cache, row))


@dataclass(frozen=True, slots=True)
class Positions:
    """What was found at some positions of the windows, counted from 1: the tokens that a prediction looks back on."""

    first: int
    last: int
    tokens: int
    perplexity: float
    mean_kl: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a bundle is from its original, over the scored tokens."""

    against: str
    perplexity: float
    """Of the original."""
    mean_kl: float
    """KL divergence of the original's distribution from the bundle's, in nats per token."""
    top1_agreement: float
    top5_agreement: float
    """How often the original's best token is among the bundle's five likeliest."""


@dataclass(frozen=True, slots=True)
class TextQuality:
    """How well a bundle predicts a text."""

    window: int
    stride: int
    """How the text was cut: held_out_text.Cut."""
    tokens: int
    """That were scored."""
    perplexity: float
    bits_per_byte: float
    """Of the text that the scored tokens stand for; comparable between tokenizers, as perplexity is not."""
    tokens_per_second: float
    """Through the graph, context included; the comparison with an original is not counted."""
    difference: Difference | None
    by_position: tuple[Positions, ...]


def bits_per_weight(bundle: Bundle) -> float | None:
    """Bits of the graph and its weights for each parameter of the source; None where those were not counted."""
    parameters = bundle.manifest.source.parameters
    if parameters is None:
        return None
    text = bundle.manifest.text
    aside = {text.tokenizer, text.chat_template}
    graphs = [PurePosixPath(graph.file).name for graph in bundle.manifest.graphs.values()]
    nbytes = sum(
        facts.bytes
        for name, facts in bundle.manifest.files.items()
        if name not in aside and (name in graphs or name.removesuffix(".data") in graphs)
    )
    return nbytes * 8 / parameters


def evaluate_text(
    bundle: Bundle, decoder: Decoder, text: TextInWindows, original: Original | None, report: Report
) -> TextQuality:
    """Score the windows of a text. Raises DataError for a text without a token to score, ParityError for logits that
    are not finite, BackendError."""
    scoring = _Scoring(bundle, decoder)
    for group in _batched(text.windows(), TOGETHER):
        if original is None:
            for window in group:
                scoring.add(window, None)
                report(scoring.tokens, scoring.nbytes)
            continue

        def compare(number: int, logits: Logits, group: Sequence[Window] = group) -> None:
            scoring.add(group[number], logits)
            report(scoring.tokens, scoring.nbytes)

        original.each_logits([window.ids[:-1] for window in group], compare)
    return scoring.result(text.cut, original)


def _batched(text: Iterable[Window], count: int) -> Iterator[list[Window]]:
    iterator = iter(text)
    while group := [window for _, window in zip(range(count), iterator, strict=False)]:
        yield group


class _Scoring:
    """What has been found of a text so far."""

    def __init__(self, bundle: Bundle, decoder: Decoder) -> None:
        self.tokens = 0
        self.nbytes = 0
        self._bundle = bundle
        self._decoder = decoder
        self._cache = decoder.new_cache()
        self._buckets: list[Sums] = []
        self._passed = 0
        self._seconds = 0.0

    def add(self, window: Window, others: Logits | None) -> None:
        """Score a window; `others` are the original's logits [S - 1, V] of it, behind every token but the last."""
        ids, first = window.ids, window.first
        if others is not None and others.shape[-1] != self._decoder.facts.vocabulary:
            raise DataError(
                f"{self._bundle.folder} has a vocabulary of {self._decoder.facts.vocabulary} tokens, what it is "
                f"compared with {others.shape[-1]}; give --against the model that the bundle was made of."
            )
        position = first
        started = time.perf_counter()
        for logits in self._decoder.predict(self._cache, ids, first):
            self._seconds += time.perf_counter() - started
            end = position + len(logits)
            self._add(position, logits, ids[position:end], None if others is None else others[position - 1 : end - 1])
            position = end
            started = time.perf_counter()
        self._passed += len(ids) - 1
        self.tokens += len(ids) - first
        self.nbytes += window.nbytes

    def _add(self, position: int, logits: Logits, following: Sequence[int], others: Logits | None) -> None:
        """Logits [P, V] that predict the tokens from a position on, parted by bucket."""
        start = 0
        while start < len(logits):
            number = bucket_of(position + start)
            stop = min(len(logits), last_of(number) + 1 - position)
            self._buckets += [Sums() for _ in range(number + 1 - len(self._buckets))]
            part = slice(start, stop)
            self._buckets[number].add(logits[part], following[part], None if others is None else others[part])
            start = stop

    def result(self, cut: Cut, original: Original | None) -> TextQuality:
        """All of it. Raises DataError and ParityError."""
        sums = sum(self._buckets, Sums())
        if not sums.scored:
            raise DataError(
                "the text gives no token to score; a token needs another one before it: give a longer text."
            )
        if sums.not_finite:
            raise ParityError(
                f"{self._bundle.folder}: {sums.not_finite} of {sums.scored} positions have logits that are not finite; "
                "export the bundle again, with --verify full."
            )
        difference = None
        if original is not None:
            difference = Difference(
                original.how, sums.other_perplexity, sums.mean_kl, sums.top1_agreement, sums.top5_agreement
            )
        return TextQuality(
            window=cut.length,
            stride=cut.stride,
            tokens=sums.scored,
            perplexity=sums.perplexity,
            bits_per_byte=sums.nats / math.log(2) / self.nbytes if self.nbytes else math.nan,
            tokens_per_second=self._passed / self._seconds,
            difference=difference,
            by_position=tuple(
                Positions(
                    first=last_of(number - 1) + 1,
                    last=last_of(number),
                    tokens=bucket.scored,
                    perplexity=bucket.perplexity,
                    mean_kl=bucket.mean_kl if bucket.compared else None,
                )
                for number, bucket in enumerate(self._buckets)
                if bucket.scored
            ),
        )


def bucket_of(position: int) -> int:
    """The bucket of a position: 1 to 16, 17 to 32, 33 to 64, ..."""
    return max(0, (position - 1) // FIRST_BUCKET).bit_length()


def last_of(bucket: int) -> int:
    """The last position of a bucket; 0 before the first one."""
    return FIRST_BUCKET << bucket if bucket >= 0 else 0
