"""Pipelines of several denoisers against diffusers': the same modules, prompts and seeds, the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import RequestError
from image_models import Opened, generator, quiet
from part_sessions import BOUND, check, open_pipeline
from tiny_diffusers import tiny_pipeline

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
