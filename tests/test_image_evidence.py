"""The comparison of a bundle's images with its source's, and the golden image that it leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from fmedge_converters import image_evidence, image_export
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_runtimes.bundle import ImageBundle, open_image_bundle
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import ParityError
from fmedge_runtimes.load import load_image
from fmedge_runtimes.verify import verify
from PIL import Image

pytestmark = pytest.mark.medium


@pytest.fixture
def source(pixel: tuple[Path, Path]) -> Path:
    return pixel[0]


@pytest.fixture
def bundle(pixel: tuple[Path, Path]) -> ImageBundle:
    return open_image_bundle(pixel[1])


def test_images_are_diffusers_own(bundle: ImageBundle) -> None:
    parts, image = bundle.manifest.evidence
    assert (parts.name, image.name) == ("parts", "image")
    assert image.passed
    assert image.figures["largest_levels"] <= 1
    assert not bundle.manifest.forced


def test_the_golden_image_is_made_again(pixel: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = open_image_bundle(Path(shutil.copytree(pixel[1], tmp_path / "bundle")))
    assert verify(bundle.folder).images == 1
    (golden,) = bundle.manifest.golden
    path = bundle.file(golden.file)
    made = np.asarray(Image.open(path))
    assert made.std() > 1  # a picture
    with load_image(bundle.folder) as model:
        size = {"height": golden.height, "width": golden.width}
        other_seed = model.generate(golden.prompt, Diffusion(steps=golden.steps, seed=golden.seed + 1, **size))[0]
    other_seed.image.save(path)
    facts = {**bundle.manifest.files, golden.file: _facts(path)}
    other = bundle.manifest.model_copy(update={"files": facts})
    (bundle.folder / "fmedge.json").write_text(other.model_dump_json())
    with pytest.raises(ParityError, match="golden image 0 differs"):
        verify(bundle.folder)


def _facts(path: Path) -> Any:
    from fmedge_runtimes.bundle import sha256_of
    from fmedge_runtimes.manifest import FileFacts

    return FileFacts(bytes=path.stat().st_size, sha256=sha256_of(path))


def test_other_images_stop_the_export(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = image_export._modules

    def changed(*args: Any) -> dict[str, Any]:
        found = modules(*args)
        with torch.no_grad():
            for parameter in found["transformer"].parameters():
                parameter.mul_(1.05)
        return found

    monkeypatch.setattr(image_export, "_modules", changed)
    with pytest.raises(ParityError, match=r"nothing was written \(image: 2 images of 32x32"):
        export(ExportOptions(str(source), tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("StableDiffusionPipeline", None),
        ("StableDiffusion3Pipeline", None),
        ("FluxPipeline", None),
        ("IFPipeline", None),
        ("StableDiffusionInpaintPipeline", "starts from images"),
        ("StableDiffusionImg2ImgPipeline", "starts from images|no arguments"),
        ("IFSuperResolutionPipeline", "starts from images|no arguments"),
        ("KandinskyV22CombinedPipeline", "several stages"),
        ("KandinskyV22Pipeline", "no arguments"),
    ],
)
def test_pipelines_that_are_called_in_other_ways(name: str, words: str | None) -> None:
    found = image_evidence._obstacle(getattr(diffusers, name))
    assert (found is None) if words is None else any(word in str(found) for word in words.split("|"))
