"""Pipelines of several denoisers against diffusers': the same modules, prompts and seeds, the same images."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.pipelines import deepfloyd as deepfloyd_module
from fmedge_runtimes.pipelines import kandinsky as kandinsky_module
from fmedge_runtimes.pipelines import latent_upscaler as upscaler_module
from fmedge_runtimes.pipelines import unclip as unclip_module
from fmedge_runtimes.pipelines.enlarge import bicubic, bilinear
from image_models import Opened, generator, quiet
from part_sessions import BOUND, open_pipeline, unet_session
from PIL import Image
from tiny_diffusers import tiny_pipeline
from torch_session import decoder_session, text_session

# diffusers' own, of numpy and of what it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PROMPTS = ["a small red circle in the left", "a cat, in the rain!", "a small red circle in the left", "oil"]
SEEDS = (7, 8, 2**33 + 5, 0)
NEGATIVES = ("blurry", None, "", "low quality")
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def kandinsky(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_pipeline(tiny_pipeline("kandinsky"), tmp_path_factory.mktemp("kandinsky"))


def check_kandinsky(opened: Opened, options: Diffusion, prompts: list[str], theirs: Any = None) -> None:
    """One prompt after the other, since diffusers lets a batch's negative prompts draw from one generator."""
    theirs = quiet(theirs or opened.pipeline)
    for made in opened.model().generate(prompts, options):
        given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, **SIZE}
        given |= {"height": made.settings.height, "width": made.settings.width}
        for kind in ("latent", "pil"):
            found = theirs(
                made.prompt,
                negative_prompt=made.settings.negative,
                generator=generator(made.seed),
                output_type=kind,
                **given,
            ).images[0]
            if kind == "latent":
                assert np.abs(made.latents - found.numpy()).max() <= BOUND * found.numpy().std()
            else:
                assert np.abs(np.asarray(made.image, int) - np.asarray(found)).max() <= 1


@pytest.mark.medium
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("count", [1, 4])
def test_kandinsky(kandinsky: Opened, guidance: float, count: int) -> None:
    options = Diffusion(steps=3, guidance=guidance, seed=SEEDS[:count], negative=NEGATIVES[:count], **SIZE)
    check_kandinsky(kandinsky, options, PROMPTS[:count])


def test_kandinsky_another_size_and_scheduler(kandinsky: Opened) -> None:
    # As saved: diffusers forgets the defaults of a scheduler that it has in memory.
    saved = diffusers.DDPMScheduler.from_pretrained(kandinsky.folder / "scheduler")
    scheduler = diffusers.DDIMScheduler.from_config(saved.config)
    theirs = diffusers.KandinskyV22CombinedPipeline(**{**kandinsky.pipeline.components, "scheduler": scheduler})
    options = Diffusion(steps=3, guidance=4.0, seed=1, height=24, width=36, scheduler="ddim")
    check_kandinsky(kandinsky, options, PROMPTS[:1], theirs)


