"""The sizes that the engines of an image bundle were built for, and what follows for requests.

An engine serves the sizes of its profile and no others. Text goes through an encoder in pieces that fit (`Part.most`);
a batch, a size of an image or a decoder's tile is chosen before anything runs, by the records beside the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fmedge_runtimes.bundle import ImageBundle
from fmedge_runtimes.engine_file import build_command, read_engine
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.manifest import GraphFacts, ImageFacts
from fmedge_runtimes.tensorrt_library import LIBRARIES

Range = tuple[int, int, int]
"""The least, usual and largest size of an axis."""
Axes = Mapping[str, Range]

RESIDUALS = "residuals"
"""The axis of rows of what ControlNets give: one where none is at work."""
TOLD = frozenset({"guidance", "timestep_cond"})
"""Inputs by which a distilled denoiser is told the guidance, and has no other half of it."""


def halved(axis: str, level: int) -> str:
    """The name of an axis that is another one divided by 2 ** level, rounded up; or 1 where nothing is given."""
    return f"{axis}/{2**level}"


GROWTH: Mapping[str, Callable[[int, int], int]] = MappingProxyType(
    {
        "height": lambda _, height: height,
        "width": lambda width, _: width,
        "image_sequence": lambda width, height: width * height,
    }
)
"""What an axis of a graph is proportional to, of an image's width and height; `halved` ones to what they are of."""


def grows(axis: str) -> bool:
    """Whether an axis is the longer, the larger an image is."""
    return axis.partition("/")[0] in GROWTH


def grown(axis: str, usual: int, image: ImageFacts, size: tuple[int, int]) -> int:
    """Places along an axis, rounded up, for an image of another width and height than the usual."""
    return -(-usual * measured(axis, *size) // measured(axis, image.width, image.height))


def measured(axis: str, width: int, height: int) -> int:
    """What an axis is proportional to, of an image."""
    return GROWTH[axis.partition("/")[0]](width, height)


def is_denoiser(inputs: Iterable[str]) -> bool:
    """Whether a graph with these inputs runs in every step."""
    return "timestep" in inputs


def is_autoencoder(inputs: Iterable[str]) -> bool:
    """Whether a graph with these inputs is half of an autoencoder, which makes large images in tiles."""
    return set(inputs) in ({"latent_sample"}, {"sample"})


def stages_of(graphs: Mapping[str, Collection[str]]) -> int:
    """Denoisers among graphs with these inputs, without ControlNets."""
    return sum(is_denoiser(inputs) and not name.startswith("controlnet") for name, inputs in graphs.items())


def inputs_of(graphs: Mapping[str, GraphFacts]) -> dict[str, list[str]]:
    """The names of the inputs of each graph."""
    return {name: [item.name for item in facts.inputs] for name, facts in graphs.items()}


def rows_of_image(inputs: Iterable[str], image: ImageFacts, stages: int) -> int:
    """Rows that an image takes in a denoiser with these inputs: two with guidance.

    `stages` are the denoisers of the bundle: a cascade has guidance of its own in some, whatever the request says.
    """
    guided = image.guidance > 1 or stages > 1
    return 2 if guided and not TOLD & set(inputs) else 1


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engines of a bundle serve."""

    bundle: ImageBundle
    axes: Mapping[str, Axes]
    """By graph."""
    rebuild: str
    """The command that builds them again."""

    def most_images(self, guidance: float) -> int:
        """Images that all denoisers take together; 0 if guidance fits in two calls of one image only."""
        image = self.bundle.manifest.image.model_copy(update={"guidance": guidance})
        stages = stages_of(inputs_of(self.bundle.manifest.graphs))
        most = [
            self.axes[name]["batch"][2] // rows_of_image([item.name for item in facts.inputs], image, stages)
            for name, facts in self._denoisers.items()
        ]
        return min(most, default=1)

    @property
    def _denoisers(self) -> dict[str, GraphFacts]:
        graphs = self.bundle.manifest.graphs
        return {
            name: graphs[name]
            for name, axes in self.axes.items()
            if "batch" in axes and is_denoiser(item.name for item in graphs[name].inputs)
        }

    def check_size(self, height: int, width: int, tiling: bool | None) -> None:
        """Raise RequestError for an image that a denoiser was not built for, or a decoder without tiles."""
        image, graphs = self.bundle.manifest.image, self.bundle.manifest.graphs
        for name, axes in self.axes.items():
            inputs = [item.name for item in graphs[name].inputs]
            whole = is_autoencoder(inputs)
            if not is_denoiser(inputs) and not (whole and tiling is False):
                continue
            usual = graphs[name].profiles[0].axes
            for axis in sorted(GROWTH.keys() & axes.keys() & usual.keys()):
                (least, _, most), count = axes[axis], grown(axis, usual[axis][1], image, (width, height))
                if not least <= count <= most:
                    sizes = dict.fromkeys(((image.width, image.height), (width, height)))
                    options = " ".join(f"--size {each[0]}x{each[1]}" for each in sizes)
                    tiles = " without tiles (Diffusion.tiling)" if whole else ""
                    raise RequestError(
                        f"{width}x{height} is {count} places along the {axis} of {name}, whose engine was built for "
                        f"{least} to {most}{tiles}; build it for more: {self.rebuild} {options}"
                    )

    def check_batch(self, batch: int) -> None:
        """Raise RequestError for more images together than there is room for."""
        most = max(1, self.most_images(self.bundle.manifest.image.guidance))
        if batch > most:
            raise RequestError(
                f"max_batch is {batch}, and the engines of {self.bundle.folder} make {most} images together; build "
                f"them for more: {self.rebuild} --batch {batch}"
            )


def read_limits(bundle: ImageBundle, device: str) -> EngineLimits | None:
    """The limits of a bundle on a device; None where there are no engines."""
    if device not in LIBRARIES:
        return None
    axes = {}
    command = ""
    for name, facts in bundle.manifest.graphs.items():
        file = bundle.file(facts.file)
        command = build_command(file, LIBRARIES[device].name)
        try:
            profiles = read_engine(file, LIBRARIES[device].name).facts.profiles
        except BackendError:  # said when the part is opened
            continue
        if facts.profiles and profiles:
            axes[name] = profiles[0].axes
    return EngineLimits(bundle, axes, command) if axes else None
