"""What is installed, told from files and packages: CUDA, cuDNN, TensorRT, and the Python packages that fmedge uses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fmedge_runtimes.doctor.file_tree import FileTree, numbers, version_in

LIBRARY_FOLDERS = (
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/cuda/lib64",
    "/usr/local/tensorrt/lib",
    "/opt/tensorrt/lib",
)
CUDA_RECORD = "/usr/local/cuda/version.json"
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


def find_library(tree: FileTree, name: str, site: Path | None) -> Library | None:
    """The first of a name (libnvinfer) along the usual folders, then in this environment's packages.

    Of several in a folder it is the newest, and its version is the longest that its names have.
    """
    places = [tree.path(folder) for folder in LIBRARY_FOLDERS]
    places += [place for pattern in PIP_LIBRARIES for place in (sorted(site.glob(pattern)) if site is not None else ())]
    for place in places:
        try:
            found = [(numbers(version_in(path.name)), path) for path in place.glob(f"{name}.so.*")]
        except OSError:
            continue
        if found:
            version, path = max(found, key=lambda item: (item[0], item[1].name))
            return Library(path, ".".join(map(str, version)))
    return None


def cuda_version(tree: FileTree, site: Path | None) -> str | None:
    """The version of the CUDA toolkit, or of its runtime library alone."""
    text = tree.text(CUDA_RECORD)
    if text is not None:
        try:
            return str(json.loads(text)["cuda"]["version"])
        except (ValueError, KeyError, TypeError):
            pass  # a damaged record: the library below tells, too
    library = find_library(tree, "libcudart", site)
    return None if library is None else library.version


def system_bindings(tree: FileTree) -> dict[str, str]:
    """TensorRT's bindings among the system's packages: the version of each Python that has them.

    Debian's folder dist-packages serves one Python, which the names of the compiled modules tell.
    """
    found = {}
    for path in tree.names(f"{SYSTEM_PACKAGES}/tensorrt-*.dist-info"):
        version = path.name.removeprefix("tensorrt-").removesuffix(".dist-info")
        compiled = sorted((path.parent / "tensorrt").glob("*.so"))
        tags = [tag.group(1) for file in compiled if (tag := re.search(r"cpython-3(\d+)", file.name))]
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
