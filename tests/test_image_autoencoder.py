"""Autoencoders around their graphs: tiles, slices and small ones, against diffusers'."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.pipelines import autoencoder as autoencoders
from image_models import SIDE, Opened, autoencoder, latents_of, pixels_of, quiet, stable_diffusion, write_folder
from PIL import Image
from torch_session import decoder_session

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Tiles of 32 pixels."""
    return write_folder(stable_diffusion(), tmp_path_factory.mktemp("sd"))


def tiny() -> diffusers.AutoencoderTiny:
    """Two pixels for each latent."""
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=0.9,
    ).eval()


@pytest.mark.parametrize(("height", "width"), [(56, 72), (32, 80), (24, 32)])
def test_tiles_are_those_of_diffusers(opened: Opened, height: int, width: int) -> None:
    pipeline = opened.pipeline
    options = Diffusion(steps=1, guidance=1.0, seed=1, height=height, width=width, tiling=True)
    made = opened.model().generate("a", options)[0]
    whole = opened.model().generate("a", Diffusion(steps=1, guidance=1.0, seed=1, height=height, width=width))[0]
    pipeline.vae.enable_tiling()
    try:
        expected = pixels_of(pipeline, made.latents)
    finally:
        pipeline.vae.disable_tiling()
    assert np.abs(np.asarray(made.image, int) - expected).max() <= 1
    assert np.array_equal(np.asarray(made.image), np.asarray(whole.image)) == (max(height, width) <= SIDE)


def test_large_images_are_tiled_and_decoded_one_by_one(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened.model()
    options = Diffusion(steps=1, guidance=1.0, seed=1, n=3)
    model.generate("a", options)
    assert opened.sessions["vae_decoder"].rows == [3]
    monkeypatch.setattr(autoencoders, "TOGETHER", 2 * SIDE**2)
    model.generate("a", options)
    assert opened.sessions["vae_decoder"].rows == [3, 2, 1]
    monkeypatch.setattr(autoencoders, "TILED_FROM", 1000)
    model.generate("a", Diffusion(steps=1, guidance=1.0, seed=1, height=2 * SIDE, width=SIDE))
    assert len(opened.sessions["vae_decoder"].rows) > 5
    model.generate("a", Diffusion(steps=1, guidance=1.0, seed=1, height=2 * SIDE, width=SIDE, tiling=False))
    assert opened.sessions["vae_decoder"].rows[-2:].count(1) == 2


def test_an_image_is_encoded_in_tiles_as_diffusers_does(opened: Opened) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(levels).resize((72, 56), Image.Resampling.BICUBIC)
    options = Diffusion(steps=2, guidance=1.0, seed=1, image=picture, strength=0.5, tiling=True)
    made = opened.model().generate("a", options)[0]
    theirs = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(opened.pipeline))
    theirs.vae.enable_tiling()
    try:
        expected = latents_of(
            theirs, "a", seed=1, image=picture, strength=0.5, num_inference_steps=2, guidance_scale=1.0
        )
    finally:
        theirs.vae.disable_tiling()
    assert np.abs(made.latents - expected).max() <= 1e-4 * expected.std()


def test_a_tiny_autoencoder_in_place_of_the_other(tmp_path: Path) -> None:
    """As people do: `pipe.vae = AutoencoderTiny.from_pretrained(...)`. Its encoder leaves nothing to chance."""
    torch.manual_seed(0)
    pipeline = stable_diffusion()
    pipeline.register_modules(vae=tiny())
    opened = write_folder(pipeline, tmp_path)
    picture = Image.new("RGB", (SIDE, SIDE), "red")
    model = opened.model()
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    made = model.generate("a", Diffusion(steps=4, guidance=4.0, seed=1, image=picture, strength=0.5))[0]
    options = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 4.0}
    expected = latents_of(quiet(theirs), "a", seed=1, image=picture, **options)
    assert np.abs(made.latents - expected).max() <= 1e-4 * expected.std()
    assert np.abs(np.asarray(made.image, int) - pixels_of(pipeline, expected)).max() <= 1


def test_a_tiny_autoencoder_beside_the_other(opened: Opened, tmp_path: Path) -> None:
    torch.manual_seed(0)
    beside = write_folder(opened.pipeline, tmp_path)
    small = tiny()
    small.save_config(tmp_path / "tiny_vae_decoder")
    beside.makers["tiny_vae_decoder"] = lambda: decoder_session(small)
    model = beside.model()
    plain = model.generate("a", Diffusion(steps=2, guidance=1.0, seed=1))[0]
    *_, last, _, end = model.stream("a", Diffusion(steps=2, guidance=1.0, seed=1, tiny_vae=True, preview_every=1))
    made = end.finished[0]
    assert np.array_equal(made.latents, plain.latents)
    with torch.no_grad():
        decoded = small.decode(torch.from_numpy(made.latents)[None] / small.config.scaling_factor).sample
    expected = np.asarray(opened.pipeline.image_processor.postprocess(decoded)[0], int)
    assert np.abs(np.asarray(made.image, int) - expected).max() <= 1
    # It makes the previews, too.
    assert np.abs(np.asarray(last.previews[0], int) - np.asarray(made.image, int)).max() <= 1


def test_shift_and_scale_of_the_latents(tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    pipeline.register_modules(vae=autoencoder(shift_factor=0.3, scaling_factor=0.7))
    made = write_folder(pipeline, tmp_path).model().generate("a", Diffusion(steps=1, guidance=1.0, seed=1))[0]
    with torch.no_grad():
        decoded = pipeline.vae.decode(torch.from_numpy(made.latents)[None] / 0.7 + 0.3).sample
    expected = np.asarray(pipeline.image_processor.postprocess(decoded)[0], int)
    assert np.abs(np.asarray(made.image, int) - expected).max() <= 1
