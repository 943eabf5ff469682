"""Open a folder of another exporter as a bundle without evidence, or say what it lacks.

foreign = find_foreign(Path("out/optimum-export"))
bundle, session = open_foreign(foreign, device=None, threads=None)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from fmedge_runtimes.backends import open_session
from fmedge_runtimes.bundle import Bundle
from fmedge_runtimes.errors import BackendError, BundleDamagedError
from fmedge_runtimes.foreign_check import adapt
from fmedge_runtimes.foreign_folder import ForeignFolder, chat_template_file, special_tokens
from fmedge_runtimes.foreign_graph import read_graph
from fmedge_runtimes.foreign_session import ForeignGraph
from fmedge_runtimes.genai_folder import read_genai_folder
from fmedge_runtimes.manifest import (
    FORMAT,
    MANIFEST,
    GraphFacts,
    SourceFacts,
    TensorFacts,
    TextFacts,
    TextManifest,
)
from fmedge_runtimes.optimum_folder import read_optimum_folder
from fmedge_runtimes.session import Session

TOKENIZER = "tokenizer.json"
READERS: tuple[Callable[[Path], ForeignFolder | None], ...] = (read_genai_folder, read_optimum_folder)
"""One for each exporter; the first that knows a folder reads it."""
MISSING_DATA = re.compile(r'External data path does not exist: "([^"]+)"')
"""How ONNX Runtime says that a graph's weights are not there."""


def find_foreign(folder: Path) -> ForeignFolder | None:
    """The decoder of a folder that another exporter wrote; None if it is a bundle, or nothing known.

    Raises BundleError when the folder is known, and lacks something or holds more than a decoder.
    """
    if (folder / MANIFEST).is_file():
        return None
    return next((found for read in READERS if (found := read(folder)) is not None), None)


def open_foreign(foreign: ForeignFolder, device: str | None, threads: int | None) -> tuple[Bundle, Session]:
    """The decoder as a bundle, and its graph as a session that takes a bundle's steps.

    Raises BundleError when the graph's inputs and outputs do not allow it, BackendError when the graph cannot be run.
    """
    session = _open(foreign, device, threads)
    try:
        graph = read_graph(foreign, session)
        bundle = _bundle(foreign, session, graph)
        return bundle, adapt(session, graph, bundle.manifest.text, foreign.graph)
    except BaseException:
        session.close()
        raise


def describe_foreign(foreign: ForeignFolder) -> Bundle:
    """The decoder as a bundle, to be looked at. Raises as `open_foreign` does."""
    session = _open(foreign, "cpu", None)
    try:
        return _bundle(foreign, session, read_graph(foreign, session))
    finally:
        session.close()


def _open(foreign: ForeignFolder, device: str | None, threads: int | None) -> Session:
    if not foreign.graph.is_file():
        raise BundleDamagedError(f"{foreign.graph} is missing; copy or export the whole folder again.")
    try:
        return open_session(foreign.graph, device or foreign.device, threads)
    except BackendError as error:
        missing = MISSING_DATA.search(str(error))
        if missing is None:
            raise
        raise BundleDamagedError(
            f"{missing[1]} is missing, where {foreign.graph} keeps its weights; copy or export the whole folder again."
        ) from error


def _bundle(foreign: ForeignFolder, session: Session, graph: ForeignGraph) -> Bundle:
    folder = foreign.folder
    inputs, outputs = (
        tuple(TensorFacts(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in specs)
        for specs in (session.inputs, session.outputs)
    )
    manifest = TextManifest(
        format=FORMAT,
        kind="text",
        source=SourceFacts(id=str(folder), revision=None, architecture=foreign.architecture, licence=None),
        target=foreign.device,
        precision="unknown",
        block_size=None,
        graphs={"decoder": GraphFacts(file=foreign.graph.name, inputs=inputs, outputs=outputs)},
        text=TextFacts(
            context=foreign.context,
            vocabulary=graph.vocabulary,
            cache_dtype=graph.cache_dtype,
            caches=graph.caches,
            states=(),
            eos_token_ids=tuple(token for token in foreign.eos_token_ids if 0 <= token < graph.vocabulary),
            special_tokens=special_tokens(folder),
            tokenizer=TOKENIZER if (folder / TOKENIZER).is_file() else None,
            chat_template=chat_template_file(folder),
            sampling=foreign.sampling,
        ),
        evidence=(),
        golden=(),
        forced=False,
        files={},
        made_by={"exporter": foreign.exporter},
    )
    return Bundle(folder, manifest, exporter=foreign.exporter)
