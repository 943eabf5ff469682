"""Export of ControlNets: found, checked against the pipeline, and what their graphs compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from fmedge_converters import part_build
from fmedge_converters.controlnet_source import check_controlnets, with_controlnets
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.image_facts import image_facts
from fmedge_converters.part_build import PartOptions, build_part
from fmedge_converters.part_evidence import compare
from fmedge_converters.parts import find_kind
from fmedge_converters.parts.part import Asked
from fmedge_converters.pipeline_source import PipelineSource, empty_part, loaded_part, open_pipeline
from fmedge_converters.targets import TARGETS
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import ExportError, SourceError
from fmedge_runtimes.load import load_image
from fmedge_runtimes.verify import verify
from PIL import Image
from tiny_diffusers import save_controlnet, save_pipeline, tiny_pipeline

CPU = TARGETS["cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, or of a ControlNet for one ("sd/net"), made once."""
    root = tmp_path_factory.mktemp("control")

    @cache
    def folder(name: str) -> Path:
        if name.endswith("/net"):
            return save_controlnet(name.removesuffix("/net"), root / name.replace("/", "-"))
        return save_pipeline(name, root / name)

    return folder


def modules_of(source: PipelineSource) -> dict[str, torch.nn.Module]:
    return {part.name: empty_part(part) for part in source.parts if part.is_module}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd", "StableDiffusionControlNetPipeline"), ("inpaint", "StableDiffusionControlNetInpaintPipeline")],
)
def test_a_controlnet_makes_another_pipeline(folders: Callable[[str], Path], name: str, kind: str) -> None:
    plain = open_pipeline(str(folders(name)))
    one = with_controlnets(plain, [str(folders("sd/net"))])
    assert (one.pipeline, one.index["_class_name"]) == (kind, kind)
    assert one.index["controlnet"] == ["diffusers", "ControlNetModel"]
    check_controlnets(one, modules_of(one))
    two = with_controlnets(one, [str(folders("sd/net"))])
    assert [part.name for part in two.parts if "control" in part.name] == ["controlnet", "controlnet_1"]
    assert two.index["controlnet"] == ["diffusers", "MultiControlNetModel"]
    facts = [image_facts(source, modules_of(source)) for source in (plain, two)]
    assert (facts[0].steps, facts[0].height) == (facts[1].steps, facts[1].height)


def test_folders_of_diffusers_have_one_or_several(folders: Callable[[str], Path], tmp_path: Path) -> None:
    with quiet_libraries():
        net = diffusers.ControlNetModel.from_pretrained(folders("sd/net"))
        for name, nets in (("one", net), ("two", [net, net])):
            kind = diffusers.StableDiffusionControlNetPipeline
            kind.from_pipe(tiny_pipeline("sd"), controlnet=nets).save_pretrained(tmp_path / name)
            source = open_pipeline(str(tmp_path / name))
            found = [part.name for part in source.parts if part.kind is diffusers.ControlNetModel]
            assert found == ["controlnet", "controlnet_1"][: len(found)]
            assert len(found) == (1 if name == "one" else 2)


