"""ControlNets against diffusers': the same modules, prompts, seeds and control images give the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import fmedge_runtimes.load
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import RequestError
from image_models import (
    SIDE,
    Opened,
    complete,
    controlnet,
    generator,
    quiet,
    stable_diffusion,
    stable_diffusion_xl,
    write_folder,
)
from PIL import Image
from typer.testing import CliRunner

import fmedge
from fmedge.cli import app

# diffusers' own, of numpy and of what it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BOUND = 1e-4
"""On latents, as a share of their standard deviation."""
PROMPTS = ["a red cat", "dog 42!", "a red cat", "what is this?"]
SEEDS = (7, 8, 2**33 + 5, 0)
NEGATIVES = ("bad", None, "", "red")
SIZE = {"height": SIDE, "width": SIDE}


def picture(number: int, width: int = 50, height: int = 40) -> Image.Image:
    """Lines, as a control image has them, at another size than is rendered."""
    y, x = np.mgrid[:height, :width] / 50
    levels = 255 * np.stack([np.sin(9 * (x + number) * y) ** 2, x > 0.5, (y * number) % 1], axis=-1)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def controlled(pipeline: DiffusionPipeline, kind: str, count: int = 1, **changes: Any) -> Any:
    """diffusers' pipeline of that class, with so many ControlNets."""
    nets = [controlnet(pipeline.unet, seed, **changes) for seed in range(1, count + 1)]
    return quiet(getattr(diffusers, kind).from_pipe(pipeline, controlnet=nets if count > 1 else nets[0]))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return write_folder(
        controlled(stable_diffusion(), "StableDiffusionControlNetPipeline"), tmp_path_factory.mktemp("sd")
    )


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    pipeline = controlled(stable_diffusion_xl(), "StableDiffusionXLControlNetPipeline")
    return write_folder(pipeline, tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    pipeline = controlled(
        stable_diffusion(), "StableDiffusionControlNetPipeline", 2, controlnet_conditioning_channel_order="bgr"
    )
    return write_folder(pipeline, tmp_path_factory.mktemp("two"))


def check(
    opened: Opened, options: Diffusion, prompts: list[str], images: list[Any], theirs: Any = None, **given: Any
) -> None:
    """Compare with diffusers' images for each prompt alone; `images` are its own control images."""
    pipeline = theirs or opened.pipeline
    found = opened.model().generate(prompts, options)
    assert len(found) == len(prompts)
    name = "control_image" if "image" in given else "image"
    for made, image in zip(found, images, strict=True):
        own = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, name: image, **given}
        one = [
            pipeline(
                made.prompt,
                negative_prompt=made.settings.negative,
                generator=generator(made.seed),
                output_type=kind,
                **own,
            ).images[0]
            for kind in ("latent", "pil")
        ]
        expected = one[0].numpy()
        assert made.latents.shape == expected.shape
        assert np.abs(made.latents - expected).max() <= BOUND * expected.std(), made.settings
        assert np.abs(np.asarray(made.image, int) - np.asarray(one[1], int)).max() <= 1


@pytest.mark.medium
@pytest.mark.parametrize(("guidance", "count"), [(1.0, 1), (1.0, 4), (6.0, 4)])
def test_one_image_for_all(sd: Opened, xl: Opened, guidance: float, count: int) -> None:
    options = Diffusion(
        steps=3, guidance=guidance, seed=SEEDS[:count], negative=NEGATIVES[:count], control=picture(1), **SIZE
    )
    for opened in (sd, xl):
        check(opened, options, PROMPTS[:count], [picture(1)] * count, **SIZE)


def test_each_prompt_has_its_own_image(sd: Opened) -> None:
    pictures = [picture(number) for number in range(4)]
    options = Diffusion(steps=3, guidance=4.0, seed=SEEDS, control=pictures, control_scale=0.7, height=16, width=40)
    check(sd, options, PROMPTS, pictures, height=16, width=40, controlnet_conditioning_scale=0.7)


def test_the_size_is_the_control_images(sd: Opened) -> None:
    options = Diffusion(steps=2, guidance=4.0, seed=1, control=picture(2, 37, 45))
    check(sd, options, PROMPTS[:1], [picture(2, 37, 45)])
    (made,) = sd.model().generate("a", options)
    assert made.image.size == (36, 44)


@pytest.mark.medium
def test_part_of_the_steps(sd: Opened, xl: Opened) -> None:
    options = Diffusion(
        steps=5, guidance=4.0, seed=3, control=picture(1), control_start=0.2, control_end=0.7, control_scale=1.5, **SIZE
    )
    given = {"control_guidance_start": 0.2, "control_guidance_end": 0.7, "controlnet_conditioning_scale": 1.5}
    for opened in (sd, xl):
        check(opened, options, PROMPTS[:1], [picture(1)], **SIZE, **given)
    runs = sd.sessions["controlnet"].rows
    assert len(runs) == 2  # steps 2 and 3 of 5: those that begin at 0.2 and end by 0.7


