"""What there is to say of a machine: a list of findings, the worst of which decides.

for finding in report(examine(), Path("out/bundle")):
    print(finding.section, finding.name, finding.value, finding.advice)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fmedge_runtimes.devices import GIB
from fmedge_runtimes.doctor.artifacts import of_bundle
from fmedge_runtimes.doctor.fat_binary import architectures
from fmedge_runtimes.doctor.file_tree import numbers
from fmedge_runtimes.doctor.finding import Finding, Level
from fmedge_runtimes.doctor.machine import Machine, found_version, version_of_number
from fmedge_runtimes.doctor.resources import (
    find_swap,
    governor,
    in_container,
    memory_available,
    memory_total,
    power_mode,
)
from fmedge_runtimes.doctor.software import provider_library

OLDEST_TENSORRT = (10, 3)
NO_DLA_NEEDED = (10, 16)
"""From here on TensorRT on Jetsons does not load libnvdla_compiler.so."""
SMALL_BOARD = 10 * GIB
CUDA = "CUDAExecutionProvider"


def report(machine: Machine, bundle: Path | None = None) -> list[Finding]:
    """All findings, in the order in which they are read. Raises BundleError for a folder that is no bundle."""
    found = [
        *_system(machine),
        *_memory(machine),
        *_gpu(machine),
        *_tensorrt(machine),
        *_onnxruntime(machine),
    ]
    return found if bundle is None else [*found, *of_bundle(machine, bundle)]


def _system(machine: Machine) -> Iterator[Finding]:
    section, board, tree = "machine", machine.board, machine.tree
    yield Finding(section, "system", machine.system)
    if machine.is_this:
        yield Finding(section, "python", machine.python)
    if board is not None:
        yield Finding(section, "board", board.model)
        yield _jetpack(machine)
        target = board.target(memory_total(tree))
        if target is not None:
            yield Finding(section, "target", target, advice=f"fmedge export MODEL BUNDLE --target {target}")
    mode = power_mode(tree)
    if mode is not None:
        advice = "sudo nvpmodel -q --verbose lists the modes; sudo nvpmodel -m NUMBER changes it"
        yield Finding(section, "power mode", mode, Level.NOTE, advice)
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
    if numbers(release.tensorrt) < OLDEST_TENSORRT:
        advice = "fmedge needs TensorRT 10.3 or later: update to JetPack 6.1 or later"
        return Finding("machine", "jetpack", value, Level.PROBLEM, advice)
    return Finding("machine", "jetpack", value)


def _memory(machine: Machine) -> Iterator[Finding]:
    section, tree = "memory", machine.tree
    total, free, swap = memory_total(tree), memory_available(tree), find_swap(tree)
    if total is not None and free is not None:
        yield Finding(section, "memory", f"{free / GIB:.1f} GiB free of {total / GIB:.1f}")
    text = f"{swap.disk / GIB:.1f} GiB on disk, {swap.zram / GIB:.1f} GiB compressed in memory"
    small = machine.board is not None and total is not None and total < SMALL_BOARD
    if small and not swap.disk:
        advice = "building an engine may need more than is free: add 4 GiB of swap on an NVMe disk before fmedge build"
        yield Finding(section, "swap", text, Level.WARNING, advice)
    else:
        yield Finding(section, "swap", text)


def _gpu(machine: Machine) -> Iterator[Finding]:
    section, driver = "gpu", machine.driver
    if driver.value is None and machine.is_this:
        expected = machine.board is not None
        advice = "in a container start it with --runtime nvidia or --gpus all" if expected else ""
        level = Level.PROBLEM if expected else Level.NOTE
        yield Finding(section, "driver", f"none that works: {driver.problem}", level, advice)
    if driver.value is not None:
        yield Finding(section, "driver", f"for CUDA {driver.value['cuda']}")
    for number, gpu in enumerate(machine.gpus):
        shared = ", shared with the CPU" if gpu.integrated else ""
        value = f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory / GIB:.1f} GiB{shared}"
        yield Finding(section, f"gpu {number}", value)
    if driver.value is not None and not machine.gpus:
        yield Finding(section, "gpu", "the driver sees none", Level.PROBLEM, "check CUDA_VISIBLE_DEVICES")
    if machine.cuda is not None:
        yield Finding(section, "cuda", machine.cuda)
    if machine.cudnn is not None:
        yield Finding(section, "cudnn", machine.cudnn.version)


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
    if machine.board is None or numbers(version) >= NO_DLA_NEEDED:
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
            advice = "pip uninstall tensorrt, so that the system's are seen, or install those of the library's version"
            text = f"{value}, and the library is {version}"
            yield Finding("tensorrt", "bindings", text, Level.PROBLEM, advice)
        else:
            yield Finding("tensorrt", "bindings", value)
        return
    for python, theirs in machine.system_bindings.items():
        yield _system_bindings(machine, python, theirs)
    if not machine.system_bindings:
        value = f"none: {machine.bindings.problem}" if machine.is_this else "none"
        advice = f"sudo apt install python3-libnvinfer, or pip install the bindings of TensorRT {version}"
        yield Finding("tensorrt", "bindings", value, Level.WARNING, advice)


def _system_bindings(machine: Machine, python: str, version: str) -> Finding:
    value = f"{version}, the system's, for Python {python}"
    if not machine.is_this:
        new = numbers(python) >= (3, 11)
        advice = "" if new else "fmedge needs Python 3.11: docs/device.md, TensorRT for another Python"
        return Finding("tensorrt", "bindings", value, Level.OK if new else Level.WARNING, advice)
    if numbers(machine.python)[:2] == numbers(python)[:2]:
        advice = "make the environment with python3 -m venv --system-site-packages"
        return Finding("tensorrt", "bindings", f"{value}, not seen from here", Level.WARNING, advice)
    advice = "docs/device.md, TensorRT for another Python, has the ways out"
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
