"""What of a bundle can run on a machine, and which command makes what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fmedge_runtimes import engine_file
from fmedge_runtimes.bundle import Bundle, ImageBundle, open_any_bundle
from fmedge_runtimes.doctor.file_tree import numbers
from fmedge_runtimes.doctor.finding import Finding, Level
from fmedge_runtimes.doctor.machine import Machine, found_version
from fmedge_runtimes.errors import BackendError

SECTION = "bundle"
OLDEST = {"tensorrt": (10, 15), "tensorrt-compat": (10, 3)}
"""The TensorRT that reads a target's graphs."""


def of_bundle(machine: Machine, folder: Path) -> Iterator[Finding]:
    """Findings on a bundle. Raises BundleError when there is none."""
    bundle = open_any_bundle(folder, checksums=False)
    manifest = bundle.manifest
    yield Finding(SECTION, "exported for", f"{manifest.target}, {manifest.precision}")
    if not machine.is_this:
        return
    if manifest.target == "cuda":
        yield from _on_cuda(machine, bundle)
    if manifest.target in engine_file.DEVICES.values() or manifest.target in OLDEST:
        yield from _engines(machine, bundle)
    yield from _on_cpu(machine, bundle)


def _on_cpu(machine: Machine, bundle: Bundle | ImageBundle) -> Iterator[Finding]:
    other = "" if bundle.manifest.target == "cpu" else " (to check its numbers; slower than one exported for the CPU)"
    if found_version(machine.onnxruntime) is None:
        advice = "pip install 'fmedge[cpu]'"
        yield Finding(
            SECTION, "on the CPU", "no: ONNX Runtime is missing", Level.NOTE if other else Level.PROBLEM, advice
        )
        return
    yield Finding(SECTION, "on the CPU", f"yes{other}", advice=f"fmedge generate {bundle.folder} ... --device cpu")


def _on_cuda(machine: Machine, bundle: Bundle | ImageBundle) -> Iterator[Finding]:
    if not machine.gpus:
        yield Finding(SECTION, "on the GPU", "no: there is none", Level.WARNING, "use --device cpu")
    elif "CUDAExecutionProvider" not in machine.providers:
        advice = "pip uninstall onnxruntime, then pip install 'fmedge[gpu]'"
        yield Finding(SECTION, "on the GPU", "no: ONNX Runtime has no CUDA here", Level.PROBLEM, advice)
    else:
        command = f"fmedge generate {bundle.folder} ... --device cuda"
        yield Finding(SECTION, "on the GPU", "yes, if ONNX Runtime has code for it (above)", advice=command)


def _engines(machine: Machine, bundle: Bundle | ImageBundle) -> Iterator[Finding]:
    target = bundle.manifest.target
    library = "tensorrt_rtx" if target == "rtx" else "tensorrt"
    version = machine.packages.get("tensorrt-rtx-cu13-bindings") if target == "rtx" else found_version(machine.bindings)
    lacking = None
    if not machine.gpus:
        lacking = "no GPU"
    elif version is None:
        lacking = f"no bindings of {library}"
    elif numbers(version) < OLDEST.get(target, (0,)):
        least = ".".join(map(str, OLDEST[target]))
        lacking = f"TensorRT {version}, and these graphs need {least}: export with --target tensorrt-compat"
    here = None
    if machine.gpus and version is not None:
        here = engine_file.Machine(library, version, machine.gpus[0].capability, machine.gpus[0].name)
    for name, graph in bundle.manifest.graphs.items():
        yield _engine(bundle.file(graph.file), name, library, here, lacking)


def _engine(graph: Path, name: str, library: str, here: engine_file.Machine | None, lacking: str | None) -> Finding:
    label = f"engine {name}"
    try:
        engine = engine_file.read_engine(graph, library)
    except BackendError as error:
        if engine_file.record_path(engine_file.engine_path(graph, library)).exists():
            return Finding(SECTION, label, str(error), Level.PROBLEM, engine_file.build_command(graph, library))
        advice = engine_file.build_command(graph, library)
        if lacking is not None:
            return Finding(SECTION, label, f"not built, and cannot be here: {lacking}", Level.WARNING, advice)
        return Finding(SECTION, label, "not built yet", Level.WARNING, advice)
    if here is None or lacking is not None:
        return Finding(SECTION, label, f"built on {engine.facts.device}; here: {lacking}", Level.WARNING)
    difference = next(engine_file.differences(engine.facts, graph, here), None)
    if difference is not None:
        return Finding(SECTION, label, f"cannot run here: {difference}", Level.PROBLEM, engine.rebuild)
    if not engine.path.is_file() or engine.path.stat().st_size != engine.facts.bytes:
        return Finding(SECTION, label, f"{engine.path} is missing or cut off", Level.PROBLEM, engine.rebuild)
    proof = "nothing was compared yet: fmedge verify" if engine.facts.ran is None else engine.facts.ran
    return Finding(SECTION, label, f"can run here ({proof})")
