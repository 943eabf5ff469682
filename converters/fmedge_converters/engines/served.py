"""The optimization profiles of a graph: those of the manifest, fitted to what the user wants to serve.

A decoder has `prefill` (one row, several tokens) and `decode` (several rows, a token each); a part of a pipeline has
`default`. Axes of images grow with the size of the image, each by what it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fmedge_runtimes.decoder import PREFILL_CHUNK
from fmedge_runtimes.engine import LEAST_CHUNK
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.manifest import GraphFacts, ImageFacts, ProfileFacts

Range = tuple[int, int, int]
Size = tuple[int, int]
"""Width and height, in pixels."""

GROWTH: Mapping[str, Callable[[int, int], int]] = MappingProxyType(
    {
        "height": lambda _, height: height,
        "width": lambda width, _: width,
        "image_sequence": lambda width, height: width * height,
    }
)
"""What an axis of a graph is proportional to, of an image's width and height."""


@dataclass(frozen=True, slots=True)
class Served:
    """What engines are to serve; None is what the manifest says."""

    rows: int | None = None
    """Rows of a decoder that get a token together."""
    tokens: int | None = None
    """Tokens of a prompt that go through a decoder together."""
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
        if self.tokens is not None and self.tokens > PREFILL_CHUNK:
            raise RequestError(f"--tokens is {self.tokens}; prompts go in pieces of {PREFILL_CHUNK} at most.")


def fit_decoder(graph: GraphFacts, served: Served) -> tuple[ProfileFacts, ...]:
    """The profiles of a decoder. Raises RequestError if the bundle has none: it was exported for something else."""
    _require(graph)
    return tuple(_decoder_profile(profile, served) for profile in graph.profiles)


def _decoder_profile(profile: ProfileFacts, served: Served) -> ProfileFacts:
    axes = dict(profile.axes)
    several, wanted = ("sequence", served.tokens) if profile.name == "prefill" else ("batch", served.rows)
    if wanted is not None:
        axes[several] = (1, wanted if profile.name == "prefill" else 1, wanted)
        axes["logits"] = (1, 1, wanted)
    return profile.model_copy(update={"axes": axes})


def fit_part(graph: GraphFacts, image: ImageFacts, served: Served) -> tuple[ProfileFacts, ...]:
    """The profiles of a part of a pipeline. Raises RequestError if the bundle has none, or a size cannot be."""
    _require(graph)
    inputs = {item.name for item in graph.inputs}
    made = []
    for profile in graph.profiles:
        axes = {axis: _grown(axis, sizes, image, served.sizes) for axis, sizes in profile.axes.items()}
        # Text is encoded beside the images, many prompts at a time; guidance doubles the rows of a denoiser.
        if served.batch is not None and "input_ids" not in inputs:
            rows = served.batch * (2 if image.guidance > 1 and "timestep" in inputs else 1)
            axes |= {
                axis: (min(axes[axis][0], rows), rows if axis == "batch" else 1, rows)
                for axis in ("batch", "steps")
                if axis in axes
            }
        made.append(profile.model_copy(update={"axes": axes}))
    return tuple(made)


def _grown(axis: str, sizes: Range, image: ImageFacts, wanted: tuple[Size, ...]) -> Range:
    """The range of an axis for the sizes that are wanted."""
    if axis not in GROWTH or not wanted:
        return sizes
    usual = GROWTH[axis](image.width, image.height)
    found = []
    for width, height in wanted:
        count, rest = divmod(sizes[1] * GROWTH[axis](width, height), usual)
        if rest or not count:
            step = usual // sizes[1]
            raise RequestError(
                f"{width}x{height} cannot be made by this bundle: {axis} goes in steps of {step} pixels."
            )
        found.append(count)
    return min(found), found[0], max(found)


def _require(graph: GraphFacts) -> None:
    if not graph.profiles:
        raise RequestError(
            f"{graph.file} was not exported for TensorRT: it has no optimization profiles; export the source "
            "again with --target tensorrt (or tensorrt-compat, rtx, the name of a device)."
        )
