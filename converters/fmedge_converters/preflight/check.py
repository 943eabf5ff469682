"""Check a bundle, or any ONNX file, for a version of TensorRT: rules, then a real parser and builder where one is.

    found = check(Path("out/bundle"), CheckOptions("orin-nano-8gb"))
    found.passed, found.level, found.graphs[0].findings

Levels follow each other: rules passed; parsed; built; ran on a GPU; ran on this device with matching output. What
TensorRT-RTX parses and builds here is the nearest evidence without the device. The later levels are read from the
records that `fmedge build` and `fmedge verify` leave beside engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir
from fmedge_runtimes.bundle import open_any_bundle
from fmedge_runtimes.cuda import open_cuda
from fmedge_runtimes.device import Device
from fmedge_runtimes.engine_file import Engine, Machine, differences, read_engine
from fmedge_runtimes.errors import BackendError, BundleError, RequestError
from fmedge_runtimes.manifest import GraphFacts, ProfileFacts
from fmedge_runtimes.tensorrt_library import LIBRARIES, import_bindings
from fmedge_runtimes.tensorrt_session import machine_of

from fmedge_converters import rtx
from fmedge_converters.preflight.graph import Graph, read_graph
from fmedge_converters.preflight.rtx_child import ask_rtx
from fmedge_converters.preflight.rule import Finding
from fmedge_converters.preflight.rules import apply_rules
from fmedge_converters.preflight.versions import TARGETS, Asked, find_version, row_of

Depth = Literal["rules", "parse", "build"]
LevelName = Literal["rules passed", "parsed", "built", "ran on a GPU", "ran on this device with matching output"]
NARROW_FLOATS = ((ir.DataType.FLOAT4E2M1, "SM120"), (ir.DataType.FLOAT8E4M3FN, "SM89"))
"""What TensorRT-RTX builds types for that older GPUs do not have."""
LEVELS: tuple[LevelName, ...] = get_args(LevelName)


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What is checked, and how far."""

    target: str | None = None
    """A target, version, JetPack or device; None: the bundle's own."""
    up_to: Depth = "build"
    axes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """Sizes of dynamic axes, of a file that has no profiles: least, usual, largest."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level."""

    name: LevelName
    reached: bool | None
    """None: nobody has tried."""
    how: str


