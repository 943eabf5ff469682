"""From a folder of diffusers to pixels: exported, loaded with ONNX Runtime, compared with diffusers.

The pipelines alone are compared over all of their options in test_image_parity.py and its neighbours, the graphs in
test_image_export.py; here the two meet, by the files of a bundle alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.pipeline_source import open_pipeline
from fmedge_converters.pixel_pipeline import PixelDiffusionPipeline
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.generated_image import GeneratedImage
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.load import load_image
from fmedge_runtimes.pipelines import deepfloyd
from image_models import generator, quiet
from PIL import Image
from tiny_diffusers import PIXEL, save_pipeline, save_three_stages

# diffusers' own, of numpy and of what it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PROMPTS = ("a small red circle in the left", "a cat in the rain")
SEEDS = (7, 2**33 + 5)
SIZE = 32
LEVELS = 1
"""Of 255, by which a channel may differ: what rounds to the next level."""
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@dataclass(frozen=True)
class Case:
    """A tiny pipeline and how diffusers is asked for the same images."""

    name: str
    scheduler: str | None
    """Another one, by our name; None where the pipeline has no choice."""
    kind: str = ""
    """Its class in diffusers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of diffusers' call, besides those that all take."""
    guidance: tuple[float, ...] = (1.0, 4.0)


