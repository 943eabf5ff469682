"""What goes into the products of an image pipeline's parts while it makes images: for codes with fixed scales.

The runtime's own pipeline renders a few prompts in few steps, over the parts' PyTorch modules in fp32 in place of
graphs, one part in memory at a time where they take turns. So this works for every pipeline that the runtime has, with
its schedulers and its guidance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fmedge_runtimes.bundle import ImageBundle
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.manifest import FORMAT, Evidence, ImageFacts, ImageManifest, SourceFacts
from fmedge_runtimes.parts import Parts
from fmedge_runtimes.session import Session

from fmedge_converters.calibration.linear_inputs import Watching
from fmedge_converters.image_evidence import diffusion_options, shown_pictures
from fmedge_converters.module_session import ModuleSession
from fmedge_converters.parts.part import Call
from fmedge_converters.pipeline_source import PipelineSource

PROMPTS = (
    "a portrait of an old fisherman in the evening sun",
    "a busy street in the rain at night, neon signs, reflections",
    "a bowl of fruit on a wooden table, oil painting",
    "snowy mountains behind a lake, wide view, early morning",
)
STEPS = 8
"""At most: they are spread over the whole trajectory, whatever their number."""

Ranges = Mapping[str, Mapping[str, float]]
"""The largest magnitude of the input of each product, by part and by the parameter that is its weight."""


@dataclass(frozen=True, slots=True)
class ImageCalibration:
    """Ranges, and where they are from."""

    ranges: Ranges
    evidence: Evidence


def read_prompts(sources: Sequence[str]) -> tuple[str, ...]:
    """The prompts of text files, one on each line; the built-in ones if there is no file.

    Raises ExportError when a file cannot be read, or holds none.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        try:
            found += [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ExportError(f"cannot read the prompts of {path}: {error}.") from error
    if sources and not found:
        raise ExportError(f"{' and '.join(sources)}: there is no prompt; write one on each line.")
    return tuple(found) or PROMPTS


def sketched_manifest(source: PipelineSource, facts: ImageFacts) -> ImageManifest:
    """A manifest for a folder without graphs, in which modules run."""
    return ImageManifest(
        format=FORMAT,
        kind="image",
        source=SourceFacts(
            id=source.id, revision=source.revision, architecture=source.pipeline, licence=source.licence
        ),
        target="cpu",
        precision="none",
        block_size=None,
        graphs={},
        image=facts,
        evidence=(),
        golden=(),
        forced=False,
        files={},
        made_by={},
    )


def measure_ranges(
    bundle: ImageBundle,
    calls: Mapping[str, Mapping[str, Call]],
    load: Callable[[str], Any],
    prompts: Sequence[str],
    controls: int,
    progress: Callable[[str, int, int], None],
) -> ImageCalibration:
    """Make an image of each prompt, and note the inputs of all products on the way.

    The bundle's folder has what the runtime reads but the graphs; `calls` are those of each part, `load` gives a part's
    module, `controls` is the number of ControlNets. Raises RequestError and BackendError as the runtime does.
    """
    ranges: dict[str, dict[str, float]] = {part: {} for part in calls}
    owners = {graph: (part, call) for part, graphs in calls.items() for graph, call in graphs.items()}

    def open_part(name: str) -> Session:
        part, call = owners[name]
        module = load(part)
        see = functools.partial(
            _see, {value.data_ptr(): each for each, value in module.named_parameters()}, ranges[part]
        )
        return ModuleSession(module, call, lambda: Watching(see))

    names = frozenset(owners)
    with ImageModel(bundle, Parts(bundle.folder, names, open_part, "sequential"), max_batch=1) as model:
        shown = shown_pictures(bundle, controls)
        for number, (prompt, options) in enumerate(
            zip(
                prompts, diffusion_options(bundle.manifest.image, model, shown, STEPS, range(len(prompts))), strict=True
            )
        ):
            progress("calibrating", number, len(prompts))
            settings = model.generate(prompt, options)[0].settings
    size = f"{settings.width}x{settings.height} in {settings.steps} steps"
    return ImageCalibration(
        ranges,
        Evidence(
            name="calibration",
            what=f"ranges of activations measured, on {len(prompts)} images of {size}",
            passed=True,
            figures={"prompts": len(prompts), "products": sum(map(len, ranges.values()))},
        ),
    )


def _see(names: Mapping[int, str], ranges: dict[str, float], x: torch.Tensor, matrix: torch.Tensor) -> None:
    """Note the largest magnitude of the input of a product with a parameter."""
    parameter = names.get(matrix.data_ptr())
    if parameter is not None and x.numel():
        ranges[parameter] = max(ranges.get(parameter, 0.0), float(x.abs().max()))
