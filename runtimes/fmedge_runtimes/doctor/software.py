"""What is installed, told from files and packages: CUDA, cuDNN, TensorRT, and the Python packages that fmedge uses."""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fmedge_runtimes.doctor.file_tree import FileTree, numbers, version_in

LIBRARY_FOLDERS = (
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu/nvidia",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/wsl/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/cuda/lib64",
    "/usr/local/tensorrt/lib",
    "/opt/tensorrt/lib",
)
CUDA_RECORD = "/usr/local/cuda/version.json"
TOOLKITS = "/usr/local/cuda-*"
SYSTEM_PACKAGES = "/usr/lib/python3*/dist-packages"
PIP_LIBRARIES = ("nvidia/*/lib", "tensorrt_libs", "tensorrt_rtx_libs")
"""Where wheels put NVIDIA's libraries, from site-packages."""
PACKAGES = (
    "fmedge",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12-bindings",
    "tensorrt-cu13-bindings",
    "tensorrt-rtx-cu13-bindings",
    "cuda-bindings",
    "torch",
)


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library."""

    path: Path
    version: str


def own_folders() -> Sequence[Path]:
    """Where the programs of this environment find libraries besides the system's folders."""
    return tuple(_own_folders())


def _own_folders() -> Iterator[Path]:
    yield from (Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder)
    for pattern in PIP_LIBRARIES:
        yield from sorted(Path(sysconfig.get_path("purelib")).glob(pattern))
    if _is_conda():
        yield Path(sys.prefix, "lib")


def find_library(tree: FileTree, name: str, own: Sequence[Path]) -> Library | None:
    """The first of a name (libnvinfer) along the usual folders, then along those of this environment.

    Of several in a folder it is the newest, and its version is the longest that its names have.
    """
    folders: tuple[str | Path, ...] = (*LIBRARY_FOLDERS, *own)
    for folder in folders:
        try:
            place = tree.path(folder) if isinstance(folder, str) else folder
            named = [(numbers(version_in(path.name)), path) for path in place.glob(f"{name}.so.*")]
        except (OSError, RuntimeError):
            continue
        found = [item for item in named if item[0]]  # without libnvinfer.so.10.old
        if found:
            version, path = max(found, key=lambda item: (item[0], item[1].name))
            return Library(path, ".".join(map(str, version)))
    return None


def find_toolkits(tree: FileTree) -> Sequence[str]:
    """The CUDA toolkits beside each other, by the names of their folders."""
    names = (path.name.removeprefix("cuda-") for path in tree.names(TOOLKITS))
    return sorted((name for name in names if re.fullmatch(r"\d{1,3}\.\d{1,3}", name, re.ASCII)), key=numbers)


def find_environment() -> str:
    """What kind of environment this Python is of: it decides whether the system's TensorRT can be seen."""
    if _is_conda():
        return f"conda, {sys.prefix}: the system's packages are hidden"
    if sys.prefix == sys.base_prefix:
        return "the system's Python, without a virtual environment"
    try:
        config = Path(sys.prefix, "pyvenv.cfg").read_text("utf-8", "replace")
    except OSError:
        config = ""
    seen = re.search(r"^include-system-site-packages\s*=\s*true", config, re.MULTILINE | re.IGNORECASE)
    return f"virtual, {sys.prefix}: the system's packages are {'seen' if seen else 'hidden'}"


def _is_conda() -> bool:
    return Path(sys.prefix, "conda-meta").is_dir()


def cuda_version(tree: FileTree, own: Sequence[Path]) -> str | None:
    """The version of the CUDA toolkit, or of its runtime library alone."""
    text = tree.text(CUDA_RECORD)
    if text is not None:
        try:
            return str(json.loads(text)["cuda"]["version"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # a damaged record: the library below tells, too
    library = find_library(tree, "libcudart", own)
    return None if library is None else library.version


def system_bindings(tree: FileTree) -> dict[str, str]:
    """TensorRT's bindings among the system's packages: the version of each Python that has them.

    Debian's folder python3/dist-packages serves one Python, which the names of the compiled modules tell if they have
    a tag; NVIDIA's packages have none, and lie in python3.10/dist-packages.
    """
    found = {}
    for path in tree.names(f"{SYSTEM_PACKAGES}/tensorrt-*.dist-info"):
        version = path.name.removeprefix("tensorrt-").removesuffix(".dist-info")
        try:
            compiled = sorted((path.parent / "tensorrt").glob("*.so"))
        except (OSError, RuntimeError):
            compiled = []
        tags = [tag.group(1) for file in compiled if (tag := re.search(r"cpython-3(\d{1,3})", file.name, re.ASCII))]
        python = f"3.{tags[0]}" if tags else path.parent.parent.name.removeprefix("python")
        found[python] = version
    return found


def packages() -> Mapping[str, str]:
    """The versions of the packages in this environment that matter here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def provider_library(name: str) -> Path | None:
    """The library of an execution provider ("cuda") in the installed ONNX Runtime; it is not imported."""
    for package in ("onnxruntime-gpu", "onnxruntime"):
        try:
            files = metadata.distribution(package).files or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == f"libonnxruntime_providers_{name}.so":
                return Path(str(file.locate()))
    return None
