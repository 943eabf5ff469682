"""Every pipeline against diffusers: the same modules, prompts and seeds give the same latents and pixels.

BOUND is on latents, as a share of their standard deviation: what single-precision rounding grows to over a trajectory.
A pixel may round to the next level.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from fmedge_runtimes.diffusion import Diffusion
from image_models import (
    BETAS,
    SIDE,
    Opened,
    autoencoder,
    latents_of,
    pixels_of,
    quiet,
    stable_diffusion,
    stable_diffusion_xl,
    unet,
    write_folder,
)
from PIL import Image

# diffusers' own, of numpy and of what it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BOUND = 1e-4
PROMPTS = ["a red cat", "dog 42!", "a red cat", "what is this?"]
SEEDS = (7, 8, 2**33 + 5, 0)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return write_folder(stable_diffusion(), tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return write_folder(stable_diffusion_xl(), tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Colours that vary smoothly, at another size than is rendered."""
    y, x = np.mgrid[:80, :100] / 100
    return Image.fromarray((255 * np.stack([x, y, np.sin(9 * x * y) ** 2], axis=-1)).astype(np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    levels = np.zeros((80, 100), np.uint8)
    levels[20:60, 30:80] = 255
    return Image.fromarray(levels)


def check(
    opened: Opened,
    options: Diffusion,
    prompts: list[str] = PROMPTS[:1],
    pipeline: DiffusionPipeline | None = None,
    **theirs: Any,
) -> None:
    """Compare every image with diffusers' for its prompt and seed alone."""
    pipeline = pipeline or opened.pipeline
    own = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, **theirs}
    for made in opened.model().generate(prompts, options):
        if "Consistency" not in type(pipeline).__name__:
            own["negative_prompt"] = made.settings.negative
        expected = latents_of(pipeline, made.prompt, seed=made.seed, **own)
        assert made.latents.shape == expected.shape
        assert np.abs(made.latents - expected).max() <= BOUND * expected.std(), made.settings
        if pipeline.vae.config.get("latents_mean") is None:
            assert np.abs(np.asarray(made.image, int) - pixels_of(pipeline, expected)).max() <= 1


SIZE = {"height": SIDE, "width": SIDE}


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("count", [1, 4])
def test_stable_diffusion(sd: Opened, guidance: float, count: int) -> None:
    options = Diffusion(steps=3, guidance=guidance, seed=SEEDS[:count], negative=("bad", None, "", "red")[:count])
    check(sd, options, PROMPTS[:count], **SIZE)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("count", [1, 4])
def test_stable_diffusion_xl(xl: Opened, guidance: float, count: int) -> None:
    options = Diffusion(steps=3, guidance=guidance, seed=SEEDS[:count], negative=("bad", None, "", "red")[:count])
    check(xl, options, PROMPTS[:count], **SIZE)


@pytest.mark.parametrize("size", [(16, 64), (24, 40)])
def test_other_sizes(sd: Opened, xl: Opened, size: tuple[int, int]) -> None:
    height, width = size
    for opened in (sd, xl):
        check(opened, Diffusion(steps=2, guidance=4.0, seed=1, height=height, width=width), height=height, width=width)


SCHEDULERS = {
    "ddpm": lambda: diffusers.DDPMScheduler(**BETAS, clip_sample=False),
    "pndm": lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS),
    "euler-a": lambda: diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**BETAS),
    "dpm++2m-karras": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**BETAS),
    "lcm": lambda: diffusers.LCMScheduler(**BETAS),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_schedulers(name: str, guidance: float, tmp_path: Path) -> None:
    # Without guidance a graph that wrote into the latents would show, and with a memory of outputs, too.
    opened = write_folder(stable_diffusion(SCHEDULERS[name]()), tmp_path)
    check(opened, Diffusion(steps=5, guidance=guidance, seed=(3, 4)), PROMPTS[:2], **SIZE)


def test_v_prediction_rescaled(tmp_path: Path) -> None:
    """Stable Diffusion 2.x, with the fixes of Lin et al."""
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    pipeline = stable_diffusion(scheduler, attention_head_dim=(2, 4), use_linear_projection=True)
    opened = write_folder(pipeline, tmp_path)
    options = Diffusion(steps=4, guidance=6.0, seed=5, guidance_rescale=0.7)
    check(opened, options, **SIZE, guidance_rescale=0.7)


