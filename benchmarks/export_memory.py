"""Memory and time of an export against the size of its checkpoint: the memory must not grow.

    python benchmarks/export_memory.py --cases 0.5:360m,1:1b,2:1b,4:3b,8:8b

Writes checkpoints of random bf16 weights in shards, without ever holding them, exports each with the command line in a
process of its own and watches it. Resident memory is what `/usr/bin/time -v` reports of the process, pages of mapped
files included. The disk's own time is that of reading the checkpoint and writing as much as the bundle, done just
before; files are put out of the system's cache before they are read. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from background import Background
from peers import remove
from random_checkpoint import SHAPES, Shape, write_checkpoint

INTERVAL_S = 0.02
MIB = 1 << 20
BLOCK = 16 * MIB


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint to export."""

    gigabytes: float
    shape: Shape

    @property
    def layers(self) -> int:
        """As many as fit."""
        return self.shape.layers_in(int(self.gigabytes * 1e9))


@dataclass(frozen=True, slots=True)
class Options:
    """What to export and how much memory it may take."""

    cases: tuple[Case, ...]
    quantize: str
    verify: tuple[str, ...]
    limit_mib: int
    work: Path
    keep: bool


@dataclass(frozen=True, slots=True)
class Exported:
    """One export: peaks of its memory, time and result."""

    shape: str
    layers: int
    model_mib: float
    largest_tensor_mib: float
    verify: str
    seconds: float
    disk_seconds: float
    """Reading the checkpoint and writing as much as the bundle, without anything in between."""
    peak_resident_mib: float
    peak_anonymous_mib: float
    bundle_mib: float
    background_cores: float
    failed: str | None


def options_from_arguments() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    names = lambda text: tuple(text.split(","))  # noqa: E731 - an argparse type
    parser.add_argument(
        "--cases",
        type=lambda text: tuple(map(case, text.split(","))),
        default="0.5:360m,1:1b,2:1b,4:3b,8:8b",
        help="gigabytes:shape, of " + ", ".join(SHAPES),
    )
    parser.add_argument("--quantize", default="int4", help="none, int8 or int4")
    parser.add_argument("--verify", type=names, default="graph", help="of none, graph, full")
    parser.add_argument("--limit-mib", type=int, default=2000, help="resident memory that fails the script")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks/export"), help="checkpoint and bundle")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for the next run")
    return Options(**vars(parser.parse_args()))


def case(text: str) -> Case:
    """A case from gigabytes:shape."""
    gigabytes, shape = text.split(":")
    return Case(float(gigabytes), SHAPES[shape])


def main(options: Options) -> int:
    """Write, export, report; 1 when an export failed or took more than the limit."""
    print(
        "| shape | layers | checkpoint MiB | largest tensor MiB | verify | peak resident MiB | peak anonymous MiB "
        "| seconds | disk alone s | bundle MiB | others |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    exports = []
    for item in options.cases:
        need, free = 3 * item.shape.nbytes(item.layers), shutil.disk_usage(existing_parent(options.work)).free
        if need > free:
            print(f"{need / 1e9:.1f} GB are needed below {options.work}, {free / 1e9:.1f} are free")
            return 1
        model = options.work / f"{item.shape.published}-{item.layers}"
        write_checkpoint(item.shape, item.layers, model)
        for verify in options.verify:
            exports.append(export(item, model, options, verify))
            print_row(exports[-1])
        if not options.keep:
            remove(model)
    print(json.dumps({"limit_mib": options.limit_mib, "exports": [asdict(item) for item in exports]}))
    return int(any(item.failed for item in exports))


def export(item: Case, model: Path, options: Options, verify: str) -> Exported:
    """Export in a process of its own and watch its memory."""
    bundle = options.work / "bundle"
    remove(bundle)
    command = [sys.executable, "-m", "fmedge", "export", str(model), str(bundle), "--force"]
    command += ["--quantize", options.quantize, "--verify", verify]
    forget(model)
    anonymous, failed = 0.0, None
    with Background() as background, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            anonymous = max(anonymous, anonymous_of(process.pid))
            time.sleep(INTERVAL_S)
        if status:
            log.seek(0)
            failed = " ".join(log.read().split())[-300:]
    resident = usage.ru_maxrss / 1024
    if failed is None and resident > options.limit_mib:
        failed = f"took more than {options.limit_mib} MiB"
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) if bundle.is_dir() else 0
    remove(bundle)
    return Exported(
        shape=item.shape.published,
        layers=item.layers,
        model_mib=round(item.shape.nbytes(item.layers) / MIB),
        largest_tensor_mib=round(item.shape.largest_nbytes() / MIB),
        verify=verify,
        seconds=round(background.seconds, 1),
        disk_seconds=round(disk_seconds(model, size, options.work), 1),
        peak_resident_mib=round(resident),
        peak_anonymous_mib=round(anonymous),
        bundle_mib=round(size / MIB),
        background_cores=round(background.cores, 2),
        failed=failed,
    )


def anonymous_of(pid: int) -> float:
    """Anonymous memory of a process in MiB, zero once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found.group(1)) / 1024 if found else 0.0


def disk_seconds(model: Path, size: int, work: Path) -> float:
    """What the disk takes to read the checkpoint and to write as many bytes as the bundle has."""
    forget(model)
    buffer = bytearray(BLOCK)
    started = time.perf_counter()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    copy = work / "copy"
    with copy.open("wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(buffer[: min(BLOCK, size - start)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    copy.unlink()
    return seconds


def forget(model: Path) -> None:
    """Put the files of a checkpoint out of the system's cache."""
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_row(item: Exported) -> None:
    """One line of the table."""
    cells = [item.shape, item.layers, item.model_mib, item.largest_tensor_mib, item.verify, item.peak_resident_mib]
    cells += [item.peak_anonymous_mib, item.seconds, item.disk_seconds, item.bundle_mib, item.background_cores]
    print(f"| {' | '.join(map(str, cells))} |{' FAILED: ' + item.failed if item.failed else ''}", flush=True)


def existing_parent(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


if __name__ == "__main__":
    raise SystemExit(main(options_from_arguments()))
