"""What there is to say of the NVIDIA driver and the GPUs that it lists, and what helps when it does not answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from fmedge_runtimes.devices import GIB
from fmedge_runtimes.doctor.file_tree import FileTree, numbers
from fmedge_runtimes.doctor.finding import Finding, Level
from fmedge_runtimes.doctor.machine import Machine
from fmedge_runtimes.doctor.resources import in_container, in_wsl

SECTION = "gpu"
KERNEL_MODULE = "/proc/driver/nvidia/version"
REBOOT = "reboot: the driver was updated, and the old one is still loaded"
CURES: Mapping[str, str] = MappingProxyType(
    {
        "CUDA_ERROR_NO_DEVICE": "check CUDA_VISIBLE_DEVICES; in a container --runtime nvidia or --gpus all",
        "CUDA_ERROR_INVALID_DEVICE": "check CUDA_VISIBLE_DEVICES: a MIG device is named by its UUID (nvidia-smi -L)",
        "CUDA_ERROR_STUB_LIBRARY": "take the CUDA toolkit's stubs folder out of LD_LIBRARY_PATH",
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": REBOOT,
        "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "remove the package cuda-compat, or its folder from "
        "LD_LIBRARY_PATH: only data-centre GPUs take a newer CUDA by it",
        "CUDA_ERROR_SYSTEM_NOT_READY": "start NVIDIA's services: systemctl status nvidia-fabricmanager",
        "CUDA_ERROR_OPERATING_SYSTEM": "sudo usermod -aG video,render $USER, then log in again: /dev is closed to you",
        "CUDA_ERROR_NOT_PERMITTED": "sudo usermod -aG video,render $USER, then log in again; on a virtual GPU see its "
        "licence (nvidia-smi -q)",
        "CUDA_ERROR_UNKNOWN": "sudo modprobe nvidia_uvm, or reboot: it often follows an update or a suspended machine",
        "CUDA_ERROR_NOT_INITIALIZED": "sudo modprobe nvidia_uvm, or reboot",
        "CUDA_ERROR_OUT_OF_MEMORY": "the GPU is full: close other programs (nvidia-smi, or tegrastats on a Jetson)",
        "CUDA_ERROR_DEVICES_UNAVAILABLE": "another program holds the GPU alone (nvidia-smi -q -d COMPUTE)",
    }
)
"""CUDA's names of errors (cuda.h) and what usually helps."""


def of_driver(machine: Machine) -> Iterator[Finding]:
    """Findings on the driver, the GPUs and the CUDA beside them."""
    yield from _agreement(machine)
    driver = machine.driver
    if driver.value is None and machine.is_this:
        yield _no_driver(machine)
    if driver.value is not None:
        yield Finding(SECTION, "driver", f"for CUDA {driver.value['cuda']}")
    for number, gpu in enumerate(machine.gpus):
        shared = ", shared with the CPU" if gpu.integrated else ""
        value = f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory / GIB:.1f} GiB{shared}"
        yield Finding(SECTION, f"gpu {number}", value)
    if driver.value is not None and not machine.gpus:
        yield Finding(SECTION, "gpu", "the driver sees none", Level.PROBLEM, "check CUDA_VISIBLE_DEVICES")
    yield from _cuda(machine)
    if machine.cudnn is not None:
        yield Finding(SECTION, "cudnn", machine.cudnn.version)


def kernel_version(tree: FileTree) -> str | None:
    """The version of NVIDIA's kernel module that is loaded."""
    found = re.search(
        r"Kernel Module(?: +for +\S+)? +(\d{3,4}(?:\.\d{1,4})+)", tree.text(KERNEL_MODULE) or "", re.ASCII
    )
    return found.group(1) if found else None


def _agreement(machine: Machine) -> Iterator[Finding]:
    """The kernel's half of the driver and the program's half must be of one version."""
    kernel, library = kernel_version(machine.tree), machine.driver_library
    # A Jetson's and WSL's libcuda.so.1.1 have no version of the driver's; a container's is the host's.
    if kernel is None or library is None or numbers(library.version) < (100,):
        return
    if numbers(kernel) != numbers(library.version):
        value = f"the kernel has {kernel} loaded, and the library is {library.version} ({library.path})"
        yield Finding(SECTION, "driver files", value, Level.PROBLEM, REBOOT)


def _no_driver(machine: Machine) -> Finding:
    problem = machine.driver.problem
    advice = next((cure for name, cure in CURES.items() if re.search(rf"\b{name}\b", problem)), "")
    expected = machine.board is not None or kernel_version(machine.tree) is not None
    if not advice and in_wsl(machine.tree):
        advice = "install NVIDIA's driver in Windows (none in Linux), then wsl --shutdown"
    elif not advice and expected and in_container(machine.tree):
        advice = "in a container start it with --runtime nvidia or --gpus all"
    elif not advice and expected:
        advice = "sudo dmesg | grep -i nv says why; sudo apt install --reinstall nvidia-l4t-cuda on a Jetson, or reboot"
    level = Level.PROBLEM if expected else Level.WARNING if advice else Level.NOTE
    return Finding(SECTION, "driver", f"none that works: {problem}", level, advice)


def _same(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two versions agree as far as both are known."""
    return all(left == right for left, right in zip(one, other, strict=False))


def _cuda(machine: Machine) -> Iterator[Finding]:
    """CUDA's libraries, and whether the driver is new enough for them."""
    driver = None if machine.driver.value is None else numbers(str(machine.driver.value["cuda"]))[:1]
    if machine.cuda is not None:
        others = [version for version in machine.toolkits if not _same(numbers(version), numbers(machine.cuda))]
        beside = f" (also installed: {', '.join(others)})" if others else ""
        value = f"{machine.cuda}{beside}"
        if driver is not None and driver < numbers(machine.cuda)[:1]:
            advice = "update the driver, or install what is for its CUDA"
            value = f"{value}, and the driver is for CUDA {'.'.join(map(str, driver))}"
            yield Finding(SECTION, "cuda", value, Level.WARNING, advice)
        else:
            yield Finding(SECTION, "cuda", value)
    bindings = machine.packages.get("cuda-bindings")
    if bindings is not None and driver is not None and driver < numbers(bindings)[:1]:
        value = f"{bindings}, and the driver is for CUDA {'.'.join(map(str, driver))}"
        advice = f"pip install 'cuda-bindings<{driver[0] + 1}'"
        yield Finding(SECTION, "cuda-bindings", value, Level.PROBLEM, advice)