PLAIN = {"clean_caption": False}
CASES = [
    Case("sd", "euler", "EulerDiscreteScheduler"),
    Case("sdxl", "dpm++2m-karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    Case("sd2", "unipc", "UniPCMultistepScheduler"),
    Case("lcm", None),
    Case("sd3", "dpm++2m", "DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    Case("flux", "unipc", "UniPCMultistepScheduler", FLOW),
    Case("pixart_sigma", "ddim", "DDIMScheduler", given={**PLAIN, "use_resolution_binning": False}),
    Case(
        "sana",
        "dpm++2m",
        "DPMSolverMultistepScheduler",
        {**FLOW, "flow_shift": 3.0},
        {"use_resolution_binning": False},
    ),
    Case("kandinsky", "ddim", "DDIMScheduler"),
    Case("if", None, given=PLAIN),
]
UPSCALER = "upscaler"
MEDIUM = ("sd", "sdxl")


@pytest.fixture(scope="module")
def bundles(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """The folder of a tiny pipeline and its bundle, made once."""

    @cache
    def made(name: str) -> tuple[Path, Path]:
        if name == "sd":
            found: tuple[Path, Path] = request.getfixturevalue("stable_diffusion")
            return found
        root = tmp_path_factory.mktemp(name)
        source = save_pipeline(name, root / "source")
        return source, export(ExportOptions(str(source), root / "bundle", verify="none")).folder

    return made


def theirs_of(case: Case, source: Path, scheduler: str | None) -> Any:
    """diffusers' pipeline, opened from the folder."""
    with quiet_libraries():
        pipeline = quiet(DiffusionPipeline.from_pretrained(source))
    if scheduler is not None:
        kind = getattr(diffusers, case.kind)
        # diffusers' combined pipelines hold others, which have their own.
        stage = getattr(pipeline, "decoder_pipe", pipeline)
        stage.scheduler = kind.from_config(pipeline.scheduler.config, **case.settings)
    return pipeline


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.medium if case.name in MEDIUM else pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
def test_a_bundle_gives_diffusers_images(bundles: Callable[[str], tuple[Path, Path]], case: Case) -> None:
    source, bundle = bundles(case.name)
    with load_image(bundle) as model:
        for scheduler in dict.fromkeys((None, case.scheduler)):
            theirs = theirs_of(case, source, scheduler)
            for guidance in case.guidance:
                options = Diffusion(
                    steps=3, guidance=guidance, seed=SEEDS, height=SIZE, width=SIZE, scheduler=scheduler
                )
                for made in model.generate(PROMPTS, options):
                    found = theirs(
                        made.prompt,
                        generator=generator(made.seed),
                        num_inference_steps=3,
                        guidance_scale=guidance,
                        height=SIZE,
                        width=SIZE,
                        **case.given,
                    ).images[0]
                    difference = np.abs(np.asarray(made.image, int) - np.asarray(found.convert("RGB"), int))
                    assert difference.max() <= LEVELS, (scheduler, guidance, made.prompt)


@pytest.mark.slow
def test_an_upscaler_gives_diffusers_images(bundles: Callable[[str], tuple[Path, Path]]) -> None:
    source, bundle = bundles(UPSCALER)
    y, x = np.mgrid[:16, :24] / 24
    small = Image.fromarray((255 * np.stack([x, y, x * y], axis=-1)).astype(np.uint8))
    case = Case(UPSCALER, "euler", "EulerDiscreteScheduler")
    with load_image(bundle) as model:
        for scheduler in (None, case.scheduler):
            theirs = theirs_of(case, source, scheduler)
            for guidance in (1.0, 9.0):
                options = Diffusion(
                    steps=3, guidance=guidance, seed=SEEDS, image=small, noise_level=40, scheduler=scheduler
                )
                for made in model.generate(PROMPTS, options):
                    found = theirs(
                        made.prompt,
                        image=small,
                        generator=generator(made.seed),
                        num_inference_steps=3,
                        guidance_scale=guidance,
                        noise_level=40,
                    ).images[0]
                    difference = np.abs(np.asarray(made.image, int) - np.asarray(found.convert("RGB"), int))
                    assert difference.max() <= LEVELS, (scheduler, guidance, made.prompt)


@pytest.mark.slow
def test_a_cascade_of_three_stages_is_one_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are compared in test_cascades.py, its graphs here; and every part is found."""
    monkeypatch.setattr(deepfloyd, "SECOND_STEPS", 2)
    monkeypatch.setattr(deepfloyd, "THIRD_STEPS", 2)
    bundle = export(ExportOptions(str(save_three_stages(tmp_path / "source")), tmp_path / "bundle"))
    # diffusers has no pipeline that runs all stages.
    (parts,) = bundle.manifest.evidence
    assert parts.passed
    with load_image(bundle.folder, memory_mode="sequential") as model:
        made = model.generate(list(PROMPTS), Diffusion(steps=2, seed=SEEDS, height=64, width=48, noise_level=10))
    assert [image.image.size for image in made] == [(48, 64)] * 2


@pytest.mark.slow
def test_a_trained_folder_gives_its_own_pipelines_images(bundles: Callable[[str], tuple[Path, Path]]) -> None:
    source, bundle = bundles(PIXEL)
    # The folder's own pipeline.py is this class; that of tests refuses to run.
    with quiet_libraries():
        parts = {part.name: part.kind.from_pretrained(part.folder) for part in open_pipeline(str(source)).parts}
    theirs = quiet(PixelDiffusionPipeline(**parts))
    with load_image(bundle) as model:
        for scheduler in (None, "unipc"):
            if scheduler is not None:
                theirs.scheduler = diffusers.UniPCMultistepScheduler.from_config(theirs.scheduler.config)
            for guidance in (1.0, 3.0):
                options = Diffusion(steps=4, guidance=guidance, seed=SEEDS, scheduler=scheduler)
                for made in model.generate(PROMPTS, options):
                    found = theirs(
                        [made.prompt],
                        generator=generator(made.seed),
                        num_inference_steps=4,
                        guidance_scale=guidance,
                    ).images[0]
                    assert np.abs(np.asarray(made.image, int) - np.asarray(found, int)).max() <= LEVELS


def one(model: ImageModel, prompts: list[str], which: int, seed: int, **changes: Any) -> GeneratedImage:
    """The image of one prompt and seed, among others."""
    seeds = tuple(seed if number == which else 1000 + number for number in range(len(prompts)))
    made = model.generate(prompts, Diffusion(steps=3, guidance=4.0, seed=seeds, height=SIZE, width=SIZE, **changes))
    return next(image for image in made if (image.prompt_index, image.index) == (which, 0))


@pytest.mark.medium
def test_an_image_is_the_same_in_any_batch(bundles: Callable[[str], tuple[Path, Path]]) -> None:
    """Latents within rounding of their standard deviation, pixels within a level, whatever stands beside it."""
    _, bundle = bundles("sd")
    others = ["a large blue square in the center", "night", "oil painting, blurry " * 20]
    with load_image(bundle, threads=1) as model:
        alone = one(model, [PROMPTS[0]], 0, 7)
        beside = [
            one(model, [PROMPTS[0], *others], 0, 7),
            one(model, [*others, PROMPTS[0]], 3, 7),
            one(model, [*others, *others, PROMPTS[0]], 6, 7),
            one(model, [others[2], PROMPTS[0]], 1, 7, n=3),
            one(model, [PROMPTS[0]], 0, 7, n=5),
        ]
        again = one(model, [PROMPTS[0]], 0, 7)
    assert np.array_equal(alone.latents, again.latents)
    assert alone.png() == again.png()
    for image in beside:
        assert np.abs(image.latents - alone.latents).max() <= 1e-5 * alone.latents.std()
        assert np.abs(np.asarray(image.image, int) - np.asarray(alone.image, int)).max() <= LEVELS


@pytest.mark.medium
def test_another_process_gives_the_same_bytes(bundles: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, bundle = bundles("sd")
    for name in ("1", "2"):
        command = [sys.executable, "-m", "fmedge", "generate", str(bundle), *PROMPTS, "--seed", "3", "--steps", "2"]
        command += ["-n", "2", "--output", str(tmp_path / name), "--grid", str(tmp_path / name / "grid.png")]
        subprocess.run(command, check=True, capture_output=True, env=hashed(name))
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == ["00000.png", "00001.png", "00002.png", "00003.png", "grid.png"]
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.slow
def test_another_process_exports_the_same_bytes(tmp_path: Path) -> None:
    source = save_pipeline("sd", tmp_path / "source")
    for name in ("1", "2"):
        command = [sys.executable, "-m", "fmedge", "export", str(source), str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, env=hashed(name))
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert Path("golden/0.png") in files
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def hashed(seed: str) -> dict[str, str]:
    """This environment, in which sets come in another order."""
    return {**os.environ, "PYTHONHASHSEED": seed}
