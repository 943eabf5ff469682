"""The engines of a bundle: `engines/NAME.engine`, and beside each a record of what it was built of, with and for.

An engine runs where it was built: on the same kind of GPU, with the same TensorRT, for the graph that it was made of.
TensorRT itself finds out late, and says so in words that help nobody; so the record is compared first, and the field
that differs is named with the command that builds the engine again.

    found = read_engine(Path("out/bundle/decoder.onnx"), "tensorrt")
    check_engine(found, machine)
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fmedge_runtimes.bundle import sha256_of
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.manifest import MANIFEST, ProfileFacts, read_manifest

FOLDER = "engines"
FORMAT: Literal[1] = 1
Hardware = Literal["this", "same-compute-capability", "ampere-plus"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BuilderFacts(_Record):
    """The options that an engine was built with."""

    optimization_level: int | None = None
    """TensorRT's builder_optimization_level; None is its own default."""
    version_compatible: bool = False
    """Later versions of the same major number run it, too."""
    hardware: Hardware = "this"
    """Which other GPUs run it, too."""
    workspace: int = 0
    """Bytes that a layer could take while it was built."""


class EngineFacts(_Record):
    """What engines/NAME.json says."""

    format: Literal[1]
    graph: str
    """SHA-256 of the ONNX file."""
    weights: str
    """SHA-256 of its external data; empty if it has none."""
    library: str
    """tensorrt or tensorrt_rtx."""
    version: str
    capability: str
    device: str
    system: str
    profiles: tuple[ProfileFacts, ...]
    options: BuilderFacts
    bytes: int
    sha256: str
    device_memory: int
    """Bytes of working memory that a step takes on the device, for the profile that takes most."""
    ran: str | None = None
    """What `fmedge verify` has reproduced with it on this device; None: nothing yet."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where an engine is to run; the names are those of the record."""

    library: str
    version: str
    capability: str
    device: str
    system: str = f"{sys.platform}-{platform.machine().lower()}"


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine on the disk."""

    path: Path
    facts: EngineFacts
    rebuild: str
    """The command that builds it again."""


def root_of(graph: Path) -> Path:
    """The bundle that a graph is in; the folder of a graph that is in none."""
    return next(
        (folder for folder in graph.absolute().parents if (folder / MANIFEST).is_file()), graph.absolute().parent
    )


def engine_path(graph: Path, library: str) -> Path:
    """Where the engine of a graph is."""
    root = root_of(graph)
    name = graph.absolute().relative_to(root).with_suffix(f".{library}.engine")
    return root / FOLDER / name


def build_command(graph: Path, library: str) -> str:
    """The command that builds the engine of a graph."""
    root = root_of(graph)
    return f"fmedge build {root if (root / MANIFEST).is_file() else graph} --device {DEVICES[library]}"


DEVICES = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
"""The name of the device that a library serves, on the command line."""
TARGETS = ("tensorrt", "tensorrt-compat", "rtx")
"""Targets of whose graphs engines are built."""


def read_engine(graph: Path, library: str) -> Engine:
    """The engine of a graph. Raises BackendError when there is none, or its record cannot be read."""
    path, command = engine_path(graph, library), build_command(graph, library)
    try:
        text = record_path(path).read_text("utf-8")
    except FileNotFoundError as error:
        root = root_of(graph)
        if (root / MANIFEST).is_file() and (target := read_manifest(root).target) not in TARGETS:
            raise BackendError(
                f"{root} was exported for {target}, of which no engines are built: export its source again with "
                f"--target {DEVICES[library]}, or run it with --device cpu."
            ) from error
        raise BackendError(
            f"{graph} has no engine for {library} yet: run `{command}` on this device, or run it with --device cpu."
        ) from error
    except OSError as error:
        raise BackendError(f"cannot read {record_path(path)}: {error.strerror}.") from error
    try:
        facts = EngineFacts.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise BackendError(
            f"{record_path(path)}: {'.'.join(map(str, first['loc']))}: {first['msg']}; build it again: {command}"
        ) from error
    return Engine(path, facts, command)


def record_path(path: Path) -> Path:
    """The record beside an engine."""
    return path.with_suffix(".json")


def check_engine(engine: Engine, graph: Path, machine: Machine) -> None:
    """Raise BackendError naming the first thing in which an engine differs from the graph or the machine."""
    difference = next(differences(engine.facts, graph, machine), None)
    if difference is not None:
        raise BackendError(f"{engine.path} cannot run here: {difference}; build it again: {engine.rebuild}")
    if not engine.path.is_file() or engine.path.stat().st_size != engine.facts.bytes:
        raise BackendError(f"{engine.path} is missing or cut off; build it again: {engine.rebuild}")
    if sha256_of(engine.path) != engine.facts.sha256:
        raise BackendError(f"{engine.path} is damaged (SHA-256 differs); build it again: {engine.rebuild}")


def differences(facts: EngineFacts, graph: Path, machine: Machine) -> Iterator[str]:
    """Why an engine does not belong to a graph or a machine, most telling first."""
    if facts.library != machine.library:
        yield f"it was built by {facts.library}, and this is {machine.library}"
    if facts.system != machine.system:
        yield f"it was built on {facts.system}, and this is {machine.system}"
    built, here = _numbers(facts.version), _numbers(machine.version)
    newer = facts.options.version_compatible and built[:1] == here[:1] and built <= here
    if facts.version != machine.version and not newer:
        yield f"it was built by {facts.library} {facts.version}, and this is {machine.version}"
    yield from _other_hardware(facts, machine)
    found = hashes_of(graph)
    for what, recorded, now in (("graph", facts.graph, found[0]), ("weights", facts.weights, found[1])):
        if recorded != now:
            yield f"it was built of another {what} than {graph.name} has now"


def _other_hardware(facts: EngineFacts, machine: Machine) -> Iterator[str]:
    if facts.options.hardware == "ampere-plus" and _numbers(machine.capability) >= (8, 0):
        return
    if facts.capability != machine.capability:
        yield f"it was built for compute capability {facts.capability}, and this GPU has {machine.capability}"
    if facts.device != machine.device and facts.options.hardware == "this":
        yield f"it was built on {facts.device}, and this is {machine.device}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def hashes_of(graph: Path) -> tuple[str, str]:
    """SHA-256 of a graph and of its external data, from the manifest where there is one: weights are large."""
    root, data = root_of(graph), graph.with_name(graph.name + ".data")
    listed = read_manifest(root).files if (root / MANIFEST).is_file() else {}
    found = []
    for path in (graph, data):
        facts = listed.get(path.absolute().relative_to(root).as_posix())
        found.append(facts.sha256 if facts is not None else sha256_of(path) if path.is_file() else "")
    return found[0], found[1]


@contextmanager
def stored_aside(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` that takes its place at the end, or disappears; a killed process's is overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_record(path: Path, facts: EngineFacts) -> None:
    """Write what is known of an engine, whole or not at all."""
    with stored_aside(record_path(path)) as aside:
        aside.write_text(facts.model_dump_json(indent=1) + "\n", "utf-8")


def note_ran(graph: Path, library: str, what: str) -> None:
    """Remember that an engine has reproduced something on this device."""
    engine = read_engine(graph, library)
    write_record(engine.path, engine.facts.model_copy(update={"ran": what}))
