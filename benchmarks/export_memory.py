"""Memory of an export: does it stay small when the model does not fit?

    python benchmarks/export_memory.py --gigabytes 4 --limit-mib 3000

Writes a Llama-shaped checkpoint of random bf16 weights in shards, without ever holding it, exports it with the command
line and watches the process. Pages of mapped files count as resident although the system can drop them at any time, so
anonymous memory, which it cannot drop, is reported beside them and is what the limit is about. Linux only.
"""

from __future__ import annotations

import argparse
import json
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
from random_checkpoint import Shape, write_checkpoint

INTERVAL_S = 0.05
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What to export and how much memory it may take."""

    gigabytes: float
    layers: int | None
    hidden: int
    intermediate: int
    vocabulary: int
    quantize: tuple[str, ...]
    verify: tuple[str, ...]
    limit_mib: int | None
    work: Path
    keep: bool


@dataclass(frozen=True, slots=True)
class Exported:
    """One export: peaks of its memory, time and result."""

    quantize: str
    verify: str
    seconds: float
    peak_anonymous_mib: float
    peak_resident_mib: float
    bundle_mib: float
    background_cores: float
    failed: str | None


def options_from_arguments() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    names = lambda text: tuple(text.split(","))  # noqa: E731 - an argparse type
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--layers", type=int, help="layers, instead of as many as the gigabytes hold")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--quantize", type=names, default=("int4",), help="of none, int8, int4")
    parser.add_argument("--verify", type=names, default=("none", "graph"), help="of none, graph, full")
    parser.add_argument("--limit-mib", type=int, help="stop an export whose anonymous memory passes this, and fail")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks/export"), help="checkpoint and bundle")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for the next run")
    return Options(**vars(parser.parse_args()))


def main(options: Options) -> int:
    """Write, export, report; 1 when an export failed or took more than the limit."""
    shape = Shape(options.hidden, options.intermediate, options.vocabulary)
    layers = options.layers or shape.layers_in(int(options.gigabytes * 1e9))
    model = options.work / f"model-{options.hidden}-{options.intermediate}-{options.vocabulary}-{layers}"
    copies = 3 if "none" in options.quantize else 2  # fp32 is twice the size of bf16
    need, free = copies * shape.nbytes(layers), shutil.disk_usage(existing_parent(options.work)).free
    if need > free:
        print(f"{need / 1e9:.1f} GB are needed below {options.work}, {free / 1e9:.1f} are free")
        return 1
    started = time.perf_counter()
    write_checkpoint(shape, layers, model)
    facts = {
        "layers": layers,
        "model_mib": shape.nbytes(layers) / MIB,
        "largest_tensor_mib": shape.largest_nbytes() / MIB,
        "write_seconds": time.perf_counter() - started,
        "limit_mib": options.limit_mib,
    }
    print(
        f"{layers} layers, {facts['model_mib']:.0f} MiB in bf16, largest tensor {facts['largest_tensor_mib']:.0f} MiB\n"
    )
    print("| quantize | verify | seconds | peak anonymous MiB | peak resident MiB | bundle MiB | others |")
    print("|---|---|---|---|---|---|---|")
    exports = []
    for quantize in options.quantize:
        for verify in options.verify:
            exports.append(export(model, options, quantize, verify))
            print_row(exports[-1])
    if not options.keep:
        remove(model)
    rounded = {name: round(value, 1) if isinstance(value, float) else value for name, value in facts.items()}
    print(json.dumps({**rounded, "exports": [asdict(item) for item in exports]}, separators=(",", ":")))
    return int(any(item.failed for item in exports))


def export(model: Path, options: Options, quantize: str, verify: str) -> Exported:
    """Export in a process of its own and watch its memory."""
    bundle = options.work / "bundle"
    remove(bundle)
    command = [sys.executable, "-m", "fmedge", "export", str(model), str(bundle), "--force"]
    command += ["--quantize", quantize, "--verify", verify]
    anonymous = resident = 0.0
    failed = None
    with Background() as background, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            now, highest = memory_of(process.pid)
            anonymous, resident = max(anonymous, now), max(resident, highest)
            if options.limit_mib is not None and anonymous > options.limit_mib and failed is None:
                failed = f"took more than {options.limit_mib} MiB"
                process.terminate()
            time.sleep(INTERVAL_S)
        if process.returncode and failed is None:
            log.seek(0)
            failed = " ".join(log.read().split())[-300:]
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) if bundle.is_dir() else 0
    remove(bundle)
    figures = [round(value, 2) for value in (background.seconds, anonymous, resident, size / MIB, background.cores)]
    return Exported(quantize, verify, *figures, failed)


def memory_of(pid: int) -> tuple[float, float]:
    """Anonymous memory now and the highest resident memory so far, in MiB; zeros once the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    found = dict(re.findall(r"(RssAnon|VmHWM):\s+(\d+) kB", status))
    return int(found.get("RssAnon", 0)) / 1024, int(found.get("VmHWM", 0)) / 1024


def print_row(item: Exported) -> None:
    """One line of the table."""
    figures = (item.seconds, item.peak_anonymous_mib, item.peak_resident_mib, item.bundle_mib)
    cells = [item.quantize, item.verify, *(f"{figure:.0f}" for figure in figures), f"{item.background_cores:.2f}"]
    print(f"| {' | '.join(cells)} |{' FAILED: ' + item.failed if item.failed else ''}", flush=True)


def existing_parent(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


if __name__ == "__main__":
    raise SystemExit(main(options_from_arguments()))