def test_kandinsky_with_its_variance(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("kandinsky")
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, variance_type="learned_range")
    pipeline = quiet(diffusers.KandinskyV22CombinedPipeline(**{**pipeline.components, "scheduler": scheduler}))
    check_kandinsky(open_pipeline(pipeline, tmp_path), Diffusion(steps=3, guidance=4.0, seed=1, **SIZE), PROMPTS[:1])


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("a cat " * 50, {}, "tokens, and this model reads 75"),
        ("a cat", {"height": 34}, "multiples of 4"),
        ("a cat", {"clip_skip": 1}, "clip_skip"),
    ],
)
def test_kandinsky_refuses(kandinsky: Opened, prompt: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        kandinsky.model().generate(prompt, Diffusion(**{"steps": 2, "seed": 1, **SIZE, **options}))


@pytest.fixture(scope="module")
def deepfloyd(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_pipeline(tiny_pipeline("if"), tmp_path_factory.mktemp("if"))


def check_pixels(made: Any, expected: np.ndarray) -> None:
    """Against diffusers' image [C, H, W] in -1 to 1, or beyond."""
    assert made.latents.shape == expected.shape
    assert np.abs(made.latents - expected).max() <= BOUND * expected.std(), made.settings
    levels = np.rint(np.clip(np.moveaxis(expected, 0, -1) / 2 + 0.5, 0, 1) * 255)
    assert np.abs(np.asarray(made.image, int) - levels).max() <= 1


def check_deepfloyd(opened: Opened, options: Diffusion, prompts: list[str], theirs: Any = None) -> None:
    theirs = quiet(theirs or opened.pipeline)
    for made in opened.model().generate(prompts, options):
        found = theirs(
            made.prompt,
            negative_prompt=made.settings.negative or "",
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[generator(made.seed)],
            output_type="pt",
            clean_caption=False,
            height=made.settings.height,
            width=made.settings.width,
        ).images[0]
        check_pixels(made, found.numpy())


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("count", [1, 4])
def test_deepfloyd(deepfloyd: Opened, guidance: float, count: int) -> None:
    options = Diffusion(steps=3, guidance=guidance, seed=SEEDS[:count], negative=NEGATIVES[:count], **SIZE)
    check_deepfloyd(deepfloyd, options, PROMPTS[:count])


def test_deepfloyd_another_size_and_scheduler(deepfloyd: Opened) -> None:
    """A scheduler that wants no variance is given none."""
    check_deepfloyd(deepfloyd, Diffusion(steps=3, guidance=4.0, seed=1, height=24, width=36), PROMPTS[:1])
    saved = diffusers.DDPMScheduler.from_pretrained(deepfloyd.folder / "scheduler")
    parts = {**deepfloyd.pipeline.components, "scheduler": diffusers.DDIMScheduler.from_config(saved.config)}
    parts["scheduler"].register_to_config(variance_type="fixed_small")  # which its pipeline asks for
    theirs = diffusers.IFPipeline(**parts, requires_safety_checker=False)
    options = Diffusion(steps=3, guidance=4.0, seed=1, scheduler="ddim", **SIZE)
    check_deepfloyd(deepfloyd, options, PROMPTS[:1], theirs)


@pytest.mark.medium
def test_deepfloyd_in_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepfloyd_module, "SECOND_STEPS", 4)
    first, second = quiet(tiny_pipeline("if")), quiet(tiny_pipeline("if_super_resolution"))
    opened = open_pipeline(first, tmp_path)
    second.unet.register_to_config(sample_size=2 * first.unet.config.sample_size)
    second.unet.save_config(tmp_path / "unet_2")
    second.scheduler.save_pretrained(tmp_path / "scheduler_2")
    second.image_noising_scheduler.save_pretrained(tmp_path / "image_noising_scheduler")
    opened.makers["unet_2"] = lambda: unet_session(second.unet, "IFSuperResolutionPipeline")
    options = Diffusion(steps=3, guidance=7.0, seed=SEEDS[:2], negative=NEGATIVES[:2], height=64, width=48)
    for made in opened.model().generate(PROMPTS[:2], options):
        chance = generator(made.seed)
        with torch.no_grad():
            embeds, negative = first.encode_prompt(made.prompt, negative_prompt=made.settings.negative or "")
        given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "generator": chance, "output_type": "pt"}
        small = first(**given, num_inference_steps=3, height=32, width=24).images
        found = second(**given, image=small, num_inference_steps=4, height=64, width=48).images[0]
        check_pixels(made, found.numpy())


def add_third_stage(opened: Opened, third: Any) -> None:
    """The upscaler's folders in that of IF."""
    folder = opened.folder
    for name in ("scheduler", "tokenizer"):
        getattr(third, name).save_pretrained(folder / f"{name}_3")
    third.low_res_scheduler.save_pretrained(folder / "low_res_scheduler")
    third.unet.save_config(folder / "unet_3")
    third.text_encoder.config.save_pretrained(folder / "text_encoder_3")
    third.vae.save_config(folder / "vae_decoder")
    opened.makers["unet_3"] = lambda: unet_session(third.unet, "StableDiffusionUpscalePipeline")
    opened.makers["text_encoder_3"] = lambda: text_session(third.text_encoder)
    opened.makers["vae_decoder"] = lambda: decoder_session(third.vae)


@pytest.mark.medium
def test_deepfloyd_in_three_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepfloyd_module, "SECOND_STEPS", 2)
    monkeypatch.setattr(deepfloyd_module, "THIRD_STEPS", 3)
    first, second = quiet(tiny_pipeline("if")), quiet(tiny_pipeline("if_super_resolution"))
    third = quiet(tiny_pipeline("upscaler"))
    opened = open_pipeline(first, tmp_path)
    second.unet.register_to_config(sample_size=2 * first.unet.config.sample_size)
    second.unet.save_config(tmp_path / "unet_2")
    second.scheduler.save_pretrained(tmp_path / "scheduler_2")
    second.image_noising_scheduler.save_pretrained(tmp_path / "image_noising_scheduler")
    opened.makers["unet_2"] = lambda: unet_session(second.unet, "IFSuperResolutionPipeline")
    add_third_stage(opened, third)
    for level in (None, 30):
        options = Diffusion(steps=2, seed=SEEDS[:2], height=64, width=48, guidance=7.0, noise_level=level)
        for made in opened.model().generate(PROMPTS[:2], options):
            chance = generator(made.seed)
            with torch.no_grad():
                embeds, negative = first.encode_prompt(made.prompt, negative_prompt="")
            given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "generator": chance}
            small = first(**given, num_inference_steps=2, height=16, width=12, output_type="pt").images
            middle = second(**given, image=small, num_inference_steps=2, height=32, width=24, output_type="pt").images
            found = third(
                [made.prompt],
                middle,
                num_inference_steps=3,
                noise_level=level or deepfloyd_module.THIRD_NOISE_LEVEL,
                generator=chance,
            ).images[0]
            assert found.size == made.image.size == (48, 64)
            assert np.abs(np.asarray(made.image, int) - np.asarray(found)).max() <= 1
    with pytest.raises(RequestError, match=r"noise_level is 400; .* knows 0 to 350"):
        opened.model().generate("a cat", Diffusion(noise_level=400, steps=2))


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_pipeline(tiny_pipeline("upscaler"), tmp_path_factory.mktemp("upscaler"))


