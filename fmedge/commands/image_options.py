"""What an image is asked to be like, as options of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

IMAGES = "For bundles that make images"
IMAGE_OPTIONS = frozenset(
    {
        "steps",
        "guidance",
        "negative",
        "size",
        "scheduler",
        "image",
        "strength",
        "mask",
        "control",
        "control_scale",
        "control_start",
        "control_end",
        "guess_mode",
        "adapter_scale",
        "ip_adapter_image",
        "ip_adapter_scale",
        "guidance_rescale",
        "clip_skip",
        "literal",
        "max_sequence_length",
        "tiling",
        "tiny_vae",
        "noise_level",
        "memory_mode",
        "grid",
        "preview_every",
        "preview",
    }
)
"""Parameters of the command that only such bundles take."""

Steps = Annotated[int | None, typer.Option(help="Steps from noise to image.", rich_help_panel=IMAGES)]
Guidance = Annotated[
    float | None,
    typer.Option(help="How strongly the prompt pulls; up to 1 is off, and faster.", rich_help_panel=IMAGES),
]
Negative = Annotated[str | None, typer.Option(help="What the images should not show.", rich_help_panel=IMAGES)]
Size = Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="In pixels.", rich_help_panel=IMAGES)]
Scheduler = Annotated[
    str | None,
    typer.Option(help="How noise is taken away: euler, dpm++2m-karras, ...", rich_help_panel=IMAGES),
]
StartImage = Annotated[Path | None, typer.Option(metavar="FILE", help="Start from this image.", rich_help_panel=IMAGES)]
Strength = Annotated[
    float | None,
    typer.Option(help="With --image: near 0 it stays, at 1 nothing is left of it.", rich_help_panel=IMAGES),
]
Mask = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="With --image: repaint only where this is white.", rich_help_panel=IMAGES),
]
Control = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Image for the ControlNet: one for all prompts, or repeated for each; of a bundle with several "
        "ControlNets one for each of them.",
        rich_help_panel=IMAGES,
    ),
]
ControlScale = Annotated[
    list[float] | None,
    typer.Option(help="How strongly ControlNets pull; may be repeated for each.", rich_help_panel=IMAGES),
]
ControlStart = Annotated[
    list[float] | None,
    typer.Option(help="Share of the steps behind which a ControlNet begins.", rich_help_panel=IMAGES),
]
ControlEnd = Annotated[
    list[float] | None,
    typer.Option(help="Share of the steps behind which a ControlNet rests.", rich_help_panel=IMAGES),
]
GuessMode = Annotated[
    bool,
    typer.Option("--guess-mode", help="The ControlNet's image speaks even without a prompt.", rich_help_panel=IMAGES),
]
AdapterScale = Annotated[
    float | None,
    typer.Option(help="How much of a LoRA is added, of a bundle that keeps one apart.", rich_help_panel=IMAGES),
]
IpAdapterImage = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Image for the IP-Adapter: one for all prompts, or repeated for each.",
        rich_help_panel=IMAGES,
    ),
]
IpAdapterScale = Annotated[float | None, typer.Option(help="How strongly that image pulls.", rich_help_panel=IMAGES)]
GuidanceRescale = Annotated[
    float | None, typer.Option(help="Contrast brought back, from 0 (off) to 1.", rich_help_panel=IMAGES)
]
ClipSkip = Annotated[
    int | None, typer.Option(help="Last layers of the text encoder to leave out.", rich_help_panel=IMAGES)
]
LiteralPrompts = Annotated[
    bool, typer.Option("--literal", help="Brackets in prompts are no weights.", rich_help_panel=IMAGES)
]
MaxSequenceLength = Annotated[
    int | None,
    typer.Option(help="Tokens that a T5 or Gemma text encoder's prompt may have.", rich_help_panel=IMAGES),
]
Tiling = Annotated[
    bool | None,
    typer.Option("--tiling/--no-tiling", help="Decode in tiles; large images only.", rich_help_panel=IMAGES),
]
TinyVae = Annotated[
    bool, typer.Option("--tiny-vae", help="Decode with the bundle's small autoencoder.", rich_help_panel=IMAGES)
]
NoiseLevel = Annotated[
    int | None,
    typer.Option(help="Of upscalers: noise on the small image; more invents more.", rich_help_panel=IMAGES),
]
MemoryMode = Annotated[
    str | None,
    typer.Option(help="keep: all parts stay loaded; sequential: one at a time.", rich_help_panel=IMAGES),
]
Grid = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write all images side by side to a .png, too.", rich_help_panel=IMAGES),
]
PreviewEvery = Annotated[
    int | None,
    typer.Option(metavar="STEPS", help="Write a small preview every so many steps.", rich_help_panel=IMAGES),
]
Preview = Annotated[
    Path | None,
    typer.Option(
        metavar="PLACE",
        help="Folder for previews, or a .png file that shows the newest; unless given, beside --output.",
        rich_help_panel=IMAGES,
    ),
]