@pytest.mark.medium
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guess_mode(sd: Opened, xl: Opened, guidance: float) -> None:
    options = Diffusion(steps=3, guidance=guidance, seed=(3, 4), control=picture(1), guess_mode=True, **SIZE)
    for opened in (sd, xl):
        check(opened, options, PROMPTS[:2], [picture(1)] * 2, **SIZE, guess_mode=True)


@pytest.mark.medium
def test_guidance_in_two_calls(sd: Opened) -> None:
    """As where memory is short: the same images, in guess mode too."""
    for guess in (False, True):
        options = Diffusion(steps=2, guidance=4.0, seed=3, control=picture(1), guess_mode=guess, **SIZE)
        model = sd.model()
        whole = model.generate(PROMPTS[:2], options)
        model._batch = lambda *_, **__: (2, True)  # type: ignore[method-assign]
        halves = model.generate(PROMPTS[:2], options)
        assert sd.sessions["unet"].rows[-1] == 2
        for one, other in zip(whole, halves, strict=True):
            assert np.abs(one.latents - other.latents).max() <= 1e-5 * one.latents.std()


@pytest.mark.medium
def test_residuals_without_places(tmp_path: Path) -> None:
    """Those of a ControlNet that pools them: for the prompt's half of guidance only."""
    pipeline = controlled(stable_diffusion(), "StableDiffusionControlNetPipeline")
    pipeline.controlnet.register_to_config(global_pool_conditions=True)
    options = Diffusion(steps=3, guidance=4.0, seed=3, control=picture(1), **SIZE)
    check(write_folder(pipeline, tmp_path), options, PROMPTS[:1], [picture(1)], **SIZE)


@pytest.mark.medium
def test_several_are_summed(two: Opened) -> None:
    images = [picture(1), picture(2)]
    options = Diffusion(
        steps=4,
        guidance=4.0,
        seed=(3, 4),
        control=[images[0], [images[1], picture(3)]],
        control_scale=(0.5, 1.2),
        control_end=(1.0, 0.5),
        **SIZE,
    )
    given = {"controlnet_conditioning_scale": [0.5, 1.2], "control_guidance_end": [1.0, 0.5]}
    check(two, options, PROMPTS[:2], [images, [picture(1), picture(3)]], **SIZE, **given)


def test_one_of_several_rests(two: Opened) -> None:
    options = Diffusion(steps=3, guidance=4.0, seed=3, control=[None, picture(2)], **SIZE)
    scales = {"controlnet_conditioning_scale": [0.0, 1.0]}
    check(two, options, PROMPTS[:1], [[picture(1), picture(2)]], **SIZE, **scales)
    assert two.opened[-5:] == ["text_encoder", "controlnet_1_embedding", "unet", "controlnet_1", "vae_decoder"]


def test_without_an_image_it_is_the_plain_pipeline(sd: Opened) -> None:
    parts = {name: part for name, part in sd.pipeline.components.items() if name != "controlnet"}
    plain = quiet(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False))
    for made in sd.model().generate(PROMPTS[:2], Diffusion(steps=3, guidance=4.0, seed=(1, 2), **SIZE)):
        expected = plain(
            made.prompt,
            generator=generator(made.seed),
            num_inference_steps=3,
            guidance_scale=4.0,
            output_type="latent",
            **SIZE,
        ).images[0]
        assert np.abs(made.latents - expected.numpy()).max() <= BOUND * expected.numpy().std()


@pytest.mark.medium
@pytest.mark.parametrize("masked", [False, True])
def test_from_an_image(masked: bool, sd: Opened, xl: Opened) -> None:
    start = picture(5, SIDE, SIDE)
    mask = Image.fromarray(np.pad(np.full((16, 20), 255, np.uint8), ((8, 8), (4, 8))))
    more = {"mask": mask} if masked else {}
    options = Diffusion(
        steps=5, guidance=4.0, seed=(3, 4), image=start, strength=0.6, control=picture(1), **more, **SIZE
    )
    given = {"image": start, "strength": 0.6, **({"mask_image": mask} if masked else {}), **SIZE}
    for opened, name in ((sd, "StableDiffusion"), (xl, "StableDiffusionXL")):
        kind = f"{name}ControlNet{'Inpaint' if masked else 'Img2Img'}Pipeline"
        theirs = quiet(getattr(diffusers, kind).from_pipe(opened.pipeline, controlnet=opened.pipeline.controlnet))
        # Its default is another number in each of these classes.
        check(opened, options, PROMPTS[:2], [picture(1)] * 2, theirs, **given, controlnet_conditioning_scale=1.0)