def lcm(tmp_path: Path, name: str) -> tuple[Opened, DiffusionPipeline]:
    """A latent consistency model: told its guidance, and with a schedule of its own."""
    pipeline = stable_diffusion(diffusers.LCMScheduler(**BETAS), time_cond_proj_dim=16)
    parts = {part: module for part, module in pipeline.components.items() if part != "image_encoder"}
    theirs = quiet(getattr(diffusers, name)(**parts, requires_safety_checker=False))
    return write_folder(theirs, tmp_path), theirs


def test_latent_consistency(tmp_path: Path) -> None:
    opened, theirs = lcm(tmp_path, "LatentConsistencyModelPipeline")
    check(opened, Diffusion(steps=4, guidance=8.0, seed=(1, 2)), PROMPTS[:2], theirs, **SIZE)


def test_latent_consistency_from_an_image(tmp_path: Path, picture: Image.Image) -> None:
    opened, theirs = lcm(tmp_path, "LatentConsistencyModelImg2ImgPipeline")
    options = Diffusion(steps=4, guidance=8.0, seed=3, image=picture, strength=0.5, **SIZE)
    check(opened, options, pipeline=theirs, image=picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), strength=0.5)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_from_an_image(sd: Opened, xl: Opened, picture: Image.Image, strength: float) -> None:
    small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    options = Diffusion(steps=5, guidance=4.0, seed=(3, 4), image=picture, strength=strength, **SIZE)
    for opened, name in ((sd, "StableDiffusionImg2ImgPipeline"), (xl, "StableDiffusionXLImg2ImgPipeline")):
        theirs = quiet(getattr(diffusers, name).from_pipe(opened.pipeline))
        check(opened, options, PROMPTS[:2], theirs, image=small, strength=strength)


@pytest.mark.medium
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "euler-a"])
def test_inpainting(tmp_path: Path, picture: Image.Image, mask: Image.Image, strength: float, scheduler: str) -> None:
    options = Diffusion(steps=4, guidance=4.0, seed=(3, 4), image=picture, mask=mask, strength=strength, **SIZE)
    made = SCHEDULERS[scheduler]() if scheduler in SCHEDULERS else None
    for number, (pipeline, name) in enumerate(
        (
            (stable_diffusion(made), "StableDiffusionInpaintPipeline"),
            (stable_diffusion(made, in_channels=9), "StableDiffusionInpaintPipeline"),
            (stable_diffusion_xl(made), "StableDiffusionXLInpaintPipeline"),
        )
    ):
        opened = write_folder(pipeline, tmp_path / str(number), name)
        theirs = quiet(getattr(diffusers, name).from_pipe(pipeline))
        given = {"image": picture, "mask_image": mask, "strength": strength, **SIZE}
        check(opened, options, PROMPTS[:2], theirs, **given)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(sd: Opened, xl: Opened, skip: int) -> None:
    options = Diffusion(steps=2, guidance=4.0, seed=3, clip_skip=skip, negative="bad")
    # diffusers 0.42 looks for the norm where transformers 4 had it.
    encoder = sd.pipeline.text_encoder
    object.__setattr__(encoder, "text_model", encoder)
    for opened in (sd, xl):
        check(opened, options, **SIZE, clip_skip=skip)


def test_refiner(tmp_path: Path, picture: Image.Image) -> None:
    """The second text encoder alone, and aesthetic scores."""
    whole = stable_diffusion_xl()
    denoiser = unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 24,
        cross_attention_dim=48,
    )
    parts = {**whole.components, "unet": denoiser, "text_encoder": None, "tokenizer": None}
    theirs = quiet(
        diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    )
    theirs.register_to_config(force_zeros_for_empty_prompt=False)
    options = Diffusion(steps=5, guidance=4.0, seed=3, image=picture, strength=0.5, **SIZE)
    small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    check(write_folder(theirs, tmp_path), options, pipeline=theirs, image=small, strength=0.5)


def test_latents_with_a_mean(tmp_path: Path, picture: Image.Image) -> None:
    pipeline = stable_diffusion_xl()
    pipeline.vae = autoencoder(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.1, 0.9, 1.3, 0.7])
    opened = write_folder(pipeline, tmp_path)
    theirs = quiet(diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipeline))
    options = Diffusion(steps=4, guidance=4.0, seed=3, image=picture, strength=0.5, **SIZE)
    small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    check(opened, options, pipeline=theirs, image=small, strength=0.5)
