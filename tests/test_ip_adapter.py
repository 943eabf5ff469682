"""IP-Adapters against diffusers': the same modules, prompts, seeds and images give the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.ip_adapter import IpAdapter
from fmedge_converters.ip_adapter_source import with_image_encoder, write_processor
from fmedge_converters.parts import find_kind
from fmedge_converters.parts.part import Asked, Call
from fmedge_converters.pipeline_source import empty_part, open_pipeline
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import BundleError, RequestError, SourceError
from fmedge_runtimes.load import load_image
from fmedge_runtimes.parts import Config
from fmedge_runtimes.pipelines.reference import clip_pixels
from fmedge_runtimes.session import TensorSpec
from fmedge_runtimes.verify import verify
from hypothesis import given, settings
from hypothesis import strategies as st
from image_models import Opened, generator
from part_sessions import open_pipeline as open_parts
from PIL import Image
from safetensors.torch import load_file, save_file
from test_image_export import lora
from tiny_diffusers import save_controlnet, save_ip_adapter, save_pipeline, tiny_pipeline
from torch_session import TorchSession

# diffusers' own, of numpy and of what it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
BOUND = 1e-4
"""On latents, as a share of their standard deviation."""
PROMPTS = ["a small red circle", "a cat in the rain", "a small red circle", "oil painting"]
SIZE = {"height": 32, "width": 32}


def picture(number: int, width: int = 100, height: int = 80) -> Image.Image:
    y, x = np.mgrid[:height, :width] / 100
    levels = 255 * np.stack([np.sin(5 * (x + number) * y) ** 2, x * y, (y * number) % 1], axis=-1)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def call_session(module: Any, call: Call) -> TorchSession:
    """A module as the graph that would be exported of this call."""
    specs = tuple(TensorSpec(item.name, "int64" if item.integer else "float32", item.dims) for item in call.inputs)
    sizes = {"batch": 1, "height": 8, "width": 8, "sequence": 3}
    example = {
        item.name: torch.ones([sizes[d] if isinstance(d, str) else d for d in item.dims]) for item in call.inputs
    }
    with torch.no_grad():
        names = call.run(module, example)
    outputs = tuple(TensorSpec(name, "float32", ("any",)) for name in names)
    return TorchSession(lambda **feeds: call.run(module, feeds), specs, outputs)


def adapted(folder: Path, kind: str) -> tuple[Opened, Any]:
    """Our model and diffusers' pipeline with the same IP-Adapter."""
    file = save_ip_adapter("sd", folder / "ip", kind)
    ours, theirs = tiny_pipeline("sd"), tiny_pipeline("sd")
    with quiet_libraries():
        theirs.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
        encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(file.parent / "image_encoder").eval()
    adapter = IpAdapter(file, ours.unet, encoder, allow_pickle=False)
    opened = open_parts(ours, folder / "bundle")
    for name, module in (("unet", ours.unet), ("image_encoder", encoder)):
        found = find_kind(type(module))
        assert found is not None
        call = adapter.call(name, found.graphs(module, Asked(name, "StableDiffusionPipeline"))[name])
        adapter.attach(name, module)
        opened.makers[name] = lambda module=module, call=call: call_session(module, call)
    encoder.config.save_pretrained(opened.folder / "image_encoder")
    adapter.write_facts(opened.folder)
    (opened.folder / "feature_extractor").mkdir()
    config = theirs.feature_extractor.to_dict()
    (opened.folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(config, default=str))
    return opened, theirs


