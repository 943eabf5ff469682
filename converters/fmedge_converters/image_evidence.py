"""The proof that a bundle makes the images that its source makes: the same prompts and seeds through diffusers and here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from fmedge_runtimes.bundle import Evidence, ImageFacts, ImageGolden
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.generated_image import GeneratedImage
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.load import load_image
from fmedge_runtimes.memory import available_bytes

from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.pipeline_files import INSTRUCTION
from fmedge_converters.pipeline_source import PipelineSource
from fmedge_converters.pixel_pipeline import PixelDiffusionPipeline

PROMPTS = ("a red circle", "a small blue square")
SEEDS = (0, 1)
STEPS = 4
"""At most; differences of graphs show in few, and grow in many."""
SIDE = 256
"""Pixels at most, where the pipeline makes other sizes than its own."""
LARGEST_FAN = 2.0
"""Memory that a pipeline takes while it runs, as a multiple of its weights."""
GOLDEN = "golden/0.png"
GOLDEN_TOLERANCE = 4.0
"""Levels; what other processors round differently is far below."""
PLAIN: Mapping[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
"""Arguments of some pipelines, which would make another size or another prompt of what was asked for."""
WITHOUT_SIZE = ("height", "width")

LEVELS: Mapping[tuple[str, str], float] = {
    ("float32", "none"): 0.5,
    ("float16", "none"): 4.0,
    ("float32", "fp16"): 4.0,
    ("float32", "bf16"): 8.0,
    ("float32", "int8"): 16.0,
    ("float16", "int8"): 16.0,
    ("float32", "int4"): 40.0,
    ("float16", "int4"): 40.0,
}
"""What the mean absolute difference of a channel may be, in levels of 0 to 255, by (compute type, quantization)."""

Paint = Callable[[int], npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Pictured:
    """What came of the comparison; nothing where it could not be made."""

    evidence: tuple[Evidence, ...] = ()
    goldens: tuple[ImageGolden, ...] = ()
    why_not: str | None = None


def compare_images(
    folder: Path, facts: ImageFacts, source: PipelineSource, load: Callable[[], dict[str, Any]], precision: tuple[str, str]
) -> Pictured:
    """Make images of the bundle in `folder` and of its source, whose modules `load` gives, and keep the first as golden.

    The golden image is written into the folder. Raises BackendError when the bundle makes none.
    """
    kind = PixelDiffusionPipeline if source.pipeline == PixelDiffusionPipeline.__name__ else None
    kind = kind or getattr(diffusers, source.pipeline)
    missing = _missing(kind)
    if missing is not None:
        return Pictured(why_not=f"{source.pipeline} {missing}")
    with load_image(folder, device="cpu", memory_mode="sequential", checksums=False) as model:
        options = _options(facts, model)
        found = [made(model, number, options) for number in range(len(PROMPTS))]
    short = _lacks_memory(source)
    golden = _keep(folder, found[0])
    if short is not None:
        return Pictured((), (golden,), short)
    pipeline = _pipeline(kind, source, load())
    wanted = [_painted(pipeline, folder, number, options) for number in range(len(PROMPTS))]
    return Pictured((_evidence(found, wanted, options, precision),), (golden,))


def _missing(kind: type[Any]) -> str | None:
    """What keeps a class from being called with a prompt, a seed and nothing else; None if nothing does."""
    parameters = inspect.signature(kind.__call__).parameters
    needed = {"prompt", "num_inference_steps", "guidance_scale", "generator", "height", "width"}
    if not needed <= set(parameters):
        return f"is called in a way of its own ({', '.join(sorted(needed - set(parameters)))} are no arguments)"
    if "image" in parameters and "strength" in parameters or "mask_image" in parameters:
        return "starts from images"
    if any(name.startswith("prior_") for name in parameters):
        return "has several stages with steps of their own"
    return None


def _options(facts: ImageFacts, model: ImageModel) -> Diffusion:
    sizes = model.pipeline.sizes
    sides = [
        side if sizes.fixed or side <= SIDE else max(SIDE // sizes.multiple, 1) * sizes.multiple
        for side in (facts.height, facts.width)
    ]
    return Diffusion(
        steps=min(facts.steps, STEPS), guidance=facts.guidance, seed=SEEDS, height=sides[0], width=sides[1]
    )


def made(model: ImageModel, number: int, options: Diffusion) -> GeneratedImage:
    """The bundle's image of one of the prompts."""
    one = Diffusion(
        steps=options.steps,
        guidance=options.guidance,
        seed=SEEDS[number],
        height=options.height,
        width=options.width,
    )
    return model.generate(PROMPTS[number], one)[0]


