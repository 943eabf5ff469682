"""What `fmedge eval` found of text bundles, as tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fmedge.commands.text_eval import Evaluated
    from fmedge.text_quality import TextQuality


def show(found: Sequence[Evaluated]) -> None:
    """Print all bundles side by side, and for a single one its positions."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    texts = [one.text for one in found if one.text is not None]
    compared = next((text.difference for text in texts if text.difference is not None), None)
    table = Table(caption_justify="left")
    table.add_column("bundle")
    columns = ["weights", "MB", "bits/weight"]
    if texts:
        columns += ["perplexity", "bits/byte"]
        table.caption = f"{texts[0].tokens} tokens scored"
    if compared is not None:
        columns += ["KL, nats", "same best", "in best 5"]
        table.caption = f"{table.caption}; against {compared.against}, perplexity {compared.perplexity:.3f}"
    if texts:
        columns.append("tokens/s")
    if found[0].choices is not None:
        columns += ["right", "right per byte"]
        more = f"{found[0].choices.questions} questions, of which guessing gets {found[0].choices.chance:.1%} right"
        table.caption = more if table.caption is None else f"{table.caption}; {more}"
    for name in columns:
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(one.bundle, *_cells(one))
    console.print(table)
    if len(found) == 1 and texts:
        console.print(_by_position(texts[0]))


def _cells(one: Evaluated) -> list[str]:
    bits = "-" if one.bits_per_weight is None else f"{one.bits_per_weight:.2f}"
    cells = [one.precision, f"{one.nbytes / 1e6:.2f}", bits]
    if one.text is not None:
        cells += [f"{one.text.perplexity:.3f}", f"{one.text.bits_per_byte:.4f}"]
        difference = one.text.difference
        if difference is not None:
            cells += [
                f"{difference.mean_kl:.3g}",
                f"{difference.top1_agreement:.1%}",
                f"{difference.top5_agreement:.1%}",
            ]
        cells.append(f"{one.text.tokens_per_second:.0f}")
    if one.choices is not None:
        cells += [f"{one.choices.accuracy:.1%}", f"{one.choices.accuracy_per_byte:.1%}"]
    return cells


def _by_position(text: TextQuality) -> Table:
    """What was found behind so many tokens of context."""
    table = Table()
    names = ["context", "tokens", "perplexity", *([] if text.difference is None else ["KL, nats"])]
    for name in names:
        table.add_column(name, justify="right")
    for one in text.by_position:
        kl = [] if one.mean_kl is None else [f"{one.mean_kl:.3g}"]
        table.add_row(f"{one.first}-{one.last}", str(one.tokens), f"{one.perplexity:.3f}", *kl)
    return table