@pytest.fixture(scope="module", params=["plain", "plus", "full"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Opened, Any]:
    return adapted(tmp_path_factory.mktemp("ip"), request.param)


@pytest.mark.medium
@pytest.mark.parametrize(("guidance", "scale"), [(1.0, 1.0), (5.0, 0.6), (5.0, 0.0)])
def test_images_are_diffusers_own(pair: tuple[Opened, Any], guidance: float, scale: float) -> None:
    opened, theirs = pair
    theirs.set_ip_adapter_scale(scale)
    pictures = [picture(1), picture(2, 60, 90), picture(1), picture(3, 40, 32)]
    for shown, count in ((picture(1), 1), (pictures, 4)):
        options = Diffusion(
            steps=3,
            guidance=guidance,
            seed=(1, 2, 3, 4)[:count],
            ip_adapter_image=shown,
            ip_adapter_scale=scale,
            **SIZE,
        )
        for made in opened.model().generate(PROMPTS[:count], options):
            expected = theirs(
                made.prompt,
                ip_adapter_image=pictures[made.prompt_index],
                num_inference_steps=3,
                guidance_scale=guidance,
                generator=generator(made.seed),
                output_type="latent",
                **SIZE,
            ).images[0]
            assert np.abs(made.latents - expected.numpy()).max() <= BOUND * expected.numpy().std(), made.settings
            assert made.settings.ip_adapter_scale == scale


def test_without_an_image_it_is_the_plain_pipeline(pair: tuple[Opened, Any]) -> None:
    opened, plain = pair[0], tiny_pipeline("sd")
    (made,) = opened.model().generate(PROMPTS[0], Diffusion(steps=3, guidance=5.0, seed=1, **SIZE))
    expected = plain(
        made.prompt,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=generator(1),
        output_type="latent",
        **SIZE,
    ).images[0]
    assert np.abs(made.latents - expected.numpy()).max() <= BOUND * expected.numpy().std()


@settings(max_examples=15, deadline=None)
@given(width=st.integers(5, 300), height=st.integers(5, 300), side=st.sampled_from([32, 224]))
def test_pixels_are_those_of_transformers(tmp_path_factory: pytest.TempPathFactory, **sizes: int) -> None:
    width, height, side = sizes["width"], sizes["height"], sizes["side"]
    processor = transformers.CLIPImageProcessor(size=side, crop_size=side)
    folder = tmp_path_factory.mktemp("processor")
    (folder / "config.json").write_text(json.dumps(processor.to_dict(), default=str))
    image = picture(3, width, height)
    wanted = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    found = clip_pixels(image, Config(folder / "config.json"))
    assert found.shape == wanted.shape
    # A level of 255 is 1 / 255 before the division by deviations of at least 0.26.
    assert np.abs(found - wanted).max() <= 1.01 / 255 / 0.26


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ip_adapter_image": [picture(1)] * 3}, "3 images for 2 prompts"),
        ({"ip_adapter_image": "missing.png"}, "there is no file"),
        ({"ip_adapter_image": __file__}, "is no image"),
        ({"ip_adapter_image": [[picture(1)], [picture(1)]]}, "where an image is wanted"),
        ({"ip_adapter_scale": 0.5}, "without ip_adapter_image"),
        ({"ip_adapter_image": picture(1), "ip_adapter_scale": -1.0}, "from 0"),
    ],
)
def test_what_cannot_be_is_refused(pair: tuple[Opened, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        pair[0].model().stream(PROMPTS[:2], Diffusion(steps=2, **changes))


def test_a_bundle_without_an_ip_adapter_says_so(tmp_path: Path) -> None:
    opened = open_parts(tiny_pipeline("sd"), tmp_path)
    with pytest.raises(RequestError, match=r"has no IP-Adapter.*--ip-adapter"):
        opened.model().stream("a", Diffusion(ip_adapter_image=picture(1)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"do_center_crop": False}, r"another way than CLIP does \(do_center_crop"),
        ({"resample": 2}, r"another way than CLIP does \(resample"),
        ({"size": {"height": 224, "width": 224}}, "must say shortest_edge"),
    ],
)
def test_another_preparation_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    opened, _ = adapted(tmp_path, "plain")
    path = opened.folder / "feature_extractor" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(BundleError, match=words):
        opened.model().generate("a", Diffusion(steps=1, ip_adapter_image=picture(1), **SIZE))


def _changed(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    if how == "face":
        return {key: value for key, value in tensors.items() if "image_proj.proj" not in key}
    if how == "lora":
        return {**tensors, "ip_adapter.0.to_q_lora.down.weight": torch.ones(2, 2)}
    if how == "half":
        return {key: value for key, value in tensors.items() if key.startswith("ip_adapter")}
    if how == "more":
        return {**tensors, "ip_adapter.99.to_k_ip.weight": torch.ones(2, 2)}
    return tensors


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("face", "FaceID"),
        ("lora", "FaceID"),
        ("half", "is no IP-Adapter"),
        ("more", "for another model: it has"),
        ("truncated", "damaged"),
        ("pickle", "--allow-pickle"),
        ("unet", "for another model: 1.to_k_ip.weight has shape"),
        ("encoder", "another image encoder"),
    ],
)
def test_what_is_no_adapter_for_a_model_is_refused(tmp_path: Path, how: str, words: str) -> None:
    file = save_ip_adapter("sd", tmp_path)
    save_file(_changed(load_file(file), how), file)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    if how == "pickle":
        file = file.rename(file.with_suffix(".bin"))
    unet = tiny_pipeline("sdxl" if how == "unet" else "sd").unet
    config = transformers.CLIPVisionConfig.from_pretrained(tmp_path / "image_encoder")
    config.projection_dim = 48 if how == "encoder" else config.projection_dim
    encoder = transformers.CLIPVisionModelWithProjection(config)
    with pytest.raises(SourceError, match=words):
        IpAdapter(file, unet, encoder, allow_pickle=False)


def test_a_pickle_is_read_where_that_is_allowed(tmp_path: Path) -> None:
    file = save_ip_adapter("sd", tmp_path)
    tables: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(file).items():
        table, _, name = key.partition(".")
        tables[table][name] = value
    torch.save(tables, file.with_suffix(".bin"))
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image_encoder")
    unet = tiny_pipeline("sd").unet
    one, other = (IpAdapter(path, unet, encoder, allow_pickle=True) for path in (file, file.with_suffix(".bin")))
    first, second = (adapter.applied("unet", {}) for adapter in (one, other))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name].array(), second[name].array()) for name in first)
    assert (one.tokens, one.width) == (4, 32)
    (tmp_path / "bundle").mkdir()
    one.write_facts(tmp_path / "bundle")  # before any part has a folder
    assert json.loads((tmp_path / "bundle" / "image_encoder" / "ip_adapter.json").read_text())["tokens"] == 4