def small_image(width: int = 14, height: int = 20) -> Image.Image:
    y, x = np.mgrid[:height, :width] / max(height, width)
    return Image.fromarray((255 * np.stack([x, y, x * y], axis=-1)).astype(np.uint8))


def check_upscaler(opened: Opened, options: Diffusion, prompts: list[str], **given: Any) -> None:
    """One after the other, since diffusers draws the noise of a batch's images from the first generator."""
    theirs = quiet(opened.pipeline)
    for made in opened.model().generate(prompts, options):
        for kind in ("latent", "pil"):
            found = theirs(
                made.prompt,
                image=options.image,
                negative_prompt=made.settings.negative,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                generator=generator(made.seed),
                output_type=kind,
                **given,
            ).images[0]
            if kind == "latent":
                assert np.abs(made.latents - found.numpy()).max() <= BOUND * found.numpy().std()
            else:
                assert found.size == made.image.size
                assert np.abs(np.asarray(made.image, int) - np.asarray(found)).max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 9.0])
@pytest.mark.parametrize("count", [1, 4])
def test_upscaler(upscaler: Opened, guidance: float, count: int) -> None:
    options = Diffusion(steps=3, guidance=guidance, seed=SEEDS[:count], negative=NEGATIVES[:count], image=small_image())
    check_upscaler(upscaler, options, PROMPTS[:count])


