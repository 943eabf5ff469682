"""Medians and ranges of what was measured with images, as tables and as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from image_workload import IMAGES, ImageMeasurement, difference
from report import QUIET_CORES, Range, rounded

OURS = "fmedge/"
REFERENCE = "diffusers/eager"


@dataclass(frozen=True, slots=True)
class ImageSample:
    """One process: what ran, what it measured, and the cores that other processes used meanwhile."""

    case: str
    unit: str
    batch: int
    form: str
    measurement: ImageMeasurement
    background_cores: float


@dataclass(frozen=True, slots=True)
class ImageRow:
    """All samples of one form at one piece of work."""

    case: str
    unit: str
    batch: int
    form: str
    load_s: Range
    seconds: Range
    """Of the whole batch."""
    cpu_seconds: Range
    images_per_s: float
    outside_graphs: float | None
    """Share of the seconds that were not spent in graphs; None where it is not known."""
    difference: float | None
    """From diffusers' output, the largest of some values, in its standard deviations; None without it."""
    peak_mib: Range
    background_cores: Range
    processes: int
    quiet: bool
    """Whether all processes ran on a quiet machine; if not, only the processor time says something."""


def image_rows(samples: Sequence[ImageSample]) -> list[ImageRow]:
    """One row for each (case, unit, batch, form), in the order of their first sample."""
    groups: dict[tuple[str, str, int, str], list[ImageSample]] = {}
    for sample in samples:
        groups.setdefault((sample.case, sample.unit, sample.batch, sample.form), []).append(sample)
    order = {key[:3]: number for number, key in reversed(list(enumerate(groups)))}
    return [_row(key, groups) for key in sorted(groups, key=lambda key: order[key[:3]])]


def _row(key: tuple[str, str, int, str], groups: dict[tuple[str, str, int, str], list[ImageSample]]) -> ImageRow:
    group = [sample for sample in groups[key] if sample.background_cores < QUIET_CORES] or groups[key]
    measured = [sample.measurement for sample in group]
    reference = groups.get((*key[:3], REFERENCE))
    seconds = Range.of(value for item in measured for value in item.seconds)
    graphs = [value for item in measured for value in item.graph_seconds]
    return ImageRow(
        *key,
        load_s=Range.of(item.load_s for item in measured),
        seconds=seconds,
        cpu_seconds=Range.of(value for item in measured for value in item.cpu_seconds),
        images_per_s=key[2] / seconds.median,
        outside_graphs=1 - sum(graphs) / sum(value for item in measured for value in item.seconds) if graphs else None,
        difference=difference(measured[0].output, reference[0].measurement.output) if reference else None,
        peak_mib=Range.of(item.peak_mib for item in measured),
        background_cores=Range.of(sample.background_cores for sample in group),
        processes=len(group),
        quiet=all(sample.background_cores < QUIET_CORES for sample in group),
    )


def print_image_tables(rows: Sequence[ImageRow]) -> None:
    """What was measured, then fmedge's ratios to each peer (above 1: fmedge is faster)."""
    print("| case | work | batch | form | load s | seconds | CPU s | images/s | outside | differs | MiB | others | n |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        rate = f"{row.images_per_s:.3g}" if row.unit == IMAGES else ""
        outside = "" if row.outside_graphs is None else f"{row.outside_graphs:.1%}"
        differs = "" if row.difference is None else f"{row.difference:.1g}"
        others = f"{row.background_cores.median:.2f}{'' if row.quiet else ' LOUD'}"
        cells = (row.case, row.unit, row.batch, row.form, row.load_s, row.seconds, row.cpu_seconds)
        cells += (rate, outside, differs, f"{row.peak_mib.median:.0f}", others, row.processes)
        print(f"| {' | '.join(map(str, cells))} |")
    ratios = image_ratios(rows)
    if ratios:
        print("\npeer / fmedge (above 1: fmedge takes less)\n")
        print("| case | work | batch | fmedge | peer | seconds | CPU seconds |")
        print("|---|---|---|---|---|---|---|")
    for ratio in ratios:
        names = [ratio[name] for name in ("case", "unit", "batch", "fmedge", "peer")]
        print(f"| {' | '.join(map(str, names))} | {ratio['seconds']:.2f} | {ratio['cpu_seconds']:.2f} |")


def image_ratios(rows: Sequence[ImageRow]) -> list[dict[str, Any]]:
    """Every form of fmedge against every form of every peer, at the same work."""
    return [
        {
            "case": ours.case,
            "unit": ours.unit,
            "batch": ours.batch,
            "fmedge": ours.form.removeprefix(OURS),
            "peer": theirs.form,
            "seconds": theirs.seconds.median / ours.seconds.median,
            "cpu_seconds": theirs.cpu_seconds.median / ours.cpu_seconds.median,
        }
        for ours in rows
        for theirs in rows
        if ours.form.startswith(OURS)
        and not theirs.form.startswith(OURS)
        and (ours.case, ours.unit, ours.batch) == (theirs.case, theirs.unit, theirs.batch)
    ]


def image_json(rows: Sequence[ImageRow], facts: dict[str, Any]) -> str:
    """Everything as one compact JSON document; ranges are [median, least, largest]."""
    plain = [
        {
            field.name: astuple(value) if isinstance(value := getattr(row, field.name), Range) else value
            for field in fields(row)
        }
        for row in rows
    ]
    return json.dumps(rounded({**facts, "rows": plain, "ratios": image_ratios(rows)}), separators=(",", ":"))
