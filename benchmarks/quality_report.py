"""The rows of quality.py as tables: every form, and each peer beside fmedge's best form of no more bits.

print_report(rows, left_out)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OWN = "fmedge/"
TOLERANCE = 1.0005
"""Sizes that differ by less are the same."""


@dataclass(frozen=True, slots=True)
class Row:
    """One form of the model on one text."""

    form: str
    text: str
    matrix_bytes: int
    bits_per_weight: float
    perplexity: float
    source_perplexity: float
    mean_kl: float
    top1_agreement: float


def print_report(rows: Sequence[Row], left_out: Sequence[str]) -> None:
    """For each text: peers at equal size first, then all forms; at last what is missing."""
    for text in dict.fromkeys(row.text for row in rows):
        one = [row for row in rows if row.text == text]
        print(f"{text}: perplexity of PyTorch in fp32 {one[0].source_perplexity:.4f}\n")
        _print_equal_sizes(one)
        _print_forms(one)
    for reason in left_out:
        print(f"left out: {reason}")


def best_of_no_more_bits(rows: Sequence[Row], peer: Row) -> Row | None:
    """The form of fmedge with the lowest KL among those that are not larger than a peer's."""
    fits = [row for row in rows if row.form.startswith(OWN) and row.bits_per_weight <= peer.bits_per_weight * TOLERANCE]
    return min(fits, key=lambda row: row.mean_kl, default=None)


def _print_equal_sizes(rows: Sequence[Row]) -> None:
    """Each peer, and what fmedge has in no more bits per weight; KL of the peer by KL of fmedge."""
    peers = sorted((row for row in rows if not row.form.startswith(OWN)), key=lambda row: row.bits_per_weight)
    if not peers or len(peers) == len(rows):
        return
    print(
        "| peer | bits/weight | KL, nats | perplexity | fmedge, no larger | bits/weight | KL, nats | perplexity | x |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for peer in peers:
        best = best_of_no_more_bits(rows, peer)
        theirs = f"| {peer.form} | {peer.bits_per_weight:.3f} | {peer.mean_kl:.3g} | {peer.perplexity:.3f} "
        if best is None:
            print(f"{theirs}| none | | | | |")
            continue
        ours = f"| {best.form} | {best.bits_per_weight:.3f} | {best.mean_kl:.3g} | {best.perplexity:.3f} "
        print(f"{theirs}{ours}| {peer.mean_kl / best.mean_kl:.2f} |")
    print()


def _print_forms(rows: Sequence[Row]) -> None:
    """The largest form first; `over source` is the perplexity's distance from PyTorch's."""
    print("| form | matrices kB | bits/weight | perplexity | over source | KL, nats | same best token |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -row.bits_per_weight):
        print(
            f"| {row.form} | {row.matrix_bytes / 1e3:.0f} | {row.bits_per_weight:.3f} | {row.perplexity:.3f} "
            f"| {row.perplexity / row.source_perplexity - 1:+.3%} | {row.mean_kl:.3g} | {row.top1_agreement:.2%} |"
        )
    print()