def test_where_it_lies(tmp_path: Path) -> None:
    source = open_pipeline(str(save_pipeline("sd", tmp_path / "sd")))
    file = save_ip_adapter("sd", tmp_path / "ip")
    for place in (file, file.parent):
        found, where = with_image_encoder(source, str(place), allow_pickle=False)
        assert where == file
        assert found.index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
        (part,) = (part for part in found.parts if part.name == "image_encoder")
        assert empty_part(part).config.image_size == 32
    write_processor(found, tmp_path)
    written = json.loads((tmp_path / "feature_extractor" / "preprocessor_config.json").read_text())
    assert written["crop_size"] == {"height": 32, "width": 32}
    flux = open_pipeline(str(save_pipeline("flux", tmp_path / "flux")))
    with pytest.raises(SourceError, match="means nothing to a FluxPipeline"):
        with_image_encoder(flux, str(file), allow_pickle=False)
    with pytest.raises(SourceError, match="is no file or folder"):
        with_image_encoder(source, str(tmp_path / "none"), allow_pickle=False)
    save_ip_adapter("sd", tmp_path / "ip", "plus")
    with pytest.raises(SourceError, match="holds 2 IP-Adapters"):
        with_image_encoder(source, str(file.parent), allow_pickle=False)
    (file.parent / "image_encoder" / "config.json").unlink()
    with pytest.raises(SourceError, match="has no folder image_encoder"):
        with_image_encoder(source, str(file), allow_pickle=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("sd", "plain"), ("sdxl", "plus")])
def test_a_bundle_with_an_ip_adapter(tmp_path: Path, name: str, kind: str) -> None:
    file = save_ip_adapter(name, tmp_path / "ip", kind)
    bundle = export(
        ExportOptions(str(save_pipeline(name, tmp_path / "source")), tmp_path / "out", ip_adapter=str(file))
    ).folder
    assert verify(bundle).images == 1
    with quiet_libraries():
        theirs = tiny_pipeline(name)
        theirs.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
    with load_image(bundle) as model:
        assert [item.passed for item in model.bundle.manifest.evidence] == [True, True]
        for scale in (0.0, 0.7):
            theirs.set_ip_adapter_scale(scale)
            options = Diffusion(
                steps=3, guidance=5.0, seed=(1, 2), ip_adapter_image=picture(1), ip_adapter_scale=scale, **SIZE
            )
            for made in model.generate(PROMPTS[:2], options):
                found = theirs(
                    made.prompt,
                    ip_adapter_image=picture(1),
                    num_inference_steps=3,
                    guidance_scale=5.0,
                    generator=generator(made.seed),
                    **SIZE,
                ).images[0]
                assert np.abs(np.asarray(made.image, int) - np.asarray(found, int)).max() <= 1


@pytest.mark.slow
def test_together_with_a_controlnet_and_a_scaled_lora(tmp_path: Path) -> None:
    file, net = save_ip_adapter("sd", tmp_path / "ip"), save_controlnet("sd", tmp_path / "net")
    adapter = lora(tmp_path / "lora", "kohya")
    options = ExportOptions(
        str(save_pipeline("sd", tmp_path / "source")),
        tmp_path / "out",
        ip_adapter=str(file),
        controlnets=(str(net),),
        adapter=str(adapter),
        keep_adapter=True,
    )
    bundle = export(options).folder
    assert verify(bundle).images == 1
    with quiet_libraries():
        module = diffusers.ControlNetModel.from_pretrained(net)
        theirs = diffusers.StableDiffusionControlNetPipeline.from_pipe(tiny_pipeline("sd"), controlnet=module)
        theirs.load_lora_weights(adapter, adapter_name="it")
        theirs.set_adapters("it", 0.3)
        theirs.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
        theirs.set_ip_adapter_scale(0.5)
    with load_image(bundle) as model:
        scales: dict[str, Any] = {"ip_adapter_scale": 0.5, "adapter_scale": 0.3, "control_scale": 0.7}
        asked = Diffusion(
            steps=3, guidance=5.0, seed=(1, 2), ip_adapter_image=picture(4), control=picture(1), **scales, **SIZE
        )
        for made in model.generate(PROMPTS[:2], asked):
            found = theirs(
                made.prompt,
                image=picture(1),
                ip_adapter_image=picture(4),
                num_inference_steps=3,
                guidance_scale=5.0,
                controlnet_conditioning_scale=0.7,
                generator=generator(made.seed),
                **SIZE,
            ).images[0]
            assert np.abs(np.asarray(made.image, int) - np.asarray(found, int)).max() <= 1
