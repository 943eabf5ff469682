"""Medians and ranges of what was measured, as tables and as one JSON document.

print_tables(samples)
print(json_line(samples, facts))
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from workload import Measurement

PUBLIC = "fmedge/"
"""Forms whose ratio to the peers is printed: fmedge through its public path."""

QUIET_CORES = 0.15
"""Where some processes of a row ran with less background than this, the others are left out of it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One process: what ran, what it measured, and the cores that other processes used meanwhile."""

    model: str
    batch: int
    form: str
    round: int
    measurement: Measurement
    background_cores: float


@dataclass(frozen=True, slots=True)
class Range:
    """Median, least and largest of all samples."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Range:
        """The range of some values."""
        listed = list(values)
        return cls(statistics.median(listed), min(listed), max(listed))

    def __str__(self) -> str:
        median, least, largest = (_short(value) for value in (self.median, self.least, self.largest))
        return median if least == largest else f"{median} ({least}-{largest})"


@dataclass(frozen=True, slots=True)
class Row:
    """All samples of one form at one batch size."""

    model: str
    batch: int
    form: str
    load_s: Range
    first_token_ms: Range
    prefill_tokens_per_s: Range
    decode_tokens_per_s: Range
    peak_mib: Range
    background_cores: Range
    processes: int
    quiet: bool
    """Whether all of these processes ran on a quiet machine; if not, no figure here is to be trusted."""


def rows_from_samples(samples: Sequence[Sample]) -> list[Row]:
    """One row for each (model, batch, form), in the order of their first sample."""
    groups: dict[tuple[str, int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.model, sample.batch, sample.form), []).append(sample)
    return [_row(*key, group) for key, group in sorted(groups.items(), key=lambda item: item[0][:2])]


def _row(model: str, batch: int, form: str, group: Sequence[Sample]) -> Row:
    group = [sample for sample in group if sample.background_cores < QUIET_CORES] or group
    measured = [sample.measurement for sample in group]
    return Row(
        model,
        batch,
        form,
        load_s=Range.of(item.load_s for item in measured),
        first_token_ms=Range.of(value for item in measured for value in item.first_token_ms),
        prefill_tokens_per_s=Range.of(value for item in measured for value in item.prefill_tokens_per_s),
        decode_tokens_per_s=Range.of(value for item in measured for value in item.decode_tokens_per_s),
        peak_mib=Range.of(item.peak_mib for item in measured),
        background_cores=Range.of(sample.background_cores for sample in group),
        processes=len(group),
        quiet=all(sample.background_cores < QUIET_CORES for sample in group),
    )


def print_tables(rows: Sequence[Row]) -> None:
    """What was measured, then fmedge's ratios to each other form (above 1: fmedge is faster)."""
    figures = "load s | first token ms | prefill tokens/s | decode tokens/s | peak MiB"
    print(f"| model | batch | form | {figures} | others | n |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (row.load_s, row.first_token_ms, row.prefill_tokens_per_s, row.decode_tokens_per_s)
        print(
            f"| {row.model} | {row.batch} | {row.form} | {' | '.join(map(str, cells))} | {row.peak_mib.median:.0f} "
            f"| {row.background_cores.median:.2f}{'' if row.quiet else ' LOUD'} | {row.processes} |"
        )
    ratios = ratios_from_rows(rows)
    if not ratios:
        return
    print("\nfmedge / peer (above 1: fmedge is faster; memory: below 1 is less)\n")
    print("| model | batch | fmedge | peer | prefill | decode | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for ratio in ratios:
        figures = (ratio["prefill"], ratio["decode"], ratio["memory"])
        names = (ratio["model"], ratio["batch"], ratio["fmedge"], ratio["peer"])
        print(f"| {' | '.join(map(str, names))} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")


def ratios_from_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every form of fmedge against every form of every peer, on the same model and batch size."""
    return [
        {
            "model": ours.model,
            "batch": ours.batch,
            "fmedge": ours.form.removeprefix(PUBLIC),
            "peer": theirs.form,
            "prefill": ours.prefill_tokens_per_s.median / theirs.prefill_tokens_per_s.median,
            "decode": ours.decode_tokens_per_s.median / theirs.decode_tokens_per_s.median,
            "memory": ours.peak_mib.median / theirs.peak_mib.median,
        }
        for ours in rows
        for theirs in rows
        if ours.form.startswith(PUBLIC)
        and not theirs.form.startswith("fmedge")
        and (ours.model, ours.batch) == (theirs.model, theirs.batch)
    ]


def json_line(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Everything as one compact JSON document."""
    document = {**facts, "rows": [_plain(row) for row in rows], "ratios": ratios_from_rows(rows)}
    return json.dumps(rounded(document), separators=(",", ":"))


def _plain(row: Row) -> dict[str, Any]:
    """A row with its ranges as [median, least, largest]."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: astuple(value) if isinstance(value, Range) else value for name, value in values.items()}


def rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The value with four digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
