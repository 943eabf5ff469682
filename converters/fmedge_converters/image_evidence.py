"""The proof that a bundle makes its source's images: the same prompts and seeds through diffusers and here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
import transformers
from fmedge_runtimes.bundle import ImageBundle
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.generated_image import GeneratedImage
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.manifest import Evidence, ImageFacts, ImageGolden
from fmedge_runtimes.memory import available_bytes
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.parts import Parts
from fmedge_runtimes.session import Session

from fmedge_converters.controlnet_source import is_controlnet
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.ip_adapter import ENCODER, FACTS
from fmedge_converters.ip_adapter_source import PROCESSOR
from fmedge_converters.pipeline_files import INSTRUCTION
from fmedge_converters.pipeline_source import PipelineSource
from fmedge_converters.pixel_pipeline import PixelDiffusionPipeline
from fmedge_converters.profiles import GOLDEN_SIDE

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = ("a red circle", "a small blue square")
SEEDS = (0, 1)
STEPS = 4
"""At most; differences of graphs show in few, and grow in many."""
LARGEST_FAN = 2.0
"""Memory that a pipeline takes while it runs, as a multiple of its weights."""
GOLDEN, CONTROL, REFERENCE = "golden/0.png", "golden/control_{}.png", "golden/ip_adapter_image.png"
GOLDEN_LEVELS = {True: 1.0, False: 4.0}
"""What other processors may round differently, in the mean of 0 to 255: of a graph all in fp32, and of others."""
PLAIN: Mapping[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
"""Arguments of some pipelines, which would make another size or another prompt of what was asked for."""

ERRORS: Mapping[tuple[str, str], float] = {
    ("float32", "none"): 0.02,
    ("float16", "none"): 0.05,
    ("float32", "fp16"): 0.05,
    ("float32", "bf16"): 0.1,
    ("float32", "int8"): 0.25,
    ("float16", "int8"): 0.25,
    ("float16", "fp8"): 0.25,
    ("float32", "int4"): 0.4,
    ("float16", "int4"): 0.4,
}
"""What the images' error may be, by (compute type, quantization): the root mean square of the differences over the
standard deviation of the source's own pixels. A blank image is 1, another image about 1.4. Found with the
quickstart's model and a random Stable Diffusion: 0.000 (none), 0.005 (bf16), 0.03 (int8), 0.02 to 0.04 (int4)."""


@dataclass(frozen=True, slots=True)
class Pictured:
    """What came of the comparison; nothing where it could not be made."""

    evidence: tuple[Evidence, ...] = ()
    goldens: tuple[ImageGolden, ...] = ()
    why_not: str | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """Pictures that are drawn for the comparison."""

    controls: tuple[Image, ...]
    """For each ControlNet."""
    reference: Image | None
    """For an IP-Adapter."""


def compare_images(
    bundle: ImageBundle, source: PipelineSource, load: Callable[[], dict[str, Any]], precision: tuple[str, str]
) -> Pictured:
    """Make images with the bundle and with its source, whose modules `load` gives; the first is kept as golden.

    It is written into the bundle's folder, which may lack a manifest yet. Raises BackendError when a graph fails.
    """
    ours = source.pipeline == PixelDiffusionPipeline.__name__
    kind = PixelDiffusionPipeline if ours else getattr(diffusers, source.pipeline, None)
    why_not = _obstacle(kind, [part.name for part in source.parts if not is_controlnet(part)])
    if kind is None or why_not is not None:
        return Pictured(why_not=f"{source.pipeline} {why_not}")
    with ImageModel(bundle, _parts(bundle)) as model:
        shown = shown_pictures(bundle, sum(map(is_controlnet, source.parts)))
        options = diffusion_options(bundle.manifest.image, model, shown, STEPS, SEEDS)
        found = [model.generate(prompt, one)[0] for prompt, one in zip(PROMPTS, options, strict=True)]
    golden = _keep(bundle.folder, found[0], shown, GOLDEN_LEVELS[precision == ("float32", "none")])
    why_not = _lacks_memory(source)
    if why_not is not None:
        return Pictured((), (golden,), why_not)
    pipeline = _pipeline(kind, source, load(), bundle.folder)
    wanted = [_painted(pipeline, bundle.folder, *each) for each in zip(PROMPTS, SEEDS, options, strict=True)]
    return Pictured((_evidence(found, wanted, precision),), (golden,))


