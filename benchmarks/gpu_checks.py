"""Every check that needs an NVIDIA GPU, in one run: tests, text and images. The last thing printed is a table.

    python benchmarks/gpu_checks.py                             # onnxruntime-gpu is installed already
    python benchmarks/gpu_checks.py --wheels wheels             # a folder of wheels for a machine without a network
    python benchmarks/gpu_checks.py --only tests

A wheel that is too large to be carried may lie there in parts, NAME.whl.00, NAME.whl.01 and so on (`split -b 60M -d`).
Exits with 1 when a check failed, or there is no GPU. The table's rows are for docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from comma_list import words

HERE = Path(__file__).parent
LIMIT_S = 3600
PART = re.compile(r"(?P<wheel>.+\.whl)\.(?P<number>\d+)")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    check: str
    result: str
    good: bool


def main() -> int:
    """Install, check, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first, whole or in parts")
    parser.add_argument("--only", type=words, default=tuple(CHECKS), help=f"of {', '.join(CHECKS)}")
    options = parser.parse_args()
    unknown = set(options.only) - set(CHECKS)
    if unknown:
        parser.error(f"there is no check {min(unknown)}")
    try:
        if options.wheels is not None:
            install(options.wheels)
        where = device()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"gpu_checks: {error}", file=sys.stderr)
        return 1
    rows: list[Row] = []
    for name in options.only:
        print(f"\n== {name}", flush=True)
        try:
            rows += CHECKS[name]()
        except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
            rows.append(Row(name, f"failed: {str(error)[:200]}", good=False))
    print(f"\n{where}\n\n| check | result | |\n|---|---|---|")
    for row in rows:
        print(f"| {row.check} | {row.result} | {'ok' if row.good else '**failed**'} |")
    return 0 if all(row.good for row in rows) else 1


def install(folder: Path) -> None:
    """Put wheels together and install them in place of the CPU's onnxruntime, which has the same module."""
    with tempfile.TemporaryDirectory() as whole:
        wheels = [*folder.glob("*.whl"), *joined(folder, Path(whole))]
        if not wheels:
            raise RuntimeError(f"{folder} holds no wheels, whole or in parts (NAME.whl.00)")
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "uninstall", "--yes", "--quiet", "onnxruntime"], check=True, timeout=LIMIT_S)
        command = [*pip, "install", "--quiet", "--no-index", "--no-deps", *map(str, wheels)]
        subprocess.run(command, check=True, timeout=LIMIT_S)


def joined(folder: Path, target: Path) -> Iterator[Path]:
    """Wheels put together from their parts. Raises RuntimeError when one is missing."""
    parts: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = PART.fullmatch(path.name)
        if match is not None:
            parts.setdefault(match["wheel"], {})[int(match["number"])] = path
    for name, numbered in parts.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise RuntimeError(f"{folder / name}: parts {sorted(numbered)} are there, one is missing")
        with (target / name).open("wb") as wheel:
            for number in sorted(numbered):
                wheel.write(numbered[number].read_bytes())
        yield target / name


def device() -> str:
    """What is measured on, in words. Raises RuntimeError without a GPU, or without onnxruntime for it.

    In a process of its own: this one may have loaded another onnxruntime before the wheels were installed.
    """
    script = (
        "import onnxruntime\n"
        "from fmedge_runtimes.cuda import open_cuda\n"
        "from fmedge_runtimes.device import Device\n"
        "gpu = open_cuda(Device('cuda')).device\n"
        "if 'CUDAExecutionProvider' not in onnxruntime.get_available_providers():\n"
        "    raise SystemExit('the installed onnxruntime has no CUDAExecutionProvider; give --wheels')\n"
        "print(f'{gpu.name}, {gpu.total / 2**30:.0f} GiB, onnxruntime {onnxruntime.__version__}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1].partition("Error: ")[2] or done.stderr.strip())
    return done.stdout.strip()


def check_tests() -> Iterator[Row]:
    """`make test-gpu`, one row for each test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--run-gpu", "-q", f"--junitxml={report}"]
        subprocess.run([*command, "tests"], cwd=HERE.parent, timeout=LIMIT_S, check=False)
        from xml.etree import ElementTree

        for case in ElementTree.parse(report).iter("testcase"):
            found = [child for child in case if child.tag in ("failure", "error", "skipped")]
            message = (found[0].get("message") or found[0].tag).splitlines()[0][:160] if found else "passed"
            yield Row(f"`{case.get('name')}`", message.replace("|", "/"), good=not found)


def check_text() -> Iterator[Row]:
    """Rates of the text benchmark."""
    for row in benchmark("text.py", "--models", "smol135", "--only", "fmedge/", "--block-sizes", "32"):
        yield Row(
            f"{row['model']} {row['form']} batch {row['batch']}",
            f"{row['prefill_tokens_per_s'][0]:.0f} prefill, {row['decode_tokens_per_s'][0]:.0f} decode tokens/s",
            good=True,
        )


def check_images() -> Iterator[Row]:
    """Seconds of the image benchmark."""
    for row in benchmark("image.py", "--cases", "sd15-small", "--only", "fmedge/", "--quantize", "none,int8,int4"):
        yield Row(
            f"{row['case']} {row['unit']} {row['form']} batch {row['batch']}",
            f"{row['seconds'][0] * 1e3:.1f} ms",
            good=True,
        )


def benchmark(script: str, *arguments: str) -> Sequence[Mapping[str, Any]]:
    """The rows of a benchmark on the GPU. Raises ValueError when some of it was left out."""
    command = [sys.executable, str(HERE / script), "--device", "cuda", "--rounds", "1", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True, env=environment)
    print(done.stdout, flush=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["left_out"] or not found["rows"]:
        raise ValueError("; ".join(found["left_out"]) or f"{script} measured nothing")
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    return rows


CHECKS: Mapping[str, Callable[[], Iterator[Row]]] = MappingProxyType(
    {"tests": check_tests, "text": check_text, "images": check_images}
)

if __name__ == "__main__":
    sys.exit(main())
