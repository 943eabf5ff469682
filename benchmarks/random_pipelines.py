"""Folders of text-to-image pipelines with random weights and the shapes of published ones, as diffusers saves them.

Speed and memory depend on shapes, not on what the weights say, so nothing needs to be downloaded.

    folder = write_pipeline(SHAPES["sd15-small"], Path("out/images/sd15-small"))
    python benchmarks/random_pipelines.py sd15-small out/images/sd15-small
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_workload import DECODE, IMAGES, STEP

SEED = 0
ROWS = 77
"""Tokens of a prompt for CLIP."""
PIXELS = "shapes"
"""The pipeline of `fmedge train image`."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One pipeline: who makes its parts, and what a step of it is fed."""

    write: Callable[[Shape, Path], None]
    published: str
    """The model whose shape this is."""
    side: int
    """Pixels along a side of an image."""
    width: int = 320
    """Channels of the first block of the UNet; the autoencoder has 0.4 times as many."""
    context: int = 768
    """Width of a text encoder's states."""
    units: tuple[str, ...] = (STEP, DECODE, IMAGES)
    """The work that is measured."""
    most_images: int = 1
    """Of a batch: more would take hours on the CPU."""


def write_pipeline(shape: Shape, folder: Path) -> Path:
    """Write the folder unless it is there already."""
    if (folder / "model_index.json").is_file():
        return folder
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    aside = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    torch.manual_seed(SEED)
    shape.write(shape, aside)
    aside.rename(folder)
    return folder


def _write_stable_diffusion(shape: Shape, folder: Path) -> None:
    """The parts of Stable Diffusion 1.5. Its text encoder is small: it runs once an image, and is not measured."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    width = shape.width
    UNet2DConditionModel(
        sample_size=shape.side // 8,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=shape.context,
        attention_head_dim=8,
    ).save_pretrained(folder / "unet")
    first = max(width * 2 // 5, 32)  # there are 32 groups to a norm
    AutoencoderKL(
        block_out_channels=(first, 2 * first, 4 * first, 4 * first),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=shape.side,
    ).save_pretrained(folder / "vae")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.save_pretrained(folder / "scheduler")
    _write_text_encoder(folder, shape.context, ROWS)
    _write_index(
        folder,
        "StableDiffusionPipeline",
        unet=("diffusers", "UNet2DConditionModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "DDIMScheduler"),
        safety_checker=(None, None),
        feature_extractor=(None, None),
    )


def _write_text_encoder(folder: Path, width: int, positions: int) -> None:
    """A CLIP text model of one layer and a tokenizer of bytes."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    tokenizer = CLIPTokenizerFast(vocab=vocabulary, merges=[], model_max_length=positions)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def _write_index(folder: Path, pipeline: str, **parts: Any) -> None:  # noqa: ANN401 - (library, class) of each part
    index = {
        "_class_name": pipeline,
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        **parts,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_pixel_pipeline(shape: Shape, folder: Path) -> None:
    """What `fmedge train image` makes by default, before it is trained."""
    import torch
    from transformers import CLIPTokenizer

    from fmedge.shapes import COMBINATIONS
    from fmedge.training.caption_tokenizer import train_caption_tokenizer
    from fmedge.training.denoiser import Denoiser, pipeline_from_denoiser, write_pipeline
    from fmedge.training.image_presets import image_preset_named
    from fmedge.training.objectives import OBJECTIVES

    made = train_caption_tokenizer([combination.caption for combination in COMBINATIONS])
    preset = image_preset_named("tiny")
    denoiser = Denoiser(preset, vocabulary=made.vocabulary, start=made.start, end=made.end, length=made.length)
    for parameter in denoiser.transformer.final_layer.parameters():  # zero before training, and so would images be
        torch.nn.init.normal_(parameter, std=0.05)
    (folder / "tokenizer").mkdir(parents=True)
    for name, content in made.files.items():
        (folder / "tokenizer" / name).write_bytes(content)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    write_pipeline(pipeline_from_denoiser(denoiser.eval(), OBJECTIVES["flow-x"], tokenizer, shape.side), folder)


SHAPES = {
    "sd15": Shape(_write_stable_diffusion, "Stable Diffusion 1.5", side=512),
    "sd15-small": Shape(
        _write_stable_diffusion, "Stable Diffusion 1.5 with half the channels", side=512, width=160, context=384
    ),
    "sd15-tiny": Shape(
        _write_stable_diffusion,
        "Stable Diffusion 1.5 with a tenth of the channels",
        side=64,
        width=32,
        context=64,
        most_images=8,
    ),
    PIXELS: Shape(_write_pixel_pipeline, "what fmedge train image makes", side=32, units=(IMAGES,), most_images=1000),
}

if __name__ == "__main__":
    write_pipeline(SHAPES[sys.argv[1]], Path(sys.argv[2]))