@pytest.mark.medium
def test_a_unet_that_sees_the_mask(tmp_path: Path) -> None:
    """The ControlNet is shown the latents alone."""
    pipeline = stable_diffusion(in_channels=9)
    net = controlnet(stable_diffusion().unet)
    theirs = quiet(diffusers.StableDiffusionControlNetInpaintPipeline.from_pipe(pipeline, controlnet=net))
    start, mask = picture(5, SIDE, SIDE), Image.fromarray(np.pad(np.full((16, 20), 255, np.uint8), ((8, 8), (4, 8))))
    options = Diffusion(steps=4, guidance=4.0, seed=3, image=start, mask=mask, control=picture(1), **SIZE)
    given = {"image": start, "mask_image": mask, "strength": 1.0, "controlnet_conditioning_scale": 1.0, **SIZE}
    check(write_folder(theirs, tmp_path), options, PROMPTS[:1], [picture(1)], **given)


def test_a_file_that_two_prompts_share(sd: Opened, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    picture(2).save(tmp_path / "b.png")
    files = [tmp_path / "a.png", str(tmp_path / "b.png"), tmp_path / "a.png"]
    options = Diffusion(steps=2, guidance=4.0, seed=SEEDS[:3], control=files, **SIZE)
    check(sd, options, PROMPTS[:3], [picture(1), picture(2), picture(1)], **SIZE)
    assert len(sd.sessions["controlnet_embedding"].rows) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"control": [picture(1)] * 3}, "3 images for 2 prompts"),
        ({"control": [[picture(1)], None]}, "there is one ControlNet"),
        ({"control": "missing.png"}, "there is no file missing.png"),
        ({"control": __file__}, "is no image"),
        ({"control": 3}, "must be a file"),
        ({"control": picture(1), "control_scale": (1.0, 2.0)}, "2 values for 1 ControlNets"),
        ({"control": picture(1), "control_start": 0.5, "control_end": 0.5}, "never be at work"),
        ({"control": picture(1), "control_end": 1.5}, "from 0 to 1"),
        ({"control_scale": 0.5}, "without control"),
        ({"guess_mode": True}, "without control"),
    ],
)
def test_what_cannot_be_is_refused(sd: Opened, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        sd.model().stream(PROMPTS[:2], Diffusion(steps=2, **changes))


def test_several_want_as_many_images(two: Opened) -> None:
    for control in (picture(1), [picture(1)], [picture(1)] * 3):
        with pytest.raises(RequestError, match=r"one for each ControlNet \(controlnet, controlnet_1\)"):
            two.model().stream("a", Diffusion(steps=2, control=control))
    with pytest.raises(RequestError, match="no image"):
        two.model().stream("a", Diffusion(steps=2, control=[None, None]))


def test_a_bundle_without_a_controlnet_says_so(tmp_path: Path) -> None:
    opened = write_folder(stable_diffusion(), tmp_path)
    with pytest.raises(RequestError, match=r"has no ControlNet.*--controlnet"):
        opened.model().stream("a", Diffusion(control=picture(1)))


def test_the_command(sd: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option arrives; the PNG says how the ControlNet was at work, and inspect that there is one."""
    complete(sd)
    monkeypatch.setattr(fmedge_runtimes.load, "open_session", lambda graph, *_: sd.open(graph.parent.name))
    picture(1).save(tmp_path / "edges.png")
    options = ("--control", "edges.png", "--control-scale", "0.5", "--control-start", "0.1", "--control-end", "0.9")
    command = ["generate", str(sd.folder), "a", *options, "--guess-mode", "--steps", "2", "--seed", "3"]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*command, "--output", "made.png", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["controls"] == [{"net": "controlnet", "scale": 0.5, "start": 0.1, "end": 0.9}]
    assert facts["guess_mode"] is True
    with fmedge.load_image(sd.folder) as model:
        asked = fmedge.Diffusion(
            steps=2,
            seed=3,
            control=tmp_path / "edges.png",
            control_scale=0.5,
            control_start=0.1,
            control_end=0.9,
            guess_mode=True,
        )
        assert model.generate("a", asked)[0].png() == (tmp_path / "made.png").read_bytes()
    with Image.open(tmp_path / "made.png") as image:
        assert "ControlNet 0: " in image.text["parameters"]
    shown = CliRunner().invoke(app, ["inspect", str(sd.folder)]).stdout
    assert "1 ControlNet: --control shows each an image" in shown
