"""The serving scenario of text.py: what its processes measured, as tables and as one JSON document.

samples.append(ServingSample(...))
print_serving(samples)
print(serving_line(samples, facts))
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from report import PUBLIC, QUIET_CORES, Range, rounded
from traffic import Served


@dataclass(frozen=True, slots=True)
class ServingSample:
    """One process: what served, at which rate, and the cores that other processes used meanwhile."""

    model: str
    rate: float
    form: str
    round: int
    served: Served
    background_cores: float

    def figures(self) -> dict[str, float]:
        """Percentiles over its requests, in milliseconds; tokens per second."""
        served = self.served
        return {
            "first_token_p50_ms": percentile(served.first_token_ms, 50),
            "first_token_p95_ms": percentile(served.first_token_ms, 95),
            "token_p50_ms": percentile(served.token_ms, 50),
            "token_p95_ms": percentile(served.token_ms, 95),
            "latency_p50_ms": percentile(served.latency_ms, 50),
            "latency_p95_ms": percentile(served.latency_ms, 95),
            "tokens_per_s": served.tokens_per_s,
            "tokens_per_cpu_s": served.tokens_per_cpu_s,
            "peak_mib": served.peak_mib,
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """The least value that so many percent do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


@dataclass(frozen=True, slots=True)
class ServingRow:
    """All processes of one form at one rate."""

    model: str
    rate: float
    form: str
    figures: dict[str, Range]
    background_cores: Range
    processes: int


def rows_of(samples: Sequence[ServingSample]) -> list[ServingRow]:
    """One row for each (model, rate, form), in the order of their first sample."""
    groups: dict[tuple[str, float, str], list[ServingSample]] = {}
    for sample in samples:
        groups.setdefault((sample.model, sample.rate, sample.form), []).append(sample)
    rows = []
    for (model, rate, form), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        quiet = [sample for sample in group if sample.background_cores < QUIET_CORES] or group
        measured = [sample.figures() for sample in quiet]
        figures = {name: Range.of(one[name] for one in measured) for name in measured[0]}
        background = Range.of(sample.background_cores for sample in quiet)
        rows.append(ServingRow(model, rate, form, figures, background, len(quiet)))
    return rows


def print_serving(samples: Sequence[ServingSample]) -> None:
    """What was measured, then the peers' times and rates as multiples of fmedge's."""
    rows = rows_of(samples)
    print("| model | requests/s | form | first token ms p50 / p95 | token ms p50 / p95 | request ms p50 / p95 ", end="")
    print("| tokens/s | tokens/CPU s | peak MiB | others | n |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        pairs = [
            f"{row.figures[f'{name}_p50_ms']} / {row.figures[f'{name}_p95_ms']}"
            for name in ("first_token", "token", "latency")
        ]
        loud = "" if row.background_cores.largest < QUIET_CORES else " LOUD"
        print(
            f"| {row.model} | {row.rate:g} | {row.form} | {' | '.join(pairs)} | {row.figures['tokens_per_s']} "
            f"| {row.figures['tokens_per_cpu_s']} | {row.figures['peak_mib'].median:.0f} "
            f"| {row.background_cores.median:.2f}{loud} | {row.processes} |"
        )
    ratios = serving_ratios(rows)
    if ratios:
        print("\npeer / fmedge, of medians (times above 1, and tokens/s below 1: fmedge is faster)\n")
        names = list(rows[0].figures)
        print(f"| model | requests/s | fmedge | peer | {' | '.join(names)} |")
        print(f"|---|---|---|---|{'---|' * len(names)}")
        for ratio in ratios:
            cells = " | ".join(f"{ratio[name]:.2f}" for name in names)
            print(f"| {ratio['model']} | {ratio['rate']:g} | {ratio['fmedge']} | {ratio['peer']} | {cells} |")


def serving_ratios(rows: Sequence[ServingRow]) -> list[dict[str, Any]]:
    """Every form of a peer against every form of fmedge, at the same rate."""
    return [
        {
            "model": ours.model,
            "rate": ours.rate,
            "fmedge": ours.form.removeprefix(PUBLIC),
            "peer": theirs.form,
            **{name: theirs.figures[name].median / ours.figures[name].median for name in ours.figures},
        }
        for ours in rows
        for theirs in rows
        if ours.form.startswith(PUBLIC)
        and not theirs.form.startswith("fmedge")
        and (ours.model, ours.rate) == (theirs.model, theirs.rate)
    ]


def serving_line(samples: Sequence[ServingSample], facts: dict[str, Any]) -> str:
    """Everything as one compact JSON document; a range is [median, least, largest]."""
    rows = rows_of(samples)
    listed = [
        {
            "model": row.model,
            "rate": row.rate,
            "form": row.form,
            "processes": row.processes,
            "background_cores": row.background_cores.median,
            **{name: [value.median, value.least, value.largest] for name, value in row.figures.items()},
        }
        for row in rows
    ]
    return json.dumps(rounded({**facts, "rows": listed, "ratios": serving_ratios(rows)}), separators=(",", ":"))