def test_upscaler_with_other_noise(upscaler: Opened) -> None:
    options = Diffusion(steps=2, guidance=3.0, seed=5, image=small_image(), noise_level=350)
    check_upscaler(upscaler, options, PROMPTS[:1], noise_level=350)
    # diffusers cuts odd sides off, too.
    odd = upscaler.model().generate("a cat", Diffusion(steps=1, seed=1, image=small_image(13, 21)))[0]
    assert odd.image.size == (24, 40)
    assert odd.settings.noise_level is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, r"give the small one as Diffusion\.image"),
        ({"image": small_image(), "noise_level": 351}, "noise_level is 351; .* knows 0 to 350"),
        ({"image": small_image(), "noise_level": -1}, "noise_level is -1"),
        ({"image": small_image(), "strength": 0.5}, "strength"),
        ({"image": small_image(), "height": 42, "width": 28}, "multiples of 4"),
        ({"image": small_image(), "scheduler": "magic"}, "known are"),
    ],
)
def test_upscaler_refuses(upscaler: Opened, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        upscaler.model().generate("a cat", Diffusion(steps=2, seed=1, **options))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_deepfloyd_enlarges_a_given_image(tmp_path: Path, guidance: float) -> None:
    theirs = quiet(tiny_pipeline("if_super_resolution"))
    opened = open_pipeline(theirs, tmp_path)
    small = small_image(8, 12)
    options = Diffusion(
        steps=3,
        guidance=guidance,
        seed=(1, 2),
        negative="blurry",
        image=small,
        noise_level=None if guidance > 1 else 99,
    )
    for made in opened.model().generate(PROMPTS[:2], options):
        found = theirs(
            made.prompt,
            negative_prompt="blurry",
            image=small,
            height=48,
            width=32,
            num_inference_steps=3,
            guidance_scale=guidance,
            noise_level=250 if guidance > 1 else 99,
            generator=generator(made.seed),
            output_type="pt",
        ).images[0]
        check_pixels(made, found.numpy())
    with pytest.raises(RequestError, match="noise_level is 1000"):
        opened.model().generate("a cat", Diffusion(steps=3, image=small, noise_level=1000))
    with pytest.raises(RequestError, match=r"Diffusion\.image"):
        opened.model().generate("a cat", Diffusion(steps=3))


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("a cat " * 50, {}, "and 77 are read by text_encoder; shorten it"),
        ("a cat", {"height": 33}, "multiples of 2"),
        ("a cat", {"max_sequence_length": 100}, "max_sequence_length"),
    ],
)
def test_deepfloyd_refuses(deepfloyd: Opened, prompt: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        deepfloyd.model().generate(prompt, Diffusion(**{"steps": 2, "seed": 1, **SIZE, **options}))


@pytest.fixture(scope="module")
def unclip(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_pipeline(tiny_pipeline("unclip"), tmp_path_factory.mktemp("unclip"), side=32)


@pytest.mark.medium
@pytest.mark.parametrize("guidance", [1.0, 8.0])
@pytest.mark.parametrize("count", [1, 4])
def test_unclip(unclip: Opened, guidance: float, count: int) -> None:
    options = Diffusion(steps=3, guidance=guidance, seed=SEEDS[:count])
    for made in unclip.model().generate(PROMPTS[:count], options):
        found = unclip.pipeline(
            made.prompt,
            decoder_num_inference_steps=3,
            decoder_guidance_scale=guidance,
            generator=[generator(made.seed)],
            output_type="np",
        ).images[0]
        ours = np.clip(np.moveaxis(made.latents, 0, -1) / 2 + 0.5, 0, 1)
        # Random weights predict huge variances here and there: diffusers' own batches differ as much.
        assert np.quantile(np.abs(ours - found), 0.98) <= BOUND
        assert np.abs(ours - found).max() <= 0.01
        assert np.abs(np.asarray(made.image, int) - np.rint(found * 255)).max() <= 3


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("a cat " * 50, {}, "tokens, and this model reads 75"),
        ("a cat", {"height": 64}, "makes 32x32 only"),
        ("a cat", {"negative": "blurry"}, "negative"),
        ("a cat", {"scheduler": "ddim"}, "leave the scheduler as it is"),
    ],
)
def test_unclip_refuses(unclip: Opened, prompt: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        unclip.model().generate(prompt, Diffusion(**{"steps": 2, "seed": 1, **options}))


@pytest.mark.parametrize(
    ("pipeline", "defaults"),
    [
        (
            diffusers.KandinskyV22CombinedPipeline,
            {
                "prior_num_inference_steps": kandinsky_module.PRIOR_STEPS,
                "prior_guidance_scale": kandinsky_module.PRIOR_GUIDANCE,
            },
        ),
        (
            diffusers.IFSuperResolutionPipeline,
            {
                "num_inference_steps": deepfloyd_module.SECOND_STEPS,
                "guidance_scale": deepfloyd_module.SECOND_GUIDANCE,
                "noise_level": deepfloyd_module.NOISE_LEVEL,
            },
        ),
        (
            diffusers.StableDiffusionUpscalePipeline,
            {
                "num_inference_steps": deepfloyd_module.THIRD_STEPS,
                "guidance_scale": deepfloyd_module.THIRD_GUIDANCE,
                "noise_level": upscaler_module.NOISE_LEVEL,
            },
        ),
        (
            diffusers.UnCLIPPipeline,
            {
                "prior_num_inference_steps": unclip_module.PRIOR_STEPS,
                "prior_guidance_scale": unclip_module.PRIOR_GUIDANCE,
                "super_res_num_inference_steps": unclip_module.LARGER_STEPS,
            },
        ),
    ],
)
def test_what_no_option_changes_is_diffusers_default(pipeline: type[Any], defaults: dict[str, float]) -> None:
    parameters = inspect.signature(pipeline.__call__).parameters
    assert {name: parameters[name].default for name in defaults} == defaults


@pytest.mark.parametrize("size", [(64, 96), (32, 24), (17, 50), (8, 11), (1, 1)])
def test_larger_images_are_torchs(size: tuple[int, int]) -> None:
    small = torch.randn(2, 3, 16, 24, generator=generator(0))
    linear = torch.nn.functional.interpolate(small, size, mode="bilinear", align_corners=True)
    assert np.abs(bilinear(small.numpy(), *size) - linear.numpy()).max() < 1e-5
    cubic = torch.nn.functional.interpolate(small, size, mode="bicubic", align_corners=False, antialias=True)
    assert np.abs(bicubic(small.numpy(), *size) - cubic.numpy()).max() < 1e-5


@pytest.mark.medium
@pytest.mark.parametrize("name", ["kandinsky", "deepfloyd", "unclip"])
def test_parts_in_turn_and_images_alone_are_the_same(name: str, request: pytest.FixtureRequest) -> None:
    """One part is loaded at a time, each once; and each image is denoised alone."""
    opened: Opened = request.getfixturevalue(name)
    options = Diffusion(steps=2, guidance=3.0, seed=(5, 6))
    together = opened.model().generate(PROMPTS[:2], options)
    opened.opened.clear()
    alone = opened.model("sequential", max_batch=1).generate(PROMPTS[:2], options)
    assert sorted(opened.opened) == sorted(set(opened.opened))
    assert all(session.closed for session in opened.sessions.values())
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one.image, int) - np.asarray(other.image)).max() <= 3
        assert np.median(np.abs(one.latents - other.latents)) <= BOUND