def _parts(bundle: ImageBundle) -> Parts:
    def open_part(name: str) -> Session:
        return OnnxRuntimeSession(bundle.file(bundle.manifest.graphs[name].file), "cpu", None)

    return Parts(bundle.folder, frozenset(bundle.manifest.graphs), open_part, "sequential")


def _obstacle(kind: type[Any] | None, parts: Sequence[str] = ()) -> str | None:
    """What keeps a class from being called with a prompt, a seed and nothing else; None if nothing does."""
    if kind is None:
        return "is no class of diffusers"
    parameters = inspect.signature(kind.__call__).parameters
    needed = {"prompt", "num_inference_steps", "guidance_scale", "generator", "height", "width"}
    if not needed <= set(parameters):
        return f"is called in a way of its own ({', '.join(sorted(needed - set(parameters)))} are no arguments)"
    if "image" in parameters and not _sees_control(kind):
        return "starts from images"
    known = inspect.signature(kind.__init__).parameters
    others = [name for name in parts if name not in known]
    if others:
        return f"has further stages, which diffusers has as pipelines of their own ({', '.join(others)})"
    if any(name.startswith("prior_") for name in parameters):
        return "has several stages with steps of their own"
    return None


def _sees_control(kind: type[Any]) -> bool:
    """Whether the image that a class is given is shown to its ControlNets alone."""
    parameters = inspect.signature(kind.__call__).parameters
    return "controlnet_conditioning_scale" in parameters and "control_image" not in parameters


def _drawn(number: int, height: int, width: int) -> Image:
    """A picture of lines and surfaces, another one for each number."""
    from PIL import Image

    y, x = np.mgrid[:height, :width] / max(height, width)  # [H, W] each
    waves = [np.sin((4 + number) * np.pi * (x + y * shift)) for shift in (0.3, -0.7, 1.1)]
    return Image.fromarray((np.stack(waves, axis=-1) > np.array([0.9, 0.0, -0.5])).astype(np.uint8) * np.uint8(255))


def shown_pictures(bundle: ImageBundle, controls: int) -> Shown:
    """A picture for each ControlNet, and one for the IP-Adapter if there is one."""
    facts = bundle.manifest.image
    side = min(facts.height, GOLDEN_SIDE), min(facts.width, GOLDEN_SIDE)
    pictures = tuple(_drawn(number, *side) for number in range(controls + 1))
    adapted = (bundle.folder / ENCODER / FACTS).is_file()
    return Shown(pictures[:controls], pictures[-1] if adapted else None)


