"""The optimization profiles of a graph: those of the manifest, fitted to what the user wants to serve.

A decoder has `prefill` (one row, several tokens) and `decode` (several rows, a token each); a part of a pipeline has
`default`. Axes of images grow with the size of the image, each by what it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fmedge_runtimes.decoder import PREFILL_CHUNK
from fmedge_runtimes.engine import LEAST_CHUNK
from fmedge_runtimes.engine_limits import (
    RESIDUALS,
    Range,
    grown,
    grows,
    is_autoencoder,
    is_denoiser,
    measured,
    rows_of_image,
)
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.manifest import GraphFacts, ImageFacts, ProfileFacts
from fmedge_runtimes.pipelines.autoencoder import TILED_FROM

from fmedge_converters.profiles import WORDS, Reach, decoded_together

Size = tuple[int, int]
"""Width and height, in pixels."""


@dataclass(frozen=True, slots=True)
class Served:
    """What engines are to serve; None is what the manifest says."""

    rows: int | None = None
    """Rows of a decoder that get a token together."""
    tokens: int | None = None
    """Tokens of a prompt that go through a decoder together; of images: of the longest prompt."""
    sizes: tuple[Size, ...] = ()
    """Of images: the first is what is usual, the others only have to be possible."""
    batch: int | None = None
    """Images that are made together."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rows", self.rows, 1),
            ("tokens", self.tokens, LEAST_CHUNK),
            ("batch", self.batch, 1),
        ):
            if value is not None and value < least:
                raise RequestError(f"--{name} is {value}; it must be at least {least}.")


def fit_decoder(graph: GraphFacts, served: Served) -> tuple[ProfileFacts, ...]:
    """The profiles of a decoder. Raises RequestError if the bundle has none: it was exported for something else."""
    _require(graph)
    if served.tokens is not None and served.tokens > PREFILL_CHUNK:
        raise RequestError(f"--tokens is {served.tokens}; prompts go in pieces of {PREFILL_CHUNK} at most.")
    return tuple(_decoder_profile(profile, served) for profile in graph.profiles)


def _decoder_profile(profile: ProfileFacts, served: Served) -> ProfileFacts:
    axes = dict(profile.axes)
    several, wanted = ("sequence", served.tokens) if profile.name == "prefill" else ("batch", served.rows)
    if wanted is not None:
        axes[several] = (1, wanted if profile.name == "prefill" else 1, wanted)
        axes["logits"] = (1, 1, wanted)
    return profile.model_copy(update={"axes": axes})


def fit_part(
    graph: GraphFacts, image: ImageFacts, served: Served, stages: int = 1, goldens: Sequence[Size] = ()
) -> tuple[ProfileFacts, ...]:
    """The profiles of a part of a pipeline with so many denoisers, which is to make images of the sizes of its golden
    ones, too. Raises RequestError if the bundle has no profiles, or a size cannot be."""
    _require(graph)
    inputs = [item.name for item in graph.inputs]
    made = []
    for profile in graph.profiles:
        fit = _tiles if is_autoencoder(inputs) else _grown
        axes = {axis: fit(axis, sizes, image, served.sizes) for axis, sizes in profile.axes.items()}
        for axis in filter(grows, axes if served.sizes else ()):
            least = min((grown(axis, profile.axes[axis][1], image, size) for size in goldens), default=axes[axis][0])
            axes[axis] = (min(axes[axis][0], least), *axes[axis][1:])
        if (
            served.tokens is not None and axes.get("sequence", (0, 0, 0))[2] == WORDS[2]
        ):  # not what the part has places for
            axes["sequence"] = (1, min(WORDS[1], served.tokens), served.tokens)
        made.append(profile.model_copy(update={"axes": {**axes, **_rows(inputs, axes, image, served, stages)}}))
    return tuple(made)


def _rows(
    inputs: list[str], axes: dict[str, Range], image: ImageFacts, served: Served, stages: int
) -> dict[str, Range]:
    """The axes of rows, where a number of images is asked for: guidance doubles those of denoisers."""
    if is_denoiser(inputs) and served.batch is not None:
        rows = served.batch * rows_of_image(inputs, image, stages)
        found = {"batch": (1, rows, rows), "steps": (1, 1, rows), RESIDUALS: (1, rows, rows)}
    elif "latent_sample" in inputs and (served.batch is not None or served.sizes):
        sizes = [width * height for width, height in served.sizes if width * height <= TILED_FROM]
        pixels = max(sizes, default=image.width * image.height)
        most = decoded_together(served.batch or Reach().images, pixels)
        found = {"batch": (1, most, most)}
    else:
        found = {}
    return {axis: rows for axis, rows in found.items() if axis in axes}


def _grown(axis: str, sizes: Range, image: ImageFacts, wanted: tuple[Size, ...]) -> Range:
    """The range of an axis for the sizes that are wanted."""
    if not grows(axis) or not wanted:
        return sizes
    found = [grown(axis, sizes[1], image, size) for size in wanted]
    halved = "/" in axis  # and rounded, by the part
    for (width, height), count in zip(wanted, found, strict=True):
        if not halved and count * measured(axis, image.width, image.height) != sizes[1] * measured(axis, width, height):
            step = measured(axis, image.width, image.height) // sizes[1]
            raise RequestError(
                f"{width}x{height} cannot be made by this bundle: {axis} goes in steps of {step} pixels."
            )
    return (1 if halved else min(found)), found[0], max(found)


def _tiles(axis: str, sizes: Range, image: ImageFacts, wanted: tuple[Size, ...]) -> Range:
    """The same for an autoencoder, which makes the large ones in tiles of any size up to that of the manifest."""
    whole = tuple(size for size in wanted if size[0] * size[1] <= TILED_FROM)
    if not grows(axis) or not whole:
        return sizes
    _, usual, most = _grown(axis, sizes, image, whole)
    return sizes[0], usual, most if len(whole) == len(wanted) else max(most, sizes[2])


def _require(graph: GraphFacts) -> None:
    if not graph.profiles:
        raise RequestError(
            f"{graph.file} was not exported for TensorRT: it has no optimization profiles; export the source "
            "again with --target tensorrt (or tensorrt-compat, rtx, the name of a device)."
        )
