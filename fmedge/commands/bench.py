"""`fmedge bench`: how fast bundles that write text are on this machine, side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from fmedge_runtimes.errors import BackendError, BundleError

from fmedge.commands.device_options import DEVICE_HELP, GRAPHS_HELP, PrefillOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fmedge.commands.measurement import Measured, Workload

EPILOG = """
[bold]Examples[/bold]

  fmedge bench out/bundle

  fmedge bench out/int4 out/int8 --batch 1,8 --threads 4

  fmedge bench out/bundle --prompt 512 --new 128 --repeats 5 --json
"""


def _batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in str(text).split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise typer.BadParameter(f"{text!r} are no batch sizes; write 1,8,16.")
    return sizes


def command(
    bundles: Annotated[list[Path], typer.Argument(help="Folders of the bundles.")],
    batch: Annotated[str, typer.Option(metavar="SIZES", help="Rows that are decoded together.")] = "1,8,16",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="Tokens that each row generates.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each batch size; medians are shown.")] = 3,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU; all cores unless given.")] = None,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help=GRAPHS_HELP)] = True,
    prefill_graph: PrefillOption = "prompts",
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as one JSON line.")] = False,
) -> None:
    """Measure how fast bundles write text on this machine. Prompts are random tokens, the same for every bundle.

    Each bundle has a process of its own, so that its peak of memory is its own, too.
    """
    from fmedge_runtimes.load import kind_of

    from fmedge.commands.measurement import Workload, memory_bandwidth

    workload = Workload(_batches(batch), prompt, new, repeats, device, threads, cuda_graphs, prefill_graph)
    for bundle in bundles:
        if kind_of(bundle) == "image":
            raise BundleError(
                f"{bundle} makes images; bench measures how fast text is written. See benchmarks/image.py."
            )
    results: list[Measured] = []
    for bundle in bundles:
        results += _in_a_process(bundle, workload)
    bandwidth = memory_bandwidth(threads)
    shares = [_share(one, bandwidth) for one in results]
    if as_json:
        typer.echo(_json(workload, bandwidth, results, shares))
    else:
        _show(workload, bandwidth, results, shares)


def _in_a_process(bundle: Path, workload: Workload) -> list[Measured]:
    """Measure in a fresh process; says on stderr that it goes on, once that takes more than a second."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    from fmedge.commands.measurement import measure

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        future = pool.submit(measure, bundle, workload)
        try:
            try:
                return future.result(timeout=1)
            except TimeoutError:
                typer.echo(f"fmedge: measuring {bundle} ...", err=True)
                return future.result()
        except BrokenProcessPool as error:
            raise BackendError(
                f"the process that measured {bundle} was killed, perhaps for its memory; `fmedge plan` says what fits."
            ) from error


def _share(one: Measured, bandwidth: float) -> float | None:
    """Of the memory's bandwidth, what reading the weights once in each step takes; None where they lie elsewhere."""
    if one.device != "cpu":
        return None
    return one.weights_bytes * one.decode_tokens_per_second / one.batch / bandwidth


def _json(workload: Workload, bandwidth: float, results: Sequence[Measured], shares: Sequence[float | None]) -> str:
    import json
    from dataclasses import asdict

    records = [{**asdict(one), "bandwidth_share": share} for one, share in zip(results, shares, strict=True)]
    return json.dumps({**asdict(workload), "memory_bytes_per_second": bandwidth, "results": records})


def _show(workload: Workload, bandwidth: float, results: Sequence[Measured], shares: Sequence[float | None]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        caption=f"prompts of {workload.prompt} tokens, {workload.new} new ones, medians of {workload.repeats}; "
        f"memory moves {bandwidth / 1e9:.1f} GB/s",
        caption_justify="left",
    )
    table.add_column("batch", justify="right")
    table.add_column("bundle", overflow="fold")
    for name in ("prefill\ntokens/s", "decode\ntokens/s", "first token\nms", "token ms\np50", "token ms\np95",
                 "outside\ngraph", "peak\nMiB", "memory\nbandwidth"):  # fmt: skip
        table.add_column(name, justify="right")
    # Bundles stand below each other at each batch size.
    rows = sorted(zip(results, shares, strict=True), key=lambda row: row[0].batch)
    for number, (one, share) in enumerate(rows):
        last = number + 1 == len(rows) or rows[number + 1][0].batch != one.batch
        table.add_row(
            str(one.batch),
            one.bundle,
            f"{one.prefill_tokens_per_second:.0f}",
            f"{one.decode_tokens_per_second:.1f}",
            f"{one.first_token_ms:.1f}",
            f"{one.token_ms_p50:.2f}",
            f"{one.token_ms_p95:.2f}",
            f"{one.outside_graph:.1%}",
            f"{one.peak_bytes / 2**20:.0f}",
            "-" if share is None else f"{share:.0%}",
            end_section=last,
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
