"""What a request for images gives: images with what made them, and how far it is meanwhile.

image.save("red-circle.png")  # a PNG that says prompt, seed and settings
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from fmedge_runtimes.pipelines.pipeline import Stage

CHUNK = "parameters"
"""The text chunk that viewers of Stable Diffusion's images look for."""
OWN_CHUNK = "fmedge"
"""The text chunk with the same as JSON."""


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """How a ControlNet was at work."""

    net: str
    scale: float
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that an image depends on, beside the bundle; with the same settings it is the same image."""

    prompt: str
    negative: str | None
    seed: int
    steps: int
    guidance: float
    height: int
    width: int
    scheduler: str
    """As the request named it, else diffusers' name of its class."""
    strength: float | None
    """None: made from noise alone."""
    inpainted: bool
    guidance_rescale: float
    clip_skip: int
    weights: bool
    max_sequence_length: int | None
    tiling: bool | None
    tiny_vae: bool
    noise_level: int | None
    model: str
    """The source of the bundle."""
    controls: tuple[ControlSettings, ...] | None = None
    """The ControlNets that were at work; None without."""
    guess_mode: bool = False
    adapter_scale: float | None = None
    """Of the LoRA that the bundle keeps beside its weights; None without."""
    ip_adapter_scale: float | None = None
    """Of the image that an IP-Adapter was shown; None without."""


@dataclass(frozen=True, slots=True)
class ImageStats:
    """How an image was made."""

    evaluations: int
    """Calls of the denoiser, guidance counted once."""
    batch: int
    """Images that were made together with it, itself included."""
    encode_seconds: float
    """Of all of them: prompts, and the image that they start from. Times include loading a part."""
    denoise_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.encode_seconds + self.denoise_seconds + self.decode_seconds


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """One image."""

    image: Image
    """Pillow's, RGB."""
    settings: Settings
    prompt_index: int
    """Of its prompt, in the call."""
    index: int
    """Among the images of its prompt."""
    stats: ImageStats
    latents: npt.NDArray[np.float32] = field(repr=False)
    """What the denoiser gave [C, h, w], before it was decoded."""

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.settings.prompt

    @property
    def seed(self) -> int:
        """With which the same call makes it again."""
        return self.settings.seed

    @property
    def parameters(self) -> str:
        """The settings as viewers of Stable Diffusion's images show them."""
        return parameters(self.settings)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a PNG that carries the settings; the file is there whole or not at all. Raises OSError."""
        write_aside(Path(path), self.png())

    def png(self) -> bytes:
        """The bytes of that PNG: the same for the same image and settings."""
        return png(self.image, {CHUNK: self.parameters, OWN_CHUNK: settings_json(self.settings)})


@dataclass(frozen=True, slots=True)
class ImageUpdate:
    """How far a request is."""

    stage: Stage
    done: int
    """Steps of the batch that is being denoised; of the other stages, images."""
    total: int
    images: tuple[int, ...] = ()
    """Which of the call's images it is about; empty for all."""
    previews: tuple[Image, ...] = ()
    """Of each of them, when it was asked for."""
    finished: tuple[GeneratedImage, ...] = ()
    """Images that are ready."""


def parameters(settings: Settings) -> str:
    """The settings in the form that Stable Diffusion's web interface made common."""
    facts: dict[str, object] = {
        "Steps": settings.steps,
        "Sampler": settings.scheduler,
        "CFG scale": f"{settings.guidance:g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": settings.model,
    }
    if settings.strength is not None:
        facts["Denoising strength"] = f"{settings.strength:g}"
    if settings.clip_skip:
        # There, 1 is the last layer.
        facts["Clip skip"] = settings.clip_skip + 1
    for number, control in enumerate(settings.controls or ()):
        shown = f"Model: {control.net}, Weight: {control.scale:g}, Guidance: {control.start:g} to {control.end:g}"
        facts[f"ControlNet {number}"] = shown
    if settings.adapter_scale is not None:
        facts["LoRA scale"] = f"{settings.adapter_scale:g}"
    if settings.ip_adapter_scale is not None:
        facts["IP-Adapter scale"] = f"{settings.ip_adapter_scale:g}"
    facts["Version"] = f"fmedge {__version__}"
    lines = [settings.prompt, f"Negative prompt: {settings.negative}" if settings.negative else None]
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in facts.items()))
    return "\n".join(line for line in lines if line is not None)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def settings_json(settings: Settings) -> str:
    """The settings as JSON, in ASCII."""
    record: dict[str, Any] = {"made_by": f"fmedge {__version__}", **asdict(settings)}
    return json.dumps(record)


def png(image: Image, texts: Mapping[str, str]) -> bytes:
    """A PNG with text chunks (tEXt, or iTXt for what Latin-1 lacks)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        # A chunk cannot hold NUL.
        info.add_text(name, text.replace("\0", "\N{REPLACEMENT CHARACTER}"))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def sheet_of(images: Sequence[Image], columns: int | None = None) -> Image:
    """Images side by side, in rows; as many columns as make it about square, unless given. Sizes may differ."""
    from PIL import Image

    if not images:
        raise ValueError("a grid needs images")
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    width, height = max(image.width for image in images), max(image.height for image in images)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(images)), height * rows), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


def write_aside(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that it is there whole or not at all. Raises OSError."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