@dataclass(frozen=True, slots=True)
class GraphChecked:
    """What was found in one graph."""

    name: str
    file: Path
    findings: tuple[Finding, ...]
    levels: tuple[Level, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed: notes are allowed, and levels that nobody has tried."""
        rules = all(finding.effect == "note" for finding in self.findings)
        return rules and all(level.reached is not False for level in self.levels)


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in a bundle."""

    asked: Asked
    graphs: tuple[GraphChecked, ...]

    @property
    def passed(self) -> bool:
        """Whether all graphs did."""
        return all(graph.passed for graph in self.graphs)

    @property
    def level(self) -> LevelName | None:
        """The last level that all graphs have reached, with those before it."""
        reached = None
        for number, name in enumerate(LEVELS):
            if not all(graph.levels[number].reached for graph in self.graphs):
                break
            reached = name
        return reached


def check(path: Path, options: CheckOptions, progress: Callable[[str, int, int], None] = lambda *_: None) -> Checked:
    """Check the graphs of a bundle, or one ONNX file.

    Raises BundleError (no bundle, no graph), RequestError (a target that is none).
    """
    graphs, target = _graphs(path, options)
    asked = find_version(options.target or target)
    machine = _machine(asked)
    checked = []
    for number, (name, file, profiles) in enumerate(graphs):
        progress(f"checking {name}", number, len(graphs))
        graph = read_graph(file)
        findings = tuple(apply_rules(graph, asked))
        levels = _levels(graph, findings, profiles, options.up_to, asked, machine)
        checked.append(GraphChecked(name, file, findings, levels))
    return Checked(asked, tuple(checked))


def _graphs(path: Path, options: CheckOptions) -> tuple[list[tuple[str, Path, tuple[ProfileFacts, ...]]], str]:
    """Name, file and profiles of each graph; and the target that is meant if none is given."""
    given = (ProfileFacts(name="default", axes=dict(options.axes)),) if options.axes else ()
    if path.is_file():
        return [(path.name, path, given)], "tensorrt"
    if not path.exists():
        raise BundleError(f"{path} is not there; give the folder of a bundle, or an ONNX file.")
    if options.axes:
        raise RequestError("--axis is for ONNX files; a bundle has its profiles in the manifest.")
    bundle = open_any_bundle(path, checksums=False)
    manifest = bundle.manifest
    graphs: list[tuple[str, GraphFacts]] = list(manifest.graphs.items())
    target = manifest.device or (manifest.target if manifest.target in TARGETS else "tensorrt")
    return [(name, bundle.file(facts.file), facts.profiles) for name, facts in graphs], target


def _machine(asked: Asked) -> Machine | None:
    """This machine, if it has a GPU and the library that was asked for."""
    device = Device("rtx" if asked.version.rtx else "tensorrt")
    library = LIBRARIES[device.kind]
    try:
        cuda = open_cuda(device)
        return machine_of(cuda, import_bindings(library), library.name)
    except BackendError:
        return None


def _levels(
    graph: Graph,
    findings: tuple[Finding, ...],
    profiles: tuple[ProfileFacts, ...],
    up_to: Depth,
    asked: Asked,
    machine: Machine | None,
) -> tuple[Level, ...]:
    wrong = sum(finding.effect != "note" for finding in findings)
    rules = Level(
        "rules passed",
        not wrong,
        f"{wrong} nodes that {asked.version} would refuse or compute wrongly" if wrong else f"for {asked.version}",
    )
    library = "tensorrt_rtx" if asked.version.rtx else "tensorrt"
    engine = _engine(graph.path, library, asked)
    parsed, built = _tried(graph, profiles, up_to, bool(wrong))
    if engine is not None:
        how = f"by {engine.facts.library} {engine.facts.version} on {engine.facts.device}"
        parsed, built = Level("parsed", True, how), Level("built", True, how)
    return rules, parsed, built, *_ran(graph.path, engine, machine)


def _engine(graph: Path, library: str, asked: Asked) -> Engine | None:
    """The engine of a graph, if there is one that was built of it, by the version that was asked for."""
    try:
        engine = read_engine(graph, library)
    except BackendError:
        return None
    facts = engine.facts
    own = Machine(facts.library, facts.version, facts.capability, facts.device, facts.system)
    same = asked.version.rtx or row_of(facts.version) == asked.version
    return engine if same and not any(differences(facts, graph, own)) else None


def _tried(graph: Graph, profiles: tuple[ProfileFacts, ...], up_to: Depth, refused: bool) -> tuple[Level, Level]:
    """Whether TensorRT-RTX parses and builds the graph on this machine."""
    nothing = Level("built", None, "not tried")
    if up_to == "rules":
        return Level("parsed", None, "not tried"), nothing
    if not rtx.is_available():
        return Level("parsed", None, "TensorRT-RTX is not installed: pip install 'fmedge[rtx]'"), nothing
    dynamic = any(not isinstance(size, int) for value in graph.model.graph.inputs for size in value.shape or ())
    build = up_to == "build" and (bool(profiles) or not dynamic)
    # Of a static graph one profile, without axes, is enough.
    wanted = (profiles or (ProfileFacts(name="default", axes={}),)) if build else None
    try:
        capability = _capability(graph)
        verdict = ask_rtx(graph.path, wanted, capability)
    except BackendError as error:
        return Level("parsed", False, str(error)), nothing
    words = "; ".join(map(str, verdict.problems[:3]))
    if not verdict.parsed:
        return Level("parsed", False, f"TensorRT-RTX 1.7 refuses it: {words}"), nothing
    parsed = Level("parsed", True, "by TensorRT-RTX on this machine, without a GPU")
    if verdict.built is None:
        why = "not tried" if up_to != "build" else "not tried: give the sizes of its dynamic axes with --axis"
        return parsed, Level("built", None, why)
    if verdict.built:
        return parsed, Level("built", True, f"by TensorRT-RTX on this machine, for {capability}")
    return parsed, Level("built", False, f"TensorRT-RTX cannot build it: {words}")


def _capability(graph: Graph) -> str:
    """The compute capability to build for: the usual one, or the first that has a type of the graph."""
    kinds = {value.dtype for node in graph.nodes() for value in (*node.inputs, *node.outputs) if value is not None}
    return next((name for kind, name in NARROW_FLOATS if kind in kinds), rtx.CAPABILITY)


def _ran(graph: Path, engine: Engine | None, machine: Machine | None) -> tuple[Level, Level]:
    """The levels that only engines reach."""
    gpu, here = LEVELS[3], LEVELS[4]
    if engine is None:
        return Level(gpu, None, "there is no engine: `fmedge build` on the device"), Level(
            here, None, "there is no engine"
        )
    if engine.facts.ran is None:
        why = "`fmedge verify` has not run with it"
        return Level(gpu, None, why), Level(here, None, why)
    how = f"{engine.facts.ran} on {engine.facts.device}"
    if machine is None or any(differences(engine.facts, graph, machine)):
        return Level(gpu, True, how), Level(here, None, "on another device than this one")
    return Level(gpu, True, how), Level(here, True, how)
