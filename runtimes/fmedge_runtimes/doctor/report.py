"""What there is to say of a machine: a list of findings, the worst of which decides.

for finding in report(examine(), Path("out/bundle")):
    print(finding.section, finding.name, finding.value, finding.advice)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fmedge_runtimes.devices import GIB
from fmedge_runtimes.doctor.artifacts import SECTION as BUNDLE
from fmedge_runtimes.doctor.artifacts import of_bundle
from fmedge_runtimes.doctor.board import WITH_DLA, Board
from fmedge_runtimes.doctor.driver import of_driver
from fmedge_runtimes.doctor.fat_binary import architectures
from fmedge_runtimes.doctor.file_tree import numbers
from fmedge_runtimes.doctor.finding import Finding, Level
from fmedge_runtimes.doctor.machine import Machine, found_version, version_of_number
from fmedge_runtimes.doctor.resources import (
    find_power,
    find_swap,
    governor,
    in_container,
    in_wsl,
    memory_available,
    memory_total,
)
from fmedge_runtimes.doctor.software import provider_library
from fmedge_runtimes.errors import FmedgeError

OLDEST_TENSORRT = (10, 3)
OLDEST_PYTHON = (3, 10)
PYTHON_OF_ONNXRUNTIME = (3, 11)
NO_DLA_NEEDED = (10, 16)
"""From here on TensorRT on Jetsons does not load libnvdla_compiler.so."""
SMALL_BOARD = 10 * GIB
OLDEST_GPU = (8, 7)
"""Of the Jetsons for which there is JetPack 6."""
LONGEST = 2000
"""Letters of a value: a damaged file can hold any number."""
CUDA = "CUDAExecutionProvider"


def report(machine: Machine, bundle: Path | None = None) -> list[Finding]:
    """All findings, in the order in which they are read. Nothing is raised: a folder that is no bundle is a finding."""
    found = [
        *_system(machine),
        *_memory(machine),
        *of_driver(machine),
        *_tensorrt(machine),
        *_onnxruntime(machine),
        *(() if bundle is None else _bundle(machine, bundle)),
    ]
    return [replace(item, value=_one_line(item.value) or "empty", advice=_one_line(item.advice)) for item in found]


def _one_line(text: str) -> str:
    """Text of files that can hold anything, fit for a terminal: no line breaks and no control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()[:LONGEST]


def _bundle(machine: Machine, folder: Path) -> Iterator[Finding]:
    try:
        yield from of_bundle(machine, folder)
    except (FmedgeError, OSError) as error:
        yield Finding(BUNDLE, "folder", str(error), Level.PROBLEM)


def _system(machine: Machine) -> Iterator[Finding]:
    section, board, tree = "machine", machine.board, machine.tree
    yield Finding(section, "system", machine.system)
    if machine.is_this:
        yield Finding(section, "python", machine.python)
        yield Finding(section, "environment", machine.environment)
    if in_wsl(tree):
        yield Finding(section, "wsl", "yes: the driver is that of Windows", Level.NOTE)
    if board is not None:
        yield Finding(section, "board", board.model)
        yield _jetpack(machine)
        target = board.target(memory_total(tree))
        if target is not None:
            yield Finding(section, "target", target, advice=f"fmedge export MODEL BUNDLE --target {target}")
    power = find_power(tree)
    if power is not None and power.fastest is None:
        yield Finding(section, "power mode", power.mode)
    elif power is not None and power.fastest is not None:
        advice = f"sudo nvpmodel -m {power.fastest[0]} takes {power.fastest[1]}, which is faster and warmer"
        yield Finding(section, "power mode", power.mode, Level.NOTE, advice)
    if board is not None and governor(tree) not in (None, "performance"):
        advice = "sudo jetson_clocks holds the clocks high while you measure"
        yield Finding(section, "clock", str(governor(tree)), Level.NOTE, advice)
    if in_container(tree):
        advice = "" if board is None else "started with --runtime nvidia? the board's libraries come in by that"
        yield Finding(section, "container", "yes", Level.NOTE, advice)