def diffusion_options(
    facts: ImageFacts, model: ImageModel, shown: Shown, most_steps: int, seeds: Iterable[int]
) -> list[Diffusion]:
    """For each seed, at most so many steps of a small image."""
    sizes = model.pipeline.sizes
    height, width = (
        side if sizes.fixed or side <= GOLDEN_SIDE else max(GOLDEN_SIDE // sizes.multiple, 1) * sizes.multiple
        for side in (facts.height, facts.width)
    )
    steps = min(facts.steps, most_steps)
    guidance = facts.guidance if "guidance" in model.pipeline.takes else None
    return [
        Diffusion(
            steps=steps,
            guidance=guidance,
            seed=seed,
            height=height,
            width=width,
            control=shown.controls or None,
            ip_adapter_image=shown.reference,
        )
        for seed in seeds
    ]


def _lacks_memory(source: PipelineSource) -> str | None:
    weights = sum(path.stat().st_size for part in source.parts for path in part.folder.glob("*.safetensors"))
    need, free = int(weights * LARGEST_FAN * 2), available_bytes()  # 16-bit weights take twice their size in fp32
    if free is None or need <= free:
        return None
    return f"the source takes about {need / 1e9:.1f} GB in PyTorch, {free / 1e9:.1f} GB are free"


def _pipeline(kind: type[Any], source: PipelineSource, modules: Mapping[str, Any], folder: Path) -> Any:  # noqa: ANN401 - diffusers is untyped
    """The source in PyTorch, with these modules. Raises SourceError."""
    parameters = inspect.signature(kind.__init__).parameters
    parts: dict[str, Any] = {name: None for name in parameters if isinstance(source.index.get(name), list)}
    try:
        with quiet_libraries():
            parts |= {part.name: part.kind.from_pretrained(part.folder) for part in source.parts if not part.is_module}
            parts |= modules
            if ENCODER in modules and parts.get(PROCESSOR) is None:
                parts[PROCESSOR] = transformers.CLIPImageProcessor.from_pretrained(folder / PROCESSOR)
            nets = [parts.pop(part.name) for part in source.parts if is_controlnet(part)]
            parts |= {"controlnet": nets if len(nets) > 1 else nets[0]} if nets else {}
            plain = {
                name: value
                for name, value in source.index.items()
                if not name.startswith("_") and name in parameters and not isinstance(value, list)
            }
            if "requires_safety_checker" in parameters:
                plain["requires_safety_checker"] = False
            pipeline = kind(**parts, **plain)
    except Exception as error:  # each class has its own ways to refuse
        raise SourceError(f"{source.folder}: diffusers cannot put {kind.__name__} together: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _painted(
    pipeline: Any,  # noqa: ANN401 - diffusers is untyped
    folder: Path,
    prompt: str,
    seed: int,
    options: Diffusion,
) -> npt.NDArray[np.uint8]:
    """The source's image of a prompt [H, W, 3]."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    others: dict[str, Any] = {name: value for name, value in PLAIN.items() if name in parameters}
    if "complex_human_instruction" in parameters:
        file = folder / INSTRUCTION
        others["complex_human_instruction"] = file.read_text("utf-8").split("\n")
    if options.control is not None:
        shown = list(options.control) if isinstance(options.control, tuple) else [options.control]
        others["image"] = shown if len(shown) > 1 else shown[0]
    if options.ip_adapter_image is not None:
        others["ip_adapter_image"] = options.ip_adapter_image
    with quiet_libraries(), torch.no_grad():
        image = pipeline(
            prompt=[prompt],
            num_inference_steps=options.steps,
            guidance_scale=0.0 if options.guidance is None else options.guidance,
            generator=[torch.Generator().manual_seed(seed)],
            height=options.height,
            width=options.width,
            output_type="pil",
            **others,
        ).images[0]
    return np.asarray(image.convert("RGB"))


def _keep(folder: Path, image: GeneratedImage, shown: Shown, tolerance: float) -> ImageGolden:
    path = folder / GOLDEN
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(image.png())
    controls = [CONTROL.format(number) for number in range(len(shown.controls))]
    for file, picture in zip(controls, shown.controls, strict=True):
        picture.save(folder / file)
    if shown.reference is not None:
        shown.reference.save(folder / REFERENCE)
    settings = image.settings
    return ImageGolden(
        prompt=settings.prompt,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
        height=settings.height,
        width=settings.width,
        file=GOLDEN,
        controls=tuple(controls),
        ip_adapter_image=None if shown.reference is None else REFERENCE,
        tolerance=tolerance,
    )


def _evidence(found: list[GeneratedImage], wanted: list[npt.NDArray[np.uint8]], precision: tuple[str, str]) -> Evidence:
    ours = np.stack([np.asarray(one.image, np.float64) for one in found])  # [N, H, W, 3]
    theirs = np.stack(wanted).astype(np.float64)  # [N, H, W, 3]
    difference = np.abs(ours - theirs)
    error = math.sqrt(np.square(difference).mean()) / max(float(theirs.std()), 1e-12)
    figures: dict[str, float | int | str | bool] = {
        "error": error,
        "mean_levels": float(difference.mean()),
        "largest_levels": int(difference.max()),
    }
    settings = found[0].settings
    what = (
        f"{len(found)} images of {settings.width}x{settings.height} in {settings.steps} steps with guidance "
        f"{settings.guidance:g}, against diffusers in fp32 with the same seeds"
    )
    return Evidence(name="image", what=what, passed=error <= ERRORS[precision], figures=figures)
