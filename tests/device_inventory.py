"""The names that the real bindings have: TensorRT's of several versions, TensorRT-RTX's, and CUDA's driver API.

    python tests/device_inventory.py              # all of them, from the package index
    python tests/device_inventory.py 10.3.0       # one

writes tests/inventories/*.json: for each class its methods with their arguments, its properties, its values if it is an
enumeration. The bindings of TensorRT are wheels of a megabyte; what they link against is a library of gigabytes that
needs no GPU to be downloaded but is not wanted here. Nine C functions are all that an import asks of it, so empty
libraries of the same names, compiled on the spot, let the real module load. Nothing in it can be called then, and
nothing is: only names are read. Names are facts; no text of the bindings is kept.

No test runs this. It needs a C compiler, pip and an index that has the wheels.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent / "inventories"
TENSORRT_CLASSES = (
    *("Builder", "BuilderFlag", "DataType", "EngineInspector", "ExecutionContextAllocationStrategy"),
    *("HardwareCompatibilityLevel", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILogger"),
    *("INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache"),
    *("LayerInformationFormat", "Logger", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser"),
    *("OnnxParserFlag", "ParserError", "ProfilingVerbosity", "Runtime", "TensorIOMode", "TensorLocation"),
    *("ComputeCapability", "Dims"),
)
"""What building and running engines is made of; a class that a version lacks is absent from its inventory."""
TENSORRT_FUNCTIONS = ("init_libnvinfer_plugins",)
CUDA_FUNCTIONS = r"cu(Init|DriverGetVersion|Get|Device|Ctx|Mem|Stream|Graph)\w*"
CUDA_CLASSES = ("CUdevice_attribute", "CUresult", "CUstreamCaptureMode", "CUstream_flags", "CUmemorytype")
CUDA_CONSTANTS = ("CU_MEMHOSTALLOC_PORTABLE", "CU_MEMHOSTALLOC_DEVICEMAP", "CU_MEMHOSTALLOC_WRITECOMBINED")
CUDA_STRUCTS = ("CUDA_MEMCPY2D",)

WHEELS = {
    "10.3.0": ("tensorrt-cu12-bindings", "tensorrt_bindings", "tensorrt"),
    "10.7.0": ("tensorrt-cu12-bindings", "tensorrt_bindings", "tensorrt"),
    "10.13.3.9": ("tensorrt-cu12-bindings", "tensorrt_bindings", "tensorrt"),
    "10.16.1.11": ("tensorrt-cu12-bindings", "tensorrt_bindings", "tensorrt"),
    "11.4.0.106": ("tensorrt-cu13-bindings", "tensorrt_bindings", "tensorrt"),
    "1.7.1.116": ("tensorrt-rtx-cu13-bindings", "tensorrt_rtx_bindings", "tensorrt_rtx"),
    "12.9.4": ("cuda-bindings", "cuda.bindings.driver", "cuda"),
    "13.4.4": ("cuda-bindings", "cuda.bindings.driver", "cuda"),
}
"""By version: the distribution, the module in it, and what the inventory is of."""
LIBRARIES = {
    "tensorrt": ("libnvinfer.so", "libnvinfer_plugin.so", "libnvonnxparser.so"),
    "tensorrt_rtx": ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"),
    "cuda": (),
}
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry"),
    *("getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins"),
)


def main() -> None:
    """Write the inventories of the versions that were named, or of all."""
    if sys.argv[1:2] == ["--read"]:
        print(json.dumps(_read(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
        return
    for version in sys.argv[1:] or WHEELS:
        package, module, what = WHEELS[version]
        with tempfile.TemporaryDirectory() as name:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-script-location"]
            dependencies = [] if what == "cuda" else ["--no-deps"]
            subprocess.run([*pip, *dependencies, "--target", name, f"{package}=={version}"], check=True)
            # A process for each: two versions of one extension module cannot be loaded side by side.
            command = [sys.executable, __file__, "--read", module, what, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            path = FOLDER / f"{what}-{version}.json"
            path.write_text(_pretty({"version": version, **json.loads(done.stdout)}), "utf-8")
            print(f"{path} ({path.stat().st_size} bytes)", file=sys.stderr)


def _pretty(inventory: dict[str, Any]) -> str:
    """JSON with a line for each class and function, so that two versions can be compared by eye."""
    groups = []
    for group in ("constants", "functions", "classes"):
        lines = [f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(inventory[group].items())]
        groups.append(f' "{group}": {{\n' + ",\n".join(lines) + ("\n }" if lines else " }"))
    return "{\n" + ",\n".join([f' "version": {json.dumps(inventory["version"])}', *groups]) + "\n}\n"


def _read(name: str, what: str, folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(folder))
    if what != "cuda":
        _load_stubs(folder, name, what)
    module = importlib.import_module(name)
    return _cuda(module) if what == "cuda" else _tensorrt(module)


def _load_stubs(folder: Path, module: str, what: str) -> None:
    """Load empty libraries under the names that the bindings ask for."""
    needed = set()
    for library in (folder / module).glob("*.so"):
        needed |= set(re.findall(rb"lib\w+\.so\.\d+", library.read_bytes()))
    source = folder / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in sorted(found.decode() for found in needed):
        if name.partition(".so")[0] + ".so" in LIBRARIES[what]:
            stub = folder / name
            subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", stub, source], check=True)
            ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)


def _tensorrt(module: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in TENSORRT_CLASSES:
        kind = getattr(module, name, None)
        if kind is not None:
            found[name] = _class(kind)
        if hasattr(kind, "Severity"):
            found[f"{name}.Severity"] = _class(kind.Severity)
    functions = {
        name: _signatures(name, getattr(module, name).__doc__ or "")
        for name in TENSORRT_FUNCTIONS
        if hasattr(module, name)
    }
    return {"constants": {}, "functions": functions, "classes": found}


def _class(kind: type) -> dict[str, Any]:
    if hasattr(kind, "__members__"):
        # Some enumerations carry functions, which are nobody's members.
        return {"values": {name: int(value) for name, value in sorted(kind.__members__.items())}}
    methods: dict[str, list[list[str]]] = {}
    properties, writable = [], []
    for name in dir(kind):
        if name.startswith("_") and name != "__init__":
            continue
        member = inspect.getattr_static(kind, name)
        if isinstance(member, property):
            properties.append(name)
            if member.fset is not None:
                writable.append(name)
        elif (callable(member) and not inspect.isclass(member)) or isinstance(member, staticmethod):
            methods[name] = _signatures(name, getattr(kind, name).__doc__ or "")
    return {"methods": methods, "properties": properties, "writable": writable}


def _signatures(name: str, text: str) -> list[list[str]]:
    """The argument names of each overload; one that may be left out ends with "="."""
    found = []
    for line in text.splitlines():
        match = re.match(rf"\s*(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> .*)?$", line)
        if match:
            arguments = [part for part in _split(match[1]) if part != "*"]
            found.append(
                [re.split(r"[:=]", part)[0].strip() + ("=" if "=" in _default(part) else "") for part in arguments]
            )
    return [arguments for number, arguments in enumerate(found) if arguments not in found[:number]]


def _split(arguments: str) -> list[str]:
    """Arguments of a signature, whose types and defaults may have commas in brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(arguments):
        depth += letter in "[(<{"
        depth -= letter in "])>}"
        if letter == "," and depth == 0:
            parts.append(arguments[start:place].strip())
            start = place + 1
    return [part for part in (*parts, arguments[start:].strip()) if part]


def _default(part: str) -> str:
    """What follows the type of an argument, which is bare of comparison signs."""
    return part.partition(":")[2] or part


def _cuda(module: ModuleType) -> dict[str, Any]:
    functions = {}
    for name in dir(module):
        if (
            re.fullmatch(CUDA_FUNCTIONS, name)
            and callable(getattr(module, name))
            and not inspect.isclass(getattr(module, name))
        ):
            functions[name] = [[*inspect.signature(getattr(module, name)).parameters]]
    classes = {name: _class(getattr(module, name)) for name in CUDA_CLASSES}
    for name in CUDA_STRUCTS:
        members = [member for member in dir(getattr(module, name)) if not member.startswith("_") and member != "getPtr"]
        classes[name] = {"methods": {"__init__": [["self"]]}, "properties": members, "writable": members}
    constants = {name: int(getattr(module, name)) for name in CUDA_CONSTANTS}
    return {"constants": constants, "functions": functions, "classes": classes}


if __name__ == "__main__":
    main()