def _jetpack(machine: Machine) -> Finding:
    board = machine.board
    if board is None or not board.l4t:
        advice = "in a container mount /etc/nv_tegra_release from the host, so that the JetPack is known"
        return Finding("machine", "jetpack", "unknown: there is no /etc/nv_tegra_release", Level.WARNING, advice)
    if board.release is None:
        advice = "fmedge check knows TensorRT by its version: fmedge check BUNDLE --target VERSION"
        return Finding("machine", "jetpack", f"unknown: L4T {board.l4t}", Level.WARNING, advice)
    release = board.release
    value = f"{release.jetpack} (L4T {board.l4t}: CUDA {release.cuda}, TensorRT {release.tensorrt})"
    newer = machine.tensorrt is not None and numbers(machine.tensorrt.version) >= OLDEST_TENSORRT  # in a container
    if numbers(release.tensorrt) < OLDEST_TENSORRT and not newer:
        return Finding("machine", "jetpack", value, Level.PROBLEM, _update(board))
    return Finding("machine", "jetpack", value)


def _update(board: Board) -> str:
    """What to do on a board whose TensorRT is too old."""
    if board.capability is not None and numbers(board.capability) < OLDEST_GPU:
        return "this board gets no TensorRT 10: run bundles of --target cpu, with a Python of 3.10 or newer"
    return "fmedge needs TensorRT 10.3 or later: flash JetPack 6.2 or 7.2 (docs/device.md)"


def _memory(machine: Machine) -> Iterator[Finding]:
    section, tree = "memory", machine.tree
    total, free, swap = memory_total(tree), memory_available(tree), find_swap(tree)
    if total is not None and free is not None:
        yield Finding(section, "memory", f"{free / GIB:.1f} GiB free of {total / GIB:.1f}")
    if swap is None:
        return
    text = f"{swap.disk / GIB:.1f} GiB on disk, {swap.zram / GIB:.1f} GiB compressed in memory"
    small = machine.board is not None and total is not None and total < SMALL_BOARD
    if small and not swap.disk:
        advice = "building an engine may need more than is free: add 4 GiB of swap on an NVMe disk before fmedge build"
        yield Finding(section, "swap", text, Level.WARNING, advice)
    else:
        yield Finding(section, "swap", text)


def _tensorrt(machine: Machine) -> Iterator[Finding]:
    section, library = "tensorrt", machine.tensorrt
    if library is None:
        expected = machine.board is not None
        advice = "sudo apt install nvidia-jetpack (or tensorrt); in a container take an image that has it"
        yield Finding(section, "library", "none", Level.WARNING if expected else Level.NOTE, advice if expected else "")
        return
    loaded = machine.tensorrt_loads.value
    version = library.version if loaded is None else version_of_number(int(loaded["number"]))
    if loaded is None and machine.is_this:
        advice = "ldd on that file shows which library is missing"
        value = f"{library.version} at {library.path} does not load: {machine.tensorrt_loads.problem}"
        yield Finding(section, "library", value, Level.PROBLEM, advice)
    elif numbers(version) < OLDEST_TENSORRT:
        advice = "fmedge needs 10.3 or later"
        yield Finding(section, "library", f"{version} ({library.path})", Level.PROBLEM, advice)
    else:
        yield Finding(section, "library", f"{version} ({library.path})")
    yield from _dla(machine, version)
    yield from _bindings(machine, version)


def _dla(machine: Machine, version: str) -> Iterator[Finding]:
    """Older TensorRT on a Jetson needs a library that newer JetPacks have dropped: a container of another release."""
    if machine.board is None or machine.board.chip not in WITH_DLA or numbers(version) >= NO_DLA_NEEDED:
        return
    if not machine.tree.names("/usr/lib/aarch64-linux-gnu/**/libnvdla_compiler.so*"):
        advice = "use a container, or a TensorRT, of the JetPack that the host has"
        value = f"libnvdla_compiler.so is missing, which TensorRT {version} loads"
        yield Finding("tensorrt", "dla", value, Level.WARNING, advice)


def _bindings(machine: Machine, version: str) -> Iterator[Finding]:
    """Whether Python's bindings are there, for this Python, and of the library's version."""
    found = found_version(machine.bindings)
    if found is not None:
        value = f"{found} ({machine.bindings.value and machine.bindings.value['file']})"
        if numbers(found)[:3] != numbers(version)[:3]:
            advice = (
                "pip uninstall tensorrt, so that the system's are seen, or install those of the library's version: "
            )
            advice += "apt list -a python3-libnvinfer, then sudo apt install python3-libnvinfer=VERSION"
            text = f"{value}, and the library is {version}"
            yield Finding("tensorrt", "bindings", text, Level.PROBLEM, advice)
        else:
            yield Finding("tensorrt", "bindings", value)
        return
    for python, theirs in machine.system_bindings.items():
        yield _system_bindings(machine, python, theirs, version)
    if not machine.system_bindings:
        value = f"none: {machine.bindings.problem}" if machine.is_this else "none"
        advice = f"sudo apt install python3-libnvinfer, or pip install the bindings of TensorRT {version}"
        yield Finding("tensorrt", "bindings", value, Level.WARNING, advice)