def _lacks_memory(source: PipelineSource) -> str | None:
    weights = sum(path.stat().st_size for part in source.parts for path in part.folder.glob("*.safetensors"))
    need, free = int(weights * LARGEST_FAN * 2), available_bytes()  # 16-bit weights take twice their size in fp32
    if free is None or need <= free:
        return None
    return f"the source takes about {need / 1e9:.1f} GB in PyTorch, {free / 1e9:.1f} GB are free"


def _pipeline(kind: type[Any], source: PipelineSource, modules: Mapping[str, Any]) -> Any:  # noqa: ANN401 - diffusers is untyped
    """The source in PyTorch, with these modules. Raises SourceError."""
    parameters = inspect.signature(kind.__init__).parameters
    parts: dict[str, Any] = {name: None for name in parameters if name in source.index}
    try:
        with quiet_libraries():
            parts |= {part.name: part.kind.from_pretrained(part.folder) for part in source.parts if not part.is_module}
            parts |= modules
            plain = {
                name: value
                for name, value in source.index.items()
                if not name.startswith("_") and name in parameters and not isinstance(value, list)
            }
            pipeline = kind(**{**parts, **plain, **({"requires_safety_checker": False} if "requires_safety_checker" in parameters else {})})
    except Exception as error:  # each class has its own ways to refuse
        raise SourceError(f"{source.folder}: diffusers cannot put {kind.__name__} together: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _painted(pipeline: Any, folder: Path, number: int, options: Diffusion) -> npt.NDArray[np.uint8]:  # noqa: ANN401
    """The source's image [H, W, 3] of one of the prompts."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    others: dict[str, Any] = {name: value for name, value in PLAIN.items() if name in parameters}
    if "complex_human_instruction" in parameters:
        file = folder / INSTRUCTION
        others["complex_human_instruction"] = file.read_text("utf-8").split("\n") if file.is_file() else None
    with quiet_libraries(), torch.no_grad():
        image = pipeline(
            prompt=[PROMPTS[number]],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[torch.Generator().manual_seed(SEEDS[number])],
            height=options.height,
            width=options.width,
            output_type="pil",
            **others,
        ).images[0]
    return np.asarray(image.convert("RGB"))


def _keep(folder: Path, image: GeneratedImage) -> ImageGolden:
    path = folder / GOLDEN
    path.parent.mkdir()
    path.write_bytes(image.png())
    settings = image.settings
    return ImageGolden(
        prompt=settings.prompt,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
        height=settings.height,
        width=settings.width,
        file=GOLDEN,
        tolerance=GOLDEN_TOLERANCE,
    )


def _evidence(
    found: list[GeneratedImage], wanted: list[npt.NDArray[np.uint8]], options: Diffusion, precision: tuple[str, str]
) -> Evidence:
    differences = [
        np.abs(np.asarray(one.image, np.int16) - other.astype(np.int16)) for one, other in zip(found, wanted, strict=True)
    ]
    mean = float(np.mean([item.mean() for item in differences]))
    worst = max(int(item.max()) for item in differences)
    error = float(np.mean([np.square(item, dtype=np.float64).mean() for item in differences]))
    figures: dict[str, float | int | str | bool] = {"mean_levels": mean, "largest_levels": worst}
    if error > 0:
        figures["psnr_db"] = 10 * math.log10(255**2 / error)
    what = (
        f"{len(found)} images of {options.width}x{options.height} in {options.steps} steps with guidance "
        f"{options.guidance:g}, against diffusers in fp32 with the same seeds"
    )
    return Evidence(name="image", what=what, passed=mean <= LEVELS[precision], figures=figures)
