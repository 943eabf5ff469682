"""Questions that can end the process that asks them: each is asked in a child, and a crash is an answer like others.

A driver that does not fit its kernel, a TensorRT without a GPU, or a library with a missing symbol kill a process; so
`fmedge doctor` loads none of them itself.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

WITHOUT_FOLDER = """
import sys
sys.path[:] = [place for place in sys.path if place]
"""
"""Before each program: a folder or file of the current directory must not be taken for the package of its name."""

SECONDS = 60
"""An import of ONNX Runtime or TensorRT takes seconds on a small board."""

GPUS = """
import ctypes, json, sys
try:
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
except OSError as error:
    raise SystemExit(f"there is no NVIDIA driver ({error})")
def ask(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        raise SystemExit(f"{name} failed: {(text.value or str(code).encode()).decode()}")
ask("cuInit", 0)
version, count = ctypes.c_int(), ctypes.c_int()
ask("cuDriverGetVersion", ctypes.byref(version))
ask("cuDeviceGetCount", ctypes.byref(count))
gpus = []
for number in range(count.value):
    device, name, total = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    ask("cuDeviceGet", ctypes.byref(device), number)
    ask("cuDeviceGetName", name, 256, device)
    ask("cuDeviceTotalMem_v2", ctypes.byref(total), device)
    def attribute(which):
        value = ctypes.c_int()
        ask("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value
    gpus.append({"name": name.value.decode("utf-8", "replace"), "memory": total.value,
                 "capability": f"{attribute(75)}.{attribute(76)}", "integrated": bool(attribute(18))})
major, minor = divmod(version.value, 1000)
print(json.dumps({"cuda": f"{major}.{minor // 10}", "gpus": gpus}))
"""
"""The numbers are CUdevice_attribute's COMPUTE_CAPABILITY_MAJOR, _MINOR and INTEGRATED."""

ONNXRUNTIME = """
import json, onnxruntime
print(json.dumps({"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}))
"""

BINDINGS = """
import json, tensorrt
print(json.dumps({"version": tensorrt.__version__, "file": tensorrt.__file__}))
"""

TENSORRT_LIBRARY = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
number = int(library.getInferLibVersion())
print(json.dumps({"number": number}))
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child said, or why it said nothing."""

    value: dict[str, Any] | None
    problem: str = ""


def ask(program: str, *arguments: str) -> Answer:
    """Run a Python program in a child; it prints one JSON object, or exits with a message."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", WITHOUT_FOLDER + program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(None, f"it gave no answer: {error}")
    if child.returncode < 0:
        return Answer(None, f"it crashed ({_signal(-child.returncode)})")
    lines = child.stdout.strip().splitlines()
    if child.returncode == 0 and lines:
        try:
            value = json.loads(lines[-1])
        except (ValueError, RecursionError):
            value = None
        return Answer(value) if isinstance(value, dict) else Answer(None, f"it said {lines[-1]!r}")
    messages = child.stderr.strip().splitlines()
    return Answer(None, messages[-1] if messages else f"it ended with {child.returncode}")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
