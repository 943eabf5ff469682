"""How an image is made: the options of a request. docs/images.md defines each.

Diffusion(steps=8, guidance=1.0, seed=7)
Diffusion(image="in.png", strength=0.6, negative="blurry")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

from fmedge_runtimes.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = str | PathLike[str] | Image
    """A file, or an image of Pillow."""

MOST_IMAGES = 10_000
"""Of one prompt."""
MOST_PIXELS = 2**28
"""Of one image: 16384 x 16384."""


@dataclass(frozen=True, slots=True)
class Diffusion:
    """Options of a call; None takes what the bundle recommends.

    Lists are taken where tuples are declared, and are kept as tuples. Raises RequestError when a value is outside its
    range, or when two options contradict each other.
    """

    steps: int | None = None
    """Steps from noise to image."""
    guidance: float | None = None
    """How strongly the prompt pulls, against the negative one; at 1 or less there is no guidance, which takes half the
    time."""
    seed: int | tuple[int | None, ...] | None = None
    """Of a prompt's first image; its next ones count up. One for all prompts, or one for each; None draws."""
    negative: str | tuple[str | None, ...] | None = None
    """What the image should not show: one text for all prompts, or one for each."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    n: int = 1
    """Images of each prompt."""
    scheduler: str | None = None
    """How noise is taken away, by name; the bundle's own unless given."""
    image: Picture | None = None
    """Where to start from, instead of noise: a file, or an image of Pillow."""
    strength: float | None = None
    """With an image, how much of the trajectory is run: near 0 it stays the image, at 1 nothing is left of it.
    0.8 unless given; with a mask, 1."""
    mask: Picture | None = None
    """With an image, what is painted anew: where the mask is white."""
    control: Picture | tuple[Picture | tuple[Picture, ...] | None, ...] | None = None
    """What a ControlNet is shown: one image for all prompts, or a list with one for each. With several ControlNets a
    list with such an entry for each of them; None lets one rest."""
    control_scale: float | tuple[float, ...] = 1.0
    """How strongly ControlNets pull: one number for all, or one for each."""
    control_start: float | tuple[float, ...] = 0.0
    """Share of the steps behind which a ControlNet begins."""
    control_end: float | tuple[float, ...] = 1.0
    """Share of the steps behind which it rests."""
    guess_mode: bool = False
    """Whether ControlNets tell only the prompt's half of guidance, the first layers the least: the image speaks even
    without a prompt."""
    adapter_scale: float | None = None
    """How much of a LoRA is added that the bundle keeps beside its weights."""
    ip_adapter_image: Picture | tuple[Picture, ...] | None = None
    """What an IP-Adapter is shown beside the prompt: one image for all prompts, or a list with one for each."""
    ip_adapter_scale: float = 1.0
    """How strongly that image pulls."""
    guidance_rescale: float = 0.0
    """Brings the contrast that guidance adds back to that of the prompt's prediction (Lin et al. 2023); 0 is off."""
    clip_skip: int = 0
    """Layers of the CLIP text encoder to leave out at its end."""
    weights: bool = True
    """Whether brackets in prompts are weights, as in (word:1.3); False takes them literally."""
    max_sequence_length: int | None = None
    """Tokens to which a T5 or Gemma text encoder's prompt is padded, and may have; None: the pipeline's default."""
    noise_level: int | None = None
    """How much noise an upscaler puts on the small image, as a timestep of training: more lets it invent more."""
    tiling: bool | None = None
    """Whether large images are decoded in overlapping tiles, which bounds memory; None: above 1.5 million pixels."""
    tiny_vae: bool = False
    """Decode with the bundle's small autoencoder: faster, less detail."""
    preview_every: int = 0
    """Steps between previews in `stream`; 0 makes none."""

    def __post_init__(self) -> None:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in checked(given).items():
            object.__setattr__(self, name, value)
        if self.image is None and self.mask is not None:
            raise RequestError(
                "Diffusion.mask is given without image; a mask says which part of an image is repainted."
            )
        if self.image is None and self.strength is not None:
            raise RequestError(f"Diffusion.strength is {self.strength} without image; it is for images only.")

        if self.ip_adapter_image is None and self.ip_adapter_scale != 1.0:
            raise RequestError(f"Diffusion.ip_adapter_scale is {self.ip_adapter_scale:g} without ip_adapter_image.")
        if self.control is None:
            for name in ("control_scale", "control_start", "control_end", "guess_mode"):
                if getattr(self, name) != self.__dataclass_fields__[name].default:
                    raise RequestError(f"Diffusion.{name} is given without control; it is for ControlNets only.")

    def seed_of(self, prompt: int) -> int | None:
        """The seed of a prompt's first image."""
        return self.seed[prompt] if isinstance(self.seed, tuple) else self.seed

    def negative_of(self, prompt: int) -> str | None:
        """The negative text of a prompt."""
        return self.negative[prompt] if isinstance(self.negative, tuple) else self.negative

    def check_prompts(self, count: int) -> None:
        """Raise RequestError if there is one of something for each of another number of prompts."""
        for name in ("seed", "negative"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != count:
                raise RequestError(
                    f"Diffusion.{name} has {len(value)} values for {count} prompts; give one for all, or one for each."
                )


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of single options, by name, in the form in which Diffusion keeps them.

    Raises RequestError when one is outside its range; whether they go together, Diffusion itself says.
    """
    known = {name: _as_tuple(value) if name in _LISTED else value for name, value in values.items()}
    for name, valid, wanted in _RULES:
        if name in known and not _holds(valid, known[name]):
            raise RequestError(f"Diffusion.{name} is {known[name]!r}; it must be {wanted}.")
    return known


def _as_tuple(value: Any) -> Any:  # noqa: ANN401 - what a user gave
    return tuple(map(_as_tuple, value)) if _is_list(value) else value


def _is_list(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    return isinstance(value, Sequence) and not isinstance(value, str)


def _holds(valid: Callable[[Any], bool], value: Any) -> bool:  # noqa: ANN401 - what a user gave
    try:
        return valid(value)
    except TypeError:
        return False


def _is_whole(value: Any, least: int, most: float = math.inf) -> bool:  # noqa: ANN401 - what a user gave
    return isinstance(value, SupportsIndex) and not isinstance(value, bool) and least <= int(value) <= most


def _is_seed(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    seeds = value if isinstance(value, tuple) else (value,)
    # 2**63 - 1 is what every program that reads a PNG's parameters takes.
    return all(seed is None or _is_whole(seed, 0, 2**63 - 1) for seed in seeds)


def _is_negative(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    texts = value if isinstance(value, tuple) else (value,)
    return value is None or all(text is None or isinstance(text, str) for text in texts)


def _is_picture(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    # Pillow is imported only where an image is opened; an image of it has a size and a mode.
    return value is None or isinstance(value, str | PathLike) or (hasattr(value, "mode") and hasattr(value, "size"))


def _is_number(value: Any, least: float, most: float) -> bool:  # noqa: ANN401 - what a user gave
    return not isinstance(value, bool) and least <= value <= most


def _is_control(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    return all(map(_is_control, value)) if isinstance(value, tuple) else _is_picture(value)


def _is_share(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    return all(_is_number(one, 0.0, 1.0) for one in (value if isinstance(value, tuple) else (value,)))


def _is_scale(value: Any) -> bool:  # noqa: ANN401 - what a user gave
    return all(_is_number(one, 0.0, 100.0) for one in (value if isinstance(value, tuple) else (value,)))


_LISTED = frozenset(
    {"seed", "negative", "control", "control_scale", "control_start", "control_end", "ip_adapter_image"}
)
"""Fields that may have one value for each of something."""
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("steps", lambda value: value is None or _is_whole(value, 1), "at least 1"),
    ("guidance", lambda value: value is None or _is_number(value, 0.0, 1e4), "from 0 to 10000 (up to 1 is off)"),
    ("seed", _is_seed, "from 0 to 2**63 - 1, one for all prompts or one for each"),
    ("negative", _is_negative, "a text, or one for each prompt"),
    ("height", lambda value: value is None or _is_whole(value, 1), "at least 1"),
    ("width", lambda value: value is None or _is_whole(value, 1), "at least 1"),
    ("n", lambda value: _is_whole(value, 1, MOST_IMAGES), f"from 1 to {MOST_IMAGES}"),
    ("scheduler", lambda value: value is None or (isinstance(value, str) and value != ""), "a scheduler's name"),
    ("image", _is_picture, "a file, or an image of Pillow"),
    ("mask", _is_picture, "a file, or an image of Pillow"),
    ("strength", lambda value: value is None or _is_number(value, 1e-9, 1.0), "above 0 and at most 1"),
    ("control", _is_control, "a file or an image of Pillow, or a list of them"),
    ("control_scale", _is_scale, "from 0 (off) to 100"),
    ("control_start", _is_share, "from 0 to 1"),
    ("control_end", _is_share, "from 0 to 1"),
    ("guess_mode", lambda value: isinstance(value, bool), "true or false"),
    (
        "adapter_scale",
        lambda value: value is None or _is_number(value, -100.0, 100.0),
        "from -100 to 100 (0 is none of it)",
    ),
    ("ip_adapter_image", _is_control, "a file or an image of Pillow, or a list of them"),
    ("ip_adapter_scale", lambda value: _is_number(value, 0.0, 100.0), "from 0 (off) to 100"),
    ("guidance_rescale", lambda value: _is_number(value, 0.0, 1.0), "from 0 (off) to 1"),
    ("max_sequence_length", lambda value: value is None or _is_whole(value, 1), "at least 1"),
    ("noise_level", lambda value: value is None or _is_whole(value, 0), "0 (none) or more"),
    ("clip_skip", lambda value: _is_whole(value, 0), "0 (none) or more"),
    ("weights", lambda value: isinstance(value, bool), "true or false"),
    ("tiling", lambda value: value is None or isinstance(value, bool), "true, false or None"),
    ("tiny_vae", lambda value: isinstance(value, bool), "true or false"),
    ("preview_every", lambda value: _is_whole(value, 0), "0 (none) or more"),
)