@pytest.mark.parametrize(
    ("name", "net", "words"),
    [
        ("sdxl", "sd/net", "ControlNet for another model: cross_attention_dim: 32"),
        ("sd", "sdxl/net", "ControlNet for another model"),
        ("lcm", "sd/net", "means nothing to a LatentConsistencyModelPipeline"),
        ("sd3", "sd/net", "means nothing to a StableDiffusion3Pipeline"),
        ("sd", "missing", "not a folder|cannot be reached|neither"),
    ],
)
def test_another_models_is_refused_before_a_trace(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, net: str, words: str
) -> None:
    monkeypatch.setattr(part_build, "trace_module", lambda *_: pytest.fail("it was traced"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = str(folders(net)) if net.endswith("/net") else str(tmp_path / "a" / net)
    with pytest.raises(SourceError, match=words):
        export(ExportOptions(str(folders(name)), tmp_path / "out", controlnets=(given,), verify="none"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conditioning_embedding_out_channels": (8, 8, 16)}, "pixels of a latent's side: 4"),
        ({"conditioning_channels": 1}, "conditioning_channels is 1"),
        ({"in_channels": 5}, "in_channels: 5"),
        ({"layers_per_block": 2}, "channels of its residuals"),
        ({"_class_name": "T2IAdapter"}, "is a T2IAdapter; --controlnet takes a ControlNetModel"),
        ({"_class_name": "ControlNetUnionModel"}, "is a ControlNetUnionModel"),
    ],
)
def test_a_controlnet_of_another_form_is_refused(
    folders: Callable[[str], Path], tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    config = json.loads((folders("sd/net") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SourceError, match=words):
        source = with_controlnets(open_pipeline(str(folders("sd"))), [str(tmp_path)])
        check_controlnets(source, modules_of(source))


def test_a_file_and_a_decoder_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "canny.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SourceError, match="is a file"):
        with_controlnets(open_pipeline(str(folders("sd"))), [str(file)])
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="--controlnet is for pipelines that make images"):
        export(ExportOptions(str(tmp_path / "decoder"), tmp_path / "out", controlnets=("x",)))


@pytest.mark.medium
def test_the_graphs_of_a_controlnet(folders: Callable[[str], Path], tmp_path: Path) -> None:
    config = folders("sd/net") / "config.json"
    config.write_text(config.read_text().replace('"rgb"', '"bgr"'))  # channels in another order
    (part,) = (
        part
        for part in with_controlnets(open_pipeline(str(folders("sd"))), [str(folders("sd/net"))]).parts
        if part.name == "controlnet"
    )
    kind = find_kind(part.kind)
    assert kind is not None
    module = empty_part(part)
    options = PartOptions(CPU, CPU.dtype, (CPU.image_schemes["none"],), None)
    calls = kind.graphs(module, Asked(part.name, "StableDiffusionControlNetPipeline"))
    reference = loaded_part(part, torch.float32, allow_pickle=False)
    (graphs,) = build_part(part, module, calls, [tmp_path], options, lambda *_: None)
    assert [graph.name for graph in graphs] == ["controlnet", "controlnet_embedding"]
    for graph in graphs:
        found = compare(reference, graph.call, graph.written.graph)
        assert found.largest < 1e-5, graph.name


@pytest.mark.slow
def test_a_bundle_with_two_controlnets(folders: Callable[[str], Path], tmp_path: Path) -> None:
    nets = tuple(str(save_controlnet("sd", tmp_path / f"net{seed}", seed)) for seed in (1, 2))
    bundle = export(ExportOptions(str(folders("sd")), tmp_path / "out", controlnets=nets)).folder
    checked = verify(bundle)
    assert checked.images == 1
    with quiet_libraries():
        modules = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
        theirs = diffusers.StableDiffusionControlNetPipeline.from_pipe(tiny_pipeline("sd"), controlnet=modules)
    theirs.set_progress_bar_config(disable=True)
    shown = [Image.fromarray(np.indices((40, 24)).sum(0).astype(np.uint8) * seed).convert("RGB") for seed in (2, 4)]
    with load_image(bundle) as model:
        assert [item.passed for item in model.bundle.manifest.evidence] == [True, True]
        assert model.bundle.manifest.golden[0].controls == ("golden/control_0.png", "golden/control_1.png")
        for guidance in (1.0, 5.0):
            options = Diffusion(steps=3, guidance=guidance, seed=(7, 8), control=shown)
            for made in model.generate(["a small red circle", "a cat in the rain"], options):
                found = theirs(
                    made.prompt,
                    image=shown,
                    num_inference_steps=3,
                    guidance_scale=guidance,
                    generator=torch.Generator().manual_seed(made.seed),
                ).images[0]
                assert np.abs(np.asarray(made.image, int) - np.asarray(found, int)).max() <= 1
