"""All that is known of a machine: from its files, and, if it is this one, from what runs on it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmedge_runtimes.doctor.board import Board, find_board
from fmedge_runtimes.doctor.file_tree import FileTree
from fmedge_runtimes.doctor.probe import BINDINGS, GPUS, ONNXRUNTIME, TENSORRT_LIBRARY, Answer, ask
from fmedge_runtimes.doctor.software import (
    Library,
    cuda_version,
    find_environment,
    find_library,
    find_toolkits,
    own_folders,
    packages,
    system_bindings,
)

NOT_ASKED = Answer(None, "these files are another machine's")


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the driver says of a GPU."""

    name: str
    capability: str
    memory: int
    integrated: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine."""

    tree: FileTree
    system: str
    """Operating system and processor, as platform has them; of recorded files the processor is unknown."""
    python: str
    environment: str
    """What kind of Python environment this is; empty of recorded files."""
    board: Board | None
    driver: Answer
    driver_library: Library | None
    cuda: str | None
    toolkits: Sequence[str]
    """Versions of the CUDA toolkits beside each other."""
    cudnn: Library | None
    tensorrt: Library | None
    tensorrt_loads: Answer
    system_bindings: Mapping[str, str]
    bindings: Answer
    onnxruntime: Answer
    packages: Mapping[str, str]

    @property
    def gpus(self) -> Sequence[Gpu]:
        """The GPUs that the driver lists; of a recorded Jetson the one in its chip."""
        if self.driver.value is not None:
            return [Gpu(**gpu) for gpu in self.driver.value["gpus"]]
        return []

    @property
    def capability(self) -> str | None:
        """Of the first GPU, or of the chip where the driver cannot be asked."""
        if self.gpus:
            return self.gpus[0].capability
        return self.board.capability if self.board is not None and not self.is_this else None

    @property
    def is_this(self) -> bool:
        """Whether it is the machine that asks."""
        return self.tree.root == Path("/")

    @property
    def providers(self) -> Sequence[str]:
        """The execution providers of the installed ONNX Runtime."""
        return [] if self.onnxruntime.value is None else list(self.onnxruntime.value["providers"])


def examine(root: Path = Path("/")) -> Machine:
    """Look at a machine. Nothing is changed, nothing is raised; what cannot be told is empty.

    `root` other than / holds recorded files of another machine, where nothing can be run.
    """
    tree = FileTree(root)
    live = root == Path("/")
    own = own_folders() if live else ()
    library = find_library(tree, "libnvinfer", own)

    def probe(program: str, *arguments: str) -> Answer:
        return ask(program, *arguments) if live else NOT_ASKED

    return Machine(
        tree=tree,
        system=f"{platform.system()} {platform.machine()}" if live else "recorded files",
        python=".".join(map(str, sys.version_info[:3])),
        environment=find_environment() if live else "",
        board=find_board(tree),
        driver=probe(GPUS),
        driver_library=find_library(tree, "libcuda", own),
        cuda=cuda_version(tree, own),
        toolkits=find_toolkits(tree),
        cudnn=find_library(tree, "libcudnn", own),
        tensorrt=library,
        tensorrt_loads=NOT_ASKED if library is None else probe(TENSORRT_LIBRARY, str(library.path)),
        system_bindings=system_bindings(tree),
        bindings=probe(BINDINGS),
        onnxruntime=probe(ONNXRUNTIME),
        packages=packages() if live else {},
    )


def version_of_number(number: int) -> str:
    """What getInferLibVersion means: 8601 is 8.6.1, and from 10 on 100300 is 10.3.0."""
    if number >= 10_000:
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return f"{number // 1000}.{number // 100 % 10}.{number % 100}"


def found_version(answer: Answer) -> str | None:
    """The version in an answer of the bindings or of ONNX Runtime."""
    value: Any = None if answer.value is None else answer.value.get("version")
    return None if value is None else str(value)
