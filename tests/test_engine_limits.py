"""What engines of image pipelines were built for, and that nothing else is asked of them."""

from __future__ import annotations

import numpy as np
import pytest
from fmedge_converters.image_device_plan import plan_images, weight_bytes
from fmedge_converters.parts import find_kind
from fmedge_converters.parts.part import Asked
from fmedge_converters.profiles import PartSizes, Reach, part_profiles
from fmedge_runtimes.bundle import ImageBundle
from fmedge_runtimes.devices import DEVICES
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.engine_limits import EngineLimits
from fmedge_runtimes.errors import ExportError, RequestError
from fmedge_runtimes.image import ImageModel
from fmedge_runtimes.image_plan import PartPlan
from fmedge_runtimes.manifest import GraphFacts, ImageFacts, ProfileFacts, TensorFacts
from fmedge_runtimes.parts import Parts
from image_models import SIDE, autoencoder, image_manifest, stable_diffusion, unet, write_folder
from torch_session import TorchSession

IMAGE = ImageFacts(pipeline="StableDiffusionPipeline", height=512, width=512, steps=4, guidance=7.5)
AXES = {
    "text_encoder": {"batch": (1, 2, 3), "sequence": (1, 16, 16)},
    "unet": {
        "batch": (1, 2, 4),
        "steps": (1, 1, 4),
        "height": (8, 16, 32),
        "width": (8, 16, 32),
        "sequence": (1, 77, 99),
    },
    "vae_decoder": {"batch": (1, 1, 1), "height": (1, 16, 24), "width": (1, 16, 24)},
    "vae_encoder": {"batch": (1, 1, 1), "height": (2, 32, 48), "width": (2, 32, 48)},
}
"""Of engines for images of 32 pixels, two at a time."""
INPUTS = {
    "text_encoder": ["input_ids"],
    "unet": ["sample", "timestep", "encoder_hidden_states"],
    "vae_decoder": ["latent_sample"],
    "vae_encoder": ["sample"],
}


class Bounded(TorchSession):
    """A session that takes what an engine with these axes would."""

    axes: dict[str, tuple[int, int, int]]

    def run(self, feeds, results):
        for spec in self.inputs:
            for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
                least, _, most = self.axes.get(axis, (size, size, size))
                assert least <= size <= most, f"{spec.name}: {axis} is {size}"
        return super().run(feeds, results)


def bounded(session: TorchSession, axes: dict[str, tuple[int, int, int]]) -> TorchSession:
    session.__class__ = Bounded
    session.axes = axes
    return session


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageModel, ImageModel]:
    """One whose sessions take anything, and one with the engines of AXES."""
    opened = write_folder(stable_diffusion(), tmp_path_factory.mktemp("limits"))
    facts = {
        name: GraphFacts(
            file=f"{name}/model.onnx",
            inputs=tuple(TensorFacts(name=item, dtype="float32", shape=()) for item in INPUTS[name]),
            outputs=(),
            profiles=(ProfileFacts(name="default", axes=axes),),
        )
        for name, axes in AXES.items()
    }
    manifest = image_manifest(opened.pipeline, list(AXES)).model_copy(update={"graphs": facts})
    bundle = ImageBundle(opened.folder, manifest)
    limits = EngineLimits(bundle, AXES, "fmedge build out")

    def open_part(name: str) -> TorchSession:
        return bounded(opened.makers[name](), AXES[name])

    parts = Parts(opened.folder, frozenset(AXES), open_part, "keep", AXES)
    return opened.model(max_batch=4), ImageModel(bundle, parts, limits=limits)


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (["red cat", "a b c", "red", "d e", "f"], Diffusion(steps=1, seed=3, preview_every=1)),
        (["red cat"] * 5, Diffusion(steps=1, seed=3, guidance=1.0)),
        (["red cat"], Diffusion(steps=1, seed=3, height=SIDE + 16, width=SIDE)),
        (["red cat"], Diffusion(steps=1, seed=3, height=2 * SIDE, width=SIDE, tiling=True)),
    ],
)
def test_engines_are_asked_for_what_they_were_built_for(models, prompts: list[str], options: Diffusion) -> None:
    free, engines = models
    shown = []
    found = engines.generate(prompts, options, progress=lambda update: shown.extend(update.previews))
    wanted = free.generate(prompts, options)
    assert bool(shown) is bool(options.preview_every)
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(one.image, int) - np.asarray(other.image, int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"height": 96, "width": 32},
            "32x96 is 48 places along the height of unet.*8 to 32.*--size 32x32 --size 32x96",
        ),
        ({"height": 8, "width": 8}, "8x8 is 4 places along the height of unet"),
        ({"height": 64, "width": 32, "tiling": False}, "32x64 is 32 places .* vae_decoder.* without tiles"),
    ],
)
def test_what_they_were_not_built_for_is_refused_with_the_command(models, options, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        models[1].generate("red", Diffusion(steps=1, **options))


def test_more_images_together_than_engines_have_rows_for(models) -> None:
    limits = models[1]._limits
    assert [limits.most_images(guidance) for guidance in (7.5, 1.0)] == [2, 4]
    limits.check_batch(2)
    with pytest.raises(RequestError, match=r"max_batch is 3, .* 2 images together.*fmedge build out --batch 3"):
        limits.check_batch(3)


def test_the_profiles_of_residuals_follow_the_unet() -> None:
    module = unet(
        block_out_channels=(16, 32, 32), down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3
    )
    kind = find_kind(type(module))
    assert kind is not None
    call = kind.graphs(module, Asked("unet", "StableDiffusionControlNetPipeline", residuals=True))["unet"]
    (profile,) = part_profiles(call, PartSizes(IMAGE, 8))
    assert profile.axes["residuals"] == (1, 2, 8)
    assert {axis: sizes for axis, sizes in profile.axes.items() if axis.startswith("height")} == {
        "height": (32, 64, 128),
        "height/1": (1, 64, 128),
        "height/2": (1, 32, 64),
        "height/4": (1, 16, 32),
    }
    levels = [call.spread[name][2] for name in call.spread if "residual" in name]
    assert levels == [f"height/{size}" for size in (1, 1, 2, 2, 4, 4, 4)]


def test_a_device_has_room_for_less() -> None:
    module = autoencoder()
    floats = sum(value.numel() for value in module.parameters()) * 2
    assert floats * 0.8 < weight_bytes(module, 4, 2) < floats == weight_bytes(module, 16, 2)
    device = DEVICES["orin-nano-8gb"]

    def planned(image: int):
        """One part, of 1 GB and so many bytes for each image of the usual size."""

        def parts(reach: Reach) -> list[PartPlan]:
            return [PartPlan("unet", 10**9, image * reach.images * reach.larger**2 // reach.tiles**2, held=True)] * 2

        return plan_images(device, (512, 512), parts)

    assert planned(5 * 10**7).reach == Reach()
    assert planned(3 * 10**8).reach == Reach(larger=1)
    assert (planned(18 * 10**8).reach, planned(18 * 10**8).mode) == (Reach(2, larger=1), "sequential")
    tiled = planned(12 * 10**9)
    assert tiled.reach.tiles == 2 and "decoded in tiles" in str(tiled)
    with pytest.raises(ExportError, match=r"does not fit on orin-nano-8gb: .*1 image of up to 512x512"):
        planned(4 * 10**10)
