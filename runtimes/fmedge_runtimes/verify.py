"""Check a bundle where it lies: its bytes, and that this machine computes what the exporting one computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fmedge_runtimes.backends import open_session
from fmedge_runtimes.bundle import Bundle, ImageBundle, check_files, open_any_bundle
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.engine_file import note_ran
from fmedge_runtimes.errors import BundleDamagedError, BundleError, ParityError, RequestError
from fmedge_runtimes.foreign import find_foreign
from fmedge_runtimes.golden import replay
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.load import load_image, open_prefill
from fmedge_runtimes.manifest import ImageGolden
from fmedge_runtimes.picture import open_picture
from fmedge_runtimes.tensorrt_library import LIBRARIES


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked, and found right."""

    files: int
    nbytes: int
    tokens: int
    """Golden tokens that were reproduced; 0 if the bundle has none."""
    near_ties: int
    """How many of them were near ties that fell the other way here."""
    images: int
    """Golden images that were reproduced within their tolerance; 0 if the bundle has none."""
    device: str


def verify(
    folder: Path, device: str | None = None, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Verified:
    """Recompute all checksums and replay the golden continuations, or images.

    Raises BundleError (damage, or a folder of another exporter), BackendError, ParityError (this machine computes
    something else).
    """
    foreign = find_foreign(folder)
    if foreign is not None:
        raise BundleError(
            f"{folder} was written by {foreign.exporter} and has neither checksums nor golden continuations, so there "
            "is nothing to verify; `fmedge export` its source, which writes them."
        )
    bundle = open_any_bundle(folder, checksums=False)
    check_files(bundle, checksums=True, progress=partial(progress, "checksums"))
    device = device or bundle.manifest.target
    tokens = near_ties = images = 0
    if isinstance(bundle, ImageBundle):
        images = _replay_images(bundle, device, progress)
    elif bundle.manifest.golden:
        progress("replaying the golden continuations", 0, 0)
        tokens, near_ties = _replay_texts(bundle, device)
        _note(bundle, device, ("decoder",), f"{tokens} golden tokens")
    return Verified(len(bundle.manifest.files), bundle.nbytes, tokens, near_ties, images, device)


def _replay_texts(bundle: Bundle, device: str) -> tuple[int, int]:
    """Golden tokens that are reproduced, and how many of them were near ties. Raises ParityError."""
    tokens = near_ties = 0
    graph = bundle.file(bundle.manifest.graphs["decoder"].file)
    # With the steps as they will run: recorded, where the device records them.
    session, prefill = open_session(graph, device, None, True), open_prefill(bundle, device, None, "prompts")
    decoder = Decoder(session, bundle.manifest.text, None, prefill)
    for number, result in enumerate(replay(decoder, bundle.manifest.golden)):
        if result.mismatch is not None:
            golden = bundle.manifest.golden[number].steps[result.mismatch]
            raise ParityError(
                f"{bundle.folder} computes something else on this machine: golden continuation {number}, step "
                f"{result.mismatch} gives token {result.found} instead of {golden.token}, which led by "
                f"{golden.margin:.3g}; try another onnxruntime version, and report this."
            )
        tokens += result.tokens
        near_ties += result.near_ties
    decoder.close()
    return tokens, near_ties


def _replay_images(bundle: ImageBundle, device: str, progress: Callable[[str, int, int], None]) -> int:
    """Golden images that are reproduced. Raises ParityError."""
    goldens = bundle.manifest.golden
    if not goldens:
        return 0
    with load_image(bundle.folder, device=device, checksums=False) as model:
        for number, golden in enumerate(goldens):
            progress("replaying the golden images", number, len(goldens))
            difference = _difference(bundle, golden, model)
            if difference > golden.tolerance:
                raise ParityError(
                    f"{bundle.folder} computes something else on this machine: golden image {number} differs from "
                    f"{golden.file} by {difference:.3g} levels in the mean, more than {golden.tolerance:.3g}; try "
                    "another onnxruntime version, and report this."
                )
        ran = model.ran
    _note(bundle, device, ran, f"{len(goldens)} golden images")
    return len(goldens)


def _note(bundle: Bundle | ImageBundle, device: str, names: Iterable[str], what: str) -> None:
    """Remember what engines have reproduced, for `fmedge check` to tell."""
    if device in LIBRARIES:
        for name in names:
            note_ran(bundle.file(bundle.manifest.graphs[name].file), LIBRARIES[device].name, what)


def _difference(bundle: ImageBundle, golden: ImageGolden, model: ImageModel) -> float:
    """The mean absolute difference of the golden image and the same one made here, in levels of 0 to 255."""
    guidance = golden.guidance if "guidance" in model.pipeline.takes else None
    try:
        controls = tuple(open_picture(bundle.file(name), "the golden control image") for name in golden.controls)
        options = Diffusion(
            steps=golden.steps,
            guidance=guidance,
            seed=golden.seed,
            height=golden.height,
            width=golden.width,
            control=controls or None,
            ip_adapter_image=None
            if golden.ip_adapter_image is None
            else open_picture(bundle.file(golden.ip_adapter_image), "the golden image of the IP-Adapter"),
        )
        made = np.asarray(model.generate(golden.prompt, options)[0].image, np.float64)
        expected = np.asarray(open_picture(bundle.file(golden.file), "the golden image").convert("RGB"), np.float64)
    except RequestError as error:
        raise BundleDamagedError(f"{error}; export the bundle again.") from error
    if made.shape != expected.shape:
        raise BundleDamagedError(
            f"{bundle.file(golden.file)} is {expected.shape[1]}x{expected.shape[0]} and not "
            f"{golden.width}x{golden.height}; export the bundle again."
        )
    return float(np.abs(made - expected).mean())
