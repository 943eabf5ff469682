"""Every name of TensorRT and CUDA that our code writes down is in the real bindings of every version it is for.

Read from the source, so that code which no double reaches is checked, too. A name that some versions lack must stand
behind hasattr or getattr. It proves nothing about what the calls do.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fmedge_converters
import fmedge_runtimes
import pytest
from strict_double import CUDA, RTX, TENSORRT, read_inventory

RUNTIME, CONVERTERS = Path(fmedge_runtimes.__path__[0]), Path(fmedge_converters.__path__[0])
FILES = (
    *sorted(RUNTIME.glob("tensorrt_*.py")),
    *sorted((CONVERTERS / "engines").glob("*.py")),
)
CLASSES = {
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "runtime": "Runtime",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "builder": "Builder",
    "cache": "ITimingCache",
    "tensor": "ITensor",
    "error": "ParserError",
    "profile": "IOptimizationProfile",
}
"""What TensorRT's objects are called in our code."""
OWN = {
    "path",
    "facts",
    "rebuild",
    "machine",
    "build",
    "number",
    "least",
    "most",
    "holds",
    "holds_one",
    "name",
    "axes",
    "model_copy",
}
"""Attributes of our own objects that have the same names."""
GUARDED = {"num_compute_capabilities", "set_compute_capability", "ComputeCapability", "init_libnvinfer_plugins"}
"""What stands behind hasattr, and CURRENT of the third."""


def names(file: Path) -> Iterator[tuple[str, ...]]:
    """(class, member) of TensorRT's objects, and (name,) or (enumeration, value) of its module."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(node, ast.Attribute):
            continue
        chain, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            chain.insert(0, inner.id)
        chain = [name for name in chain if name != "self"]
        if chain[0] in ("trt", "_trt") and len(chain) > 1:
            yield tuple(chain[1:3])
        elif len(chain) == 2 and chain[0] in CLASSES and chain[1] not in OWN:
            yield CLASSES[chain[0]], chain[1]


@pytest.mark.parametrize("version", [*TENSORRT, *RTX])
def test_names_of_tensorrt_are_in_every_version(version: str) -> None:
    inventory = read_inventory(version)
    classes, seen = inventory["classes"], 0
    for file in FILES:
        for chain in names(file):
            if set(chain) & (GUARDED | {"__version__"}):
                continue
            first, *rest = chain
            assert first in classes or first in inventory["functions"], f"{file.name}: {version} has no {first}"
            facts = classes[first]
            known = {*facts.get("methods", ()), *facts.get("properties", ()), *facts.get("values", ())}
            nested = {name.partition(".")[2] for name in classes if name.startswith(f"{first}.")}
            assert not rest or rest[0] in known | nested, f"{file.name}: {first} of {version} has no {rest[0]}"
            seen += 1
    assert seen > 40


def test_what_some_versions_lack_is_asked_for_before() -> None:
    source = "".join(file.read_text("utf-8") for file in FILES)
    for name in ("num_compute_capabilities", "init_libnvinfer_plugins"):
        assert f', "{name}")' in source
    lacking = [name for name in TENSORRT if "ComputeCapability" not in read_inventory(name)["classes"]]
    assert lacking == list(TENSORRT)
    levels = [set(read_inventory(name)["classes"]["HardwareCompatibilityLevel"]["values"]) for name in TENSORRT]
    assert any("SAME_COMPUTE_CAPABILITY" not in level for level in levels)


@pytest.mark.parametrize("version", CUDA)
def test_names_of_cuda_are_in_every_version(version: str) -> None:
    inventory = read_inventory(version)
    tree = ast.parse((RUNTIME / "cuda.py").read_text("utf-8"))
    called = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    called = {name for name in called if name.startswith("cu") and name[2:3].isupper()}
    assert len(called) > 20
    assert called <= set(inventory["functions"])
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named = {name for name in attributes if name.startswith(("CU_", "CU", "cu")) and name[2:3] in ("_", *"ADGMS")}
    values = {value for facts in inventory["classes"].values() for value in facts.get("values", ())}
    known = {*inventory["classes"], *inventory["constants"], *inventory["functions"], *values}
    assert {name for name in named if name.isidentifier()} <= known | {"cuGetErrorName"}
    for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "INTEGRATED"):
        assert f"CU_DEVICE_ATTRIBUTE_{name}" in values
