"""Check a bundle where it lies: its bytes, and that this machine computes what the exporting one computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fmedge_runtimes.backends import open_session
from fmedge_runtimes.bundle import check_files, open_bundle
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import BundleError, ParityError
from fmedge_runtimes.foreign import find_foreign
from fmedge_runtimes.golden import replay


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked, and found right."""

    files: int
    nbytes: int
    tokens: int
    """Golden tokens that were reproduced; 0 if the bundle has none."""
    near_ties: int
    """How many of them were near ties that fell the other way here."""
    device: str


def verify(
    folder: Path, device: str | None = None, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Verified:
    """Recompute all checksums and replay the golden continuations.

    Raises BundleError (damage, or a folder of another exporter), BackendError, ParityError (this machine computes
    something else).
    """
    foreign = find_foreign(folder)
    if foreign is not None:
        raise BundleError(
            f"{folder} was written by {foreign.exporter} and has neither checksums nor golden continuations, so there "
            "is nothing to verify; `fmedge export` its source, which writes them."
        )
    bundle = open_bundle(folder, checksums=False)
    check_files(bundle, checksums=True, progress=partial(progress, "checksums"))
    device = device or bundle.manifest.target
    tokens = near_ties = 0
    if bundle.manifest.golden:
        progress("replaying the golden continuations", 0, 0)
        graph = bundle.file(bundle.manifest.graphs["decoder"].file)
        decoder = Decoder(open_session(graph, device, None), bundle.manifest.text)
        for number, result in enumerate(replay(decoder, bundle.manifest.golden)):
            if result.mismatch is not None:
                golden = bundle.manifest.golden[number].steps[result.mismatch]
                raise ParityError(
                    f"{folder} computes something else on this machine: golden continuation {number}, step "
                    f"{result.mismatch} gives token {result.found} instead of {golden.token}, which led by "
                    f"{golden.margin:.3g}; try another onnxruntime version, and report this."
                )
            tokens += result.tokens
            near_ties += result.near_ties
        decoder.session.close()
    return Verified(len(bundle.manifest.files), bundle.nbytes, tokens, near_ties, device)