def _system_bindings(machine: Machine, python: str, version: str, library: str) -> Finding:
    value = f"{version}, the system's, for Python {python}"
    if numbers(version)[:3] != numbers(library)[:3]:
        advice = "apt list -a python3-libnvinfer, then sudo apt install python3-libnvinfer=VERSION, the library's"
        return Finding("tensorrt", "bindings", f"{value}, and the library is {library}", Level.PROBLEM, advice)
    if not machine.is_this:
        new = numbers(python)[1:] == () or numbers(python) >= OLDEST_PYTHON
        advice = "" if new else "fmedge needs Python 3.10 or newer, with TensorRT's bindings for it"
        return Finding("tensorrt", "bindings", value, Level.OK if new else Level.WARNING, advice)
    if numbers(machine.python)[: len(numbers(python))] == numbers(python):
        advice = "make the environment anew: /usr/bin/python3 -m venv --system-site-packages FOLDER"
        return Finding("tensorrt", "bindings", f"{value}, not seen from here", Level.WARNING, advice)
    advice = f"make the environment with that Python: /usr/bin/python{python} -m venv --system-site-packages FOLDER"
    return Finding("tensorrt", "bindings", f"{value}, and this is {machine.python}", Level.WARNING, advice)


def _onnxruntime(machine: Machine) -> Iterator[Finding]:
    if not machine.is_this:
        return
    section, installed = "onnxruntime", machine.packages
    if "onnxruntime" in installed and "onnxruntime-gpu" in installed:
        advice = "they overwrite each other's files: pip uninstall both, then install the one you need"
        yield Finding(section, "packages", "onnxruntime and onnxruntime-gpu", Level.PROBLEM, advice)
    version = found_version(machine.onnxruntime)
    if version is None:
        missing = "onnxruntime" not in installed and "onnxruntime-gpu" not in installed
        if missing and numbers(machine.python) < PYTHON_OF_ONNXRUNTIME:
            value = f"not installed: its wheels need Python 3.11, and this is {machine.python}; engines run without it"
            yield Finding(section, "onnxruntime", value, Level.NOTE)
            return
        value = "not installed" if missing else f"does not import: {machine.onnxruntime.problem}"
        advice = "pip install 'fmedge[cpu]' (or fmedge[gpu])" if missing else ""
        yield Finding(section, "onnxruntime", value, Level.WARNING if missing else Level.PROBLEM, advice)
        return
    yield Finding(section, "onnxruntime", f"{version}: {', '.join(machine.providers)}")
    yield from _cuda_provider(machine)


def _cuda_provider(machine: Machine) -> Iterator[Finding]:
    """That a provider is listed proves nothing: the wheel must have code for this GPU."""
    if CUDA not in machine.providers:
        if machine.gpus:
            advice = "pip uninstall onnxruntime, then pip install 'fmedge[gpu]'; on a Jetson docs/device.md"
            yield Finding("onnxruntime", "cuda", "this build has no CUDA", Level.NOTE, advice)
        return
    path = provider_library("cuda")
    try:
        code = None if path is None else architectures(path)
    except (OSError, ValueError):
        code = None
    if code is None or not code.machine_code | code.ptx or machine.capability is None:
        yield Finding("onnxruntime", "cuda", "it is not known which GPUs this build has code for", Level.NOTE)
        return
    has = ", ".join(f"{number // 10}.{number % 10}" for number in sorted(code.machine_code))
    if code.serve(machine.capability):
        yield Finding("onnxruntime", "cuda", f"this build has code for {has}")
    else:
        advice = "take a build for this GPU (docs/device.md), or TensorRT: fmedge build"
        value = f"this build has code for {has}, and the GPU is {machine.capability}: it would fail when it runs"
        yield Finding("onnxruntime", "cuda", value, Level.PROBLEM, advice)
