"""What images take in memory is said from configs, and is about what ONNX Runtime takes then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from fmedge_runtimes.bundle import ImageBundle
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.image_plan import MOST_BATCH, ImagePlan, plan_image
from fmedge_runtimes.manifest import FileFacts
from hypothesis import given
from hypothesis import strategies as st
from image_models import (
    SIDE,
    autoencoder,
    complete,
    controlnet,
    image_manifest,
    stable_diffusion,
    stable_diffusion_xl,
    unet,
    write_folder,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageBundle]:
    folder = tmp_path_factory.mktemp("plan")
    makers = {"sd": stable_diffusion, "xl": stable_diffusion_xl}
    return {name: complete(write_folder(make(), folder / name)) for name, make in makers.items()}


def part(found: ImagePlan, name: str) -> Any:
    return next(one for one in found.parts if one.name == name)


def test_a_plan_is_the_bundles_own_unless_told_otherwise(bundles: dict[str, ImageBundle]) -> None:
    found = plan_image(bundles["sd"])
    assert (found.height, found.width, found.batch, found.guided, found.memory) == (SIDE, SIDE, 1, True, None)
    assert found == plan_image(bundles["sd"], height=SIDE, width=SIDE, batch=1, guided=True)
    assert part(found, "unet").weights == round(1.2 * 1000 * len("unet"))
    assert found.fits("keep")
    assert found.total("keep") == sum(one.weights for one in found.parts) + found.working
    assert found.total("sequential") == max(one.weights + one.working for one in found.parts)


@given(
    name=st.sampled_from(["sd", "xl"]),
    height=st.integers(1, 64),
    width=st.integers(1, 64),
    batch=st.integers(1, MOST_BATCH - 1),
    guided=st.booleans(),
)
def test_more_takes_more(
    bundles: dict[str, ImageBundle], name: str, height: int, width: int, batch: int, guided: bool
) -> None:
    def total(**changes: Any) -> int:
        asked = {"height": 8 * height, "width": 8 * width, "batch": batch, "guided": guided, **changes}
        found = plan_image(bundles[name], **asked)
        assert 0 < found.total("sequential") <= found.total("keep")
        assert plan_image(bundles[name], **asked, memory=found.total("keep")).fits("keep")
        assert not plan_image(bundles[name], **asked, memory=found.total("keep") - 1).fits("keep")
        return part(found, "unet").working

    assert total(batch=batch + 1) > total()
    assert total(height=8 * height + 8) > total()
    assert total(guided=True) == 2 * total(guided=False)


def test_a_controlnet_runs_beside_the_unet(tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    net = controlnet(pipeline.unet)
    controlled = diffusers.StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=net)
    found = plan_image(complete(write_folder(controlled, tmp_path)), height=64, width=64)
    denoiser, beside = part(found, "unet"), part(found, "controlnet")
    assert (denoiser.beside, beside.beside, part(found, "controlnet_embedding").beside) == (False, True, False)
    together = [denoiser.working + beside.working, denoiser.weights + beside.weights]
    assert found.working == together[0]
    assert found.total("sequential") == sum(together)
    assert found.total("keep") == sum(one.weights for one in found.parts) + together[0]
    assert 0 < part(found, "controlnet_embedding").working < beside.working


def test_what_cannot_be_planned(bundles: dict[str, ImageBundle]) -> None:
    with pytest.raises(RequestError, match="a batch of 65 images cannot be planned; give 1 to 64"):
        plan_image(bundles["sd"], batch=65)
    with pytest.raises(RequestError, match="-8x32 is no size"):
        plan_image(bundles["sd"], width=-8)


MEASURE = """
import re, sys
from pathlib import Path
import numpy as np, onnxruntime

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

shapes = eval(sys.argv[2])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options)
before = peak()
session.run(None, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
print(peak() - before)
"""


class Named(torch.nn.Module):
    """A module whose forward takes what its graph takes."""

    def __init__(self, module: torch.nn.Module, forward: Any) -> None:
        super().__init__()
        self.module, self.call = module, forward

    def forward(self, *feeds: torch.Tensor) -> torch.Tensor:
        return self.call(self.module, *feeds)


def taken(module: Named, path: Path, shapes: dict[str, tuple[int, ...]], dynamic: dict[str, dict[int, str]]) -> int:
    """Bytes that a run of the module's graph takes, in a process of its own."""
    small = [
        torch.ones([1 if axis in dynamic.get(name, {}) else side for axis, side in enumerate(shape)])
        for name, shape in shapes.items()
    ]
    names = list(shapes)
    torch.onnx.export(
        module, tuple(small), str(path), input_names=names, dynamic_axes=dynamic, opset_version=17, dynamo=False
    )
    command = [sys.executable, "-c", MEASURE, str(path), repr(shapes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_the_estimate_is_about_what_a_run_takes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64), "attention_head_dim": 8}
    cross = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
    pipeline = stable_diffusion()
    vae = autoencoder(block_out_channels=[32, 64], sample_size=512)
    pipeline.register_modules(unet=unet(**sizes, **cross), vae=vae)
    opened = write_folder(pipeline, tmp_path / "bundle")
    manifest = image_manifest(pipeline, list(opened.makers))
    files = {"unet/model.onnx": FileFacts(bytes=1, sha256="0" * 64)}
    bundle = ImageBundle(opened.folder, manifest.model_copy(update={"files": files}))
    found = plan_image(bundle, height=80, width=64, batch=1, guided=True)
    batch = {0: "batch"}
    denoiser = Named(pipeline.unet, lambda module, sample, steps, states: module(sample, steps[0], states).sample)
    shapes = {"sample": (2, 4, 40, 32), "timestep": (1,), "states": (2, 77, 32)}
    measured = taken(denoiser, tmp_path / "unet.onnx", shapes, {"sample": batch, "states": batch})
    assert measured < 1.3 * part(found, "unet").working < 3 * measured
    found = plan_image(bundle, height=512, width=384, batch=1)
    decoder = Named(vae, lambda module, latents: module.decode(latents).sample)
    shapes = {"latent_sample": (1, 4, 256, 192)}
    # The graph's attention would take more than the whole test; large images are not decoded by models like this one.
    vae.decoder.mid_block.attentions[0] = None
    vae.encoder.mid_block.attentions[0] = None
    measured = taken(decoder, tmp_path / "vae.onnx", shapes, {"latent_sample": batch})
    activations = part(found, "vae_decoder").working - 4 * 2 * (256 * 192) ** 2
    assert measured < 1.3 * activations < 3 * measured
