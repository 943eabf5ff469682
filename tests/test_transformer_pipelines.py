"""Pipelines of transformers in latents against diffusers': the same modules, prompts and seeds, the same images."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import BundleError, RequestError
from image_models import Opened, autoencoder, lively, quiet
from part_sessions import check, open_pipeline
from PIL import Image
from tiny_diffusers import tiny_pipeline

# diffusers' own, of numpy and of what it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPTS = ["a small red circle in the left", "a cat, in the rain!", "a small red circle in the left", "oil"]
SEEDS = (7, 8, 2**33 + 5, 0)
NEGATIVES = ("blurry", None, "", "low quality")
SIZE = {"height": 32, "width": 32}
SHORT = 24
"""Tokens of T5 in tests."""


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_pipeline(tiny_pipeline("sd3"), tmp_path_factory.mktemp("sd3"))


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


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("count", [1, 4])
def test_stable_diffusion_3(sd3: Opened, guidance: float, count: int) -> None:
    options = Diffusion(
        steps=3,
        guidance=guidance,
        seed=SEEDS[:count],
        negative=NEGATIVES[:count],
        max_sequence_length=SHORT,
        **SIZE,
    )
    check(sd3, options, PROMPTS[:count], max_sequence_length=SHORT)


def test_stable_diffusion_3_by_default(sd3: Opened) -> None:
    """T5 reads 256 tokens, and another size."""
    check(sd3, Diffusion(steps=2, guidance=4.0, seed=1, height=48, width=20), PROMPTS[:1])
    check(
        sd3, Diffusion(steps=2, guidance=4.0, seed=1, clip_skip=1, negative="blurry", **SIZE), PROMPTS[:1], clip_skip=1
    )


@pytest.mark.medium
def test_stable_diffusion_3_without_t5(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    options = Diffusion(steps=3, guidance=4.0, seed=(1, 2), **SIZE)
    check(open_pipeline(pipeline, tmp_path), options, PROMPTS[:2])


def test_stable_diffusion_3_that_lost_t5(tmp_path: Path) -> None:
    opened = open_pipeline(tiny_pipeline("sd3"), tmp_path)
    del opened.makers["text_encoder_3"]
    with pytest.raises(BundleError, match="text_encoder_3"):
        opened.model()


@pytest.mark.medium
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_stable_diffusion_3_with_another_scheduler(sd3: Opened, name: str) -> None:
    kind = {"dpm++2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}[name]
    parts = dict(sd3.pipeline.components)
    parts["scheduler"] = getattr(diffusers, kind)(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sd3.pipeline.scheduler.config.shift
    )
    theirs = quiet(diffusers.StableDiffusion3Pipeline(**parts))
    options = Diffusion(steps=4, guidance=4.0, seed=3, scheduler=name, **SIZE)
    check(sd3, options, PROMPTS[:1], theirs)


@pytest.mark.medium
def test_stable_diffusion_3_with_a_shift_by_size(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd3")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256
    )
    opened = open_pipeline(pipeline, tmp_path)
    for side in (32, 48):
        check(opened, Diffusion(steps=3, guidance=4.0, seed=3, height=side, width=32), PROMPTS[:1])


@pytest.mark.medium
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_stable_diffusion_3_from_an_image(sd3: Opened, picture: Image.Image, strength: float) -> None:
    theirs = quiet(diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(sd3.pipeline))
    options = Diffusion(steps=5, guidance=4.0, seed=(3, 4), image=picture, strength=strength, **SIZE)
    check(sd3, options, PROMPTS[:2], theirs, image=picture, strength=strength)


@pytest.mark.medium
def test_stable_diffusion_3_repaints(tmp_path: Path, picture: Image.Image, mask: Image.Image) -> None:
    pipeline = _wide_sd3()
    opened = open_pipeline(pipeline, tmp_path)
    theirs = quiet(diffusers.StableDiffusion3InpaintPipeline.from_pipe(pipeline))
    for strength in (0.6, 1.0):
        options = Diffusion(steps=4, guidance=4.0, seed=(3, 4), image=picture, mask=mask, strength=strength, **SIZE)
        given = {"image": picture, "mask_image": mask, "strength": strength}
        # diffusers 0.42 decodes without the autoencoder's shift here.
        check(opened, options, PROMPTS[:2], theirs, pixels=False, **given)


def _wide_sd3() -> DiffusionPipeline:
    """With 16 channels, of which diffusers' inpainting makes sure."""
    pipeline = tiny_pipeline("sd3")
    torch.manual_seed(0)
    config = {**pipeline.transformer.config, "in_channels": 16, "out_channels": 16}
    pipeline.register_modules(
        transformer=lively(diffusers.SD3Transformer2DModel.from_config(config)),
        vae=autoencoder(latent_channels=16, shift_factor=0.0609, scaling_factor=1.5305),
    )
    return pipeline


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("a cat " * 100, {}, "tokens, and 256 are read by text_encoder_3; set max_sequence_length to"),
        ("a cat " * 300, {}, "shorten it"),
        ("a cat", {"max_sequence_length": 513}, "reads 512 tokens at most"),
        ("a cat", {"height": 34}, "multiples of 4"),
        ("a cat", {"height": 100}, "sides end at 96"),
        ("a cat", {"clip_skip": 2}, "layers"),
    ],
)
def test_stable_diffusion_3_refuses(sd3: Opened, prompt: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        sd3.model().generate(prompt, Diffusion(**{"steps": 2, "seed": 1, **SIZE, **options}))


def test_a_prompt_longer_than_clip_reads_is_read_in_windows(sd3: Opened) -> None:
    """Its end counts, where diffusers would cut it off."""
    long = "a small red circle in the left " * 14
    options = Diffusion(steps=2, guidance=1.0, seed=1, max_sequence_length=512, **SIZE)
    one, other, again = sd3.model().generate([long + "cat", long + "rain", long + "cat"], options)
    assert np.abs(one.latents - other.latents).max() > 1e-4
    assert np.array_equal(one.latents, again.latents)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_pipeline(tiny_pipeline("flux"), tmp_path_factory.mktemp("flux"))


def _unpacked(height: int = 32, width: int = 32) -> Any:
    """diffusers' packages as latents [C, h, w]; a latent is two pixels wide here."""
    return lambda latents: diffusers.FluxPipeline._unpack_latents(torch.tensor(latents)[None], height, width, 2)[
        0
    ].numpy()


FLUX = {"max_sequence_length": SHORT, "negative": False}


@pytest.mark.parametrize("guidance", [0.0, 3.5])
@pytest.mark.parametrize("count", [1, 4])
def test_flux(flux: Opened, guidance: float, count: int) -> None:
    options = Diffusion(steps=3, guidance=guidance, seed=SEEDS[:count], max_sequence_length=SHORT, **SIZE)
    check(flux, options, PROMPTS[:count], unpack=_unpacked(), **FLUX)


@pytest.mark.medium
def test_flux_by_default(flux: Opened) -> None:
    """T5 reads 512 tokens; and another size, which shifts the schedule."""
    options = Diffusion(steps=3, guidance=3.5, seed=1, height=48, width=20)
    check(flux, options, PROMPTS[:1], unpack=_unpacked(48, 20), negative=False)


def test_flux_schnell(tmp_path: Path) -> None:
    opened = open_pipeline(tiny_pipeline("flux_schnell"), tmp_path)
    options = Diffusion(steps=3, seed=(1, 2), max_sequence_length=SHORT, **SIZE)
    check(opened, options, PROMPTS[:2], unpack=_unpacked(), **FLUX)
    with pytest.raises(RequestError, match=r"Diffusion\.guidance"):
        opened.model().generate("a cat", Diffusion(steps=3, guidance=3.5, **SIZE))


@pytest.mark.medium
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_flux_with_another_scheduler(tmp_path: Path, name: str) -> None:
    kind = {"dpm++2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}[name]
    pipeline = tiny_pipeline("flux")
    opened = open_pipeline(pipeline, tmp_path)
    parts = dict(pipeline.components)
    parts["scheduler"] = getattr(diffusers, kind).from_config(
        pipeline.scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    theirs = quiet(diffusers.FluxPipeline(**parts))
    options = Diffusion(steps=4, guidance=3.5, seed=3, scheduler=name, max_sequence_length=SHORT, **SIZE)
    check(opened, options, PROMPTS[:1], theirs, unpack=_unpacked(), **FLUX)


@pytest.mark.medium
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_flux_from_an_image(flux: Opened, picture: Image.Image, mask: Image.Image, strength: float) -> None:
    given = {"image": picture, "strength": strength}
    options = Diffusion(steps=5, guidance=3.5, seed=(3, 4), max_sequence_length=SHORT, **given, **SIZE)
    theirs = quiet(diffusers.FluxImg2ImgPipeline.from_pipe(flux.pipeline))
    check(flux, options, PROMPTS[:2], theirs, unpack=_unpacked(), **given, **FLUX)
    theirs = quiet(diffusers.FluxInpaintPipeline.from_pipe(flux.pipeline))
    options = replace(options, mask=mask)
    check(flux, options, PROMPTS[:2], theirs, unpack=_unpacked(), mask_image=mask, **given, **FLUX)


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("a cat " * 300, {}, "and 512 are read by text_encoder_2; shorten it"),
        ("a cat", {"max_sequence_length": 513}, "reads 512 tokens at most"),
        ("a cat", {"height": 34}, "multiples of 4"),
        ("a cat", {"negative": "blurry"}, "negative"),
    ],
)
def test_flux_refuses(flux: Opened, prompt: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        flux.model().generate(prompt, Diffusion(**{"steps": 2, "seed": 1, **SIZE, **options}))


@pytest.fixture(scope="module", params=["pixart_alpha", "pixart_sigma"])
def pixart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_pipeline(tiny_pipeline(request.param), tmp_path_factory.mktemp(request.param))


PLAIN = {"use_resolution_binning": False, "clean_caption": False}


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("count", [1, 4])
def test_pixart(pixart: Opened, guidance: float, count: int) -> None:
    options = Diffusion(steps=3, guidance=guidance, seed=SEEDS[:count], negative=NEGATIVES[:count], **SIZE)
    check(pixart, options, [*PROMPTS[:3], " OIL painting "][:count], **PLAIN)


@pytest.mark.medium
def test_pixart_another_size_and_length(pixart: Opened) -> None:
    options = Diffusion(steps=2, guidance=4.5, seed=1, height=48, width=24, max_sequence_length=200)
    check(pixart, options, PROMPTS[:1], max_sequence_length=200, **PLAIN)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["ddim", "euler-a"])
def test_pixart_with_another_scheduler(pixart: Opened, name: str) -> None:
    kind = {"ddim": "DDIMScheduler", "euler-a": "EulerAncestralDiscreteScheduler"}[name]
    parts = dict(pixart.pipeline.components)
    # As saved: diffusers forgets the defaults of a scheduler that it has in memory.
    saved = diffusers.DPMSolverMultistepScheduler.from_pretrained(pixart.folder / "scheduler")
    parts["scheduler"] = getattr(diffusers, kind).from_config(saved.config)
    theirs = quiet(type(pixart.pipeline)(**parts))
    options = Diffusion(steps=4, guidance=4.5, seed=3, scheduler=name, **SIZE)
    # At the first step the clean sample is noise times 160, before it is clipped: diffusers' batches differ by 1e-4.
    check(pixart, options, PROMPTS[:1], theirs, bound=1e-3, **PLAIN)


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("a cat " * 100, {}, "and 120 are read by text_encoder; set max_sequence_length to|and 300 are read"),
        ("a cat", {"height": 34}, "multiples of 4"),
        ("a cat", {"image": Image.new("RGB", (32, 32))}, "image"),
        ("a cat", {"clip_skip": 1}, "clip_skip"),
    ],
)
def test_pixart_refuses(pixart: Opened, prompt: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        pixart.model().generate(prompt, Diffusion(**{"steps": 2, "seed": 1, **SIZE, **options}))


def _open_sana(folder: Path, instruction: list[str] | None) -> Opened:
    opened = open_pipeline(tiny_pipeline("sana"), folder)
    (folder / "tokenizer" / "instruction.txt").write_text("\n".join(instruction or []))
    return opened


INSTRUCTION: list[str] = (
    inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
)


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return _open_sana(tmp_path_factory.mktemp("sana"), ["a photo of a cat:", "a red circle: "])


SANA = {"use_resolution_binning": False, "complex_human_instruction": ["a photo of a cat:", "a red circle: "]}


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("count", [1, 4])
def test_sana(sana: Opened, guidance: float, count: int) -> None:
    options = Diffusion(
        steps=3,
        guidance=guidance,
        seed=SEEDS[:count],
        negative=NEGATIVES[:count],
        max_sequence_length=SHORT + 20,
        **SIZE,
    )
    prompts = [*PROMPTS[:3], " OIL painting "][:count]
    check(sana, options, prompts, max_sequence_length=SHORT + 20, **SANA)


@pytest.mark.medium
@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_sana_by_default(tmp_path: Path, instruction: list[str] | None) -> None:
    options = Diffusion(steps=2, guidance=4.5, seed=1, height=64, width=32)
    opened = _open_sana(tmp_path, instruction)
    check(opened, options, PROMPTS[:1], use_resolution_binning=False, complex_human_instruction=instruction)


@pytest.mark.medium
def test_sana_with_another_scheduler(sana: Opened) -> None:
    parts = dict(sana.pipeline.components)
    parts["scheduler"] = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sana.pipeline.scheduler.config.shift
    )
    theirs = quiet(diffusers.SanaPipeline(**parts))
    check(sana, Diffusion(steps=4, guidance=4.5, seed=3, scheduler="dpm++2m", **SIZE), PROMPTS[:1], theirs, **SANA)


def test_sana_without_its_instruction(tmp_path: Path) -> None:
    opened = open_pipeline(tiny_pipeline("sana"), tmp_path)
    with pytest.raises(BundleError, match=r"instruction\.txt"):
        opened.model()
