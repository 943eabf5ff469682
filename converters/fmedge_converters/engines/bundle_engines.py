"""Build the engines of a bundle: each of its graphs, unless its engine is there and still belongs to it.

for made in build_engines(Path("out/bundle"), EngineBuildOptions(rows=8), progress): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fmedge_runtimes.bundle import Bundle, ImageBundle, open_any_bundle
from fmedge_runtimes.cuda import open_cuda
from fmedge_runtimes.device import Device
from fmedge_runtimes.engine_file import BuilderFacts, EngineFacts, Hardware, differences, engine_path, read_engine
from fmedge_runtimes.engine_limits import inputs_of, stages_of
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.manifest import ProfileFacts
from fmedge_runtimes.tensorrt_library import LIBRARIES, import_bindings
from fmedge_runtimes.tensorrt_session import machine_of

from fmedge_converters.engines.build import Builder, weights_of, workspace_of
from fmedge_converters.engines.served import Served, fit_decoder, fit_part

Progress = Callable[[str, int, int], None]
LEVELS = range(6)
"""Of TensorRT's optimization."""


@dataclass(frozen=True, slots=True)
class EngineBuildOptions:
    """What engines are built for, and how."""

    device: str | None = None
    """tensorrt or rtx; None: the bundle's target."""
    served: Served = field(default_factory=Served)
    parts: tuple[str, ...] = ()
    """Graphs to build; none: all of them."""
    workspace: int | None = None
    """Bytes that a layer may take while it is built; None: what the device can spare."""
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware: Hardware = "this"
    force: bool = False
    """Build engines again that are there."""

    def __post_init__(self) -> None:
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise RequestError(f"--optimization-level is {self.optimization_level}; it goes from 0 to {LEVELS[-1]}.")


@dataclass(frozen=True, slots=True)
class EngineMade:
    """What became of a graph."""

    name: str
    path: Path
    facts: EngineFacts
    seconds: float | None
    """None: the engine was there already."""
    warnings: tuple[str, ...] = ()


def build_engines(
    folder: Path, options: EngineBuildOptions, progress: Progress = lambda *_: None
) -> Iterator[EngineMade]:
    """Build the engines of a bundle, one after the other; each is in its place when it is handed out.

    Raises BundleError, RequestError (options that the bundle has nothing for), BackendError (no GPU, no TensorRT, a
    graph that it cannot build). Engines that are there stay as they are when another one fails.
    """
    bundle = open_any_bundle(folder, checksums=False)
    wanted = _profiles(bundle, options)
    device = options.device or bundle.manifest.target
    if device not in LIBRARIES:
        raise RequestError(
            f"{folder} was exported for {device}, of which no engines are built; give a bundle of --target tensorrt."
        )
    library = LIBRARIES[device]
    # Before TensorRT: without a GPU its builder cannot work, and its runtime would end the process.
    try:
        cuda = open_cuda(Device(device))
    except BackendError as error:
        raise BackendError(
            f"{error} Engines are built on the device that runs them; `fmedge check` needs none."
        ) from error
    trt = import_bindings(library)
    builder = Builder(trt, cuda, machine_of(cuda, trt, library.name))
    for name, profiles in wanted.items():
        graph = bundle.file(bundle.manifest.graphs[name].file)
        with cuda.turn():
            spare = workspace_of(cuda.free_bytes(), weights_of(graph))
        facts = BuilderFacts(
            optimization_level=options.optimization_level,
            version_compatible=options.version_compatible,
            hardware=options.hardware,
            workspace=options.workspace or spare,
        )
        known = None if options.force else _known(graph, builder, profiles, facts, options)
        if known is not None:
            yield EngineMade(name, engine_path(graph, library.name), known, None)
            continue

        def report(phase: str, done: int, total: int, name: str = name) -> None:
            progress(f"{name}: {phase}", done, total)

        built = builder.build(graph, profiles, facts, report)
        yield EngineMade(name, built.path, built.facts, built.seconds, built.warnings)


def _profiles(bundle: Bundle | ImageBundle, options: EngineBuildOptions) -> dict[str, tuple[ProfileFacts, ...]]:
    """The profiles of each graph that is to be built. Raises RequestError."""
    graphs, served = bundle.manifest.graphs, options.served
    unknown = [name for name in options.parts if name not in graphs]
    if unknown:
        raise RequestError(f"{bundle.folder} has no graph {unknown[0]}; it has {', '.join(graphs)}.")
    names = options.parts or tuple(graphs)
    if isinstance(bundle, ImageBundle):
        if served.rows is not None:
            raise RequestError(f"--rows is for bundles that write text; {bundle.folder} makes images: --batch.")
        stages = stages_of(inputs_of(graphs))
        goldens = [(golden.width, golden.height) for golden in bundle.manifest.golden]
        return {name: fit_part(graphs[name], bundle.manifest.image, served, stages, goldens) for name in names}
    if served.sizes or served.batch is not None:
        raise RequestError(f"--size and --batch are for bundles that make images; {bundle.folder} writes text.")
    # A layout's graph is for another runtime.
    return {name: fit_decoder(graphs[name], served) for name in names if name == "decoder" or options.parts}


def _known(
    graph: Path, builder: Builder, profiles: tuple[ProfileFacts, ...], facts: BuilderFacts, options: EngineBuildOptions
) -> EngineFacts | None:
    """What is known of an engine that is there and is what is asked for; None if it has to be built."""
    try:
        engine = read_engine(graph, builder.machine.library)
    except BackendError:
        return None
    found = engine.facts
    if options.workspace is None:
        # What the device could spare then is no reason to build again.
        facts = facts.model_copy(update={"workspace": found.options.workspace})
    whole = engine.path.is_file() and engine.path.stat().st_size == found.bytes
    same = found.profiles == profiles and found.options == facts and whole
    return found if same and not any(differences(found, graph, builder.machine)) else None
