"""A LoRA whose scale is an input: equal to diffusers' set_adapters at every scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.image_adapter import ImageAdapter
from fmedge_converters.kept_adapter import SCALE, KeptAdapter
from fmedge_converters.parts import find_kind
from fmedge_converters.parts.part import Asked, Call
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.errors import ExportError, RequestError, SourceError
from fmedge_runtimes.load import load_image
from fmedge_runtimes.parts import Part
from fmedge_runtimes.verify import verify
from image_models import stable_diffusion as torch_pipeline
from image_models import write_folder
from test_image_export import lora
from tiny_diffusers import save_pipeline, tiny_pipeline
from torch_session import TorchSession, _specs

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PARTS = ("unet", "text_encoder", "vae")


def calls_of(module: Any, part: str) -> Call:
    kind = find_kind(type(module))
    assert kind is not None
    return kind.graphs(module, Asked(part, "StableDiffusionPipeline"))[part]


def inputs_of(call: Call) -> dict[str, torch.Tensor]:
    """Random inputs."""
    sizes = {"batch": 2, "sequence": 7, "height": 10, "width": 6}
    generator = torch.Generator().manual_seed(3)
    found = {}
    for item in call.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in item.dims]
        found[item.name] = (
            torch.randint(0, item.below, shape, generator=generator)
            if item.integer
            else torch.randn(shape, generator=generator)
        )
    return found


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_every_scale_is_diffusers_own(tmp_path: Path, kind: str) -> None:
    """Linear layers, convolutions, the text encoder; at 0 the LoRA is not there, and at 1 it is what merging gives."""
    folder = lora(tmp_path / kind, kind)
    with quiet_libraries():
        theirs = tiny_pipeline("sd")
        theirs.load_lora_weights(folder, adapter_name="it")
    ours, plain, merged = (tiny_pipeline("sd") for _ in range(3))
    whole = ImageAdapter(folder, "StableDiffusionPipeline", 1.0, PARTS, ours.unet)
    adapter = KeptAdapter(whole, 0.25)
    for part in ("unet", "text_encoder"):
        module = getattr(ours, part)
        call = calls_of(module, part)
        adapter.attach(part, module)
        whole.merge(part, getattr(merged, part))
        scaled = adapter.call(part, call)
        assert [item.name for item in scaled.inputs] == [*(item.name for item in call.inputs), SCALE]
        inputs = inputs_of(call)
        main = "out_sample" if part == "unet" else "last_hidden_state"

        def run(scale: float | None, call: Call = call, scaled: Call = scaled, **found: Any) -> torch.Tensor:
            with torch.no_grad():
                if scale is None:
                    return call.run(found["module"], found["inputs"])[found["main"]]
                given = {**found["inputs"], SCALE: torch.tensor([scale])}
                return scaled.run(found["module"], given)[found["main"]]

        known: Mapping[str, Any] = {"inputs": inputs, "main": main}
        for scale in (0.0, 0.25, 1.0, 1.7):
            with quiet_libraries():
                theirs.set_adapters("it", scale)
            wanted = run(None, module=getattr(theirs, part), **known)
            assert torch.allclose(run(scale, module=module, **known), wanted, atol=2e-5), (part, scale)
        base = run(None, module=getattr(plain, part), **known)
        assert torch.equal(run(0.0, module=module, **known), base)
        assert (run(1.0, module=module, **known) - base).abs().max() > 1e-3
        assert torch.allclose(
            run(1.0, module=module, **known), run(None, module=getattr(merged, part), **known), atol=2e-5
        )
        # Without a scale, as diffusers calls it in the comparison of images.
        usual = run(None, module=module, **known)
        assert torch.equal(usual, run(0.25, module=module, **known))
    assert adapter.call("vae", call) is call


def test_what_cannot_be_scaled_is_refused(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", "diffusers")
    adapter = KeptAdapter(ImageAdapter(folder, "StableDiffusionPipeline", 1.0, PARTS, None), 1.0)
    with pytest.raises(SourceError, match="another model"):
        adapter.applied("unet", {})
    with pytest.raises(SourceError, match="no linear layer"):
        adapter.attach("unet", torch.nn.Module())
    with pytest.raises(SourceError, match="cannot be scaled"):
        adapter.check_used("unet", ["conv_in.weight"])


@pytest.mark.parametrize(
    ("changes", "words"), [({"keep_adapter": True}, "--keep-adapter is for --adapter, and there is none")]
)
def test_options_without_a_lora_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    source = save_pipeline("sd", tmp_path / "source")
    with pytest.raises(ExportError, match=words):
        export(ExportOptions(str(source), tmp_path / "out", **changes))


def test_inputs_that_hold_for_a_request_reach_the_graphs_that_take_them() -> None:
    seen: list[float] = []

    def forward(sample: torch.Tensor, adapter_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(float(adapter_scale))
        return {"out": sample}

    standing = {SCALE: np.array([0.3], np.float32)}
    inputs, outputs = _specs(sample=("b",), adapter_scale=(1,)), _specs(out=("b",))
    part = Part("unet", TorchSession(forward, inputs, outputs), standing)
    part.run({"sample": np.zeros(2, np.float32)})
    standing[SCALE] = np.array([0.5], np.float32)
    part.run({"sample": np.zeros(2, np.float32)})
    assert seen == pytest.approx([0.3, 0.5])
    plain = TorchSession(lambda sample: {"out": sample}, _specs(sample=("b",)), outputs)
    Part("vae", plain, standing).run({"sample": np.zeros(2, np.float32)})


def test_a_bundle_without_such_a_lora_says_so(tmp_path: Path) -> None:
    opened = write_folder(torch_pipeline(), tmp_path)
    with pytest.raises(RequestError, match=r"no LoRA that can be scaled.*--keep-adapter"):
        opened.model().stream("a", Diffusion(adapter_scale=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_bundle_with_a_lora_beside_its_weights(tmp_path: Path, quantize: str) -> None:
    source, folder = save_pipeline("sd", tmp_path / "source"), lora(tmp_path / "lora", "kohya")
    options = ExportOptions(
        str(source), tmp_path / "out", quantize=quantize, adapter=str(folder), adapter_scale=0.5, keep_adapter=True
    )
    bundle = export(options).folder
    assert verify(bundle).images == 1
    with quiet_libraries():
        theirs = tiny_pipeline("sd")
        theirs.load_lora_weights(folder, adapter_name="it")
    with load_image(bundle) as model:
        assert model.bundle.manifest.image.adapter_scale == 0.5
        for scale in (None, 0.0, 1.5):
            with quiet_libraries():
                theirs.set_adapters("it", 0.5 if scale is None else scale)
            asked = Diffusion(steps=3, guidance=4.0, seed=(7, 8), adapter_scale=scale)
            for made in model.generate(["a small red circle", "a cat in the rain"], asked):
                found = theirs(
                    made.prompt,
                    num_inference_steps=3,
                    guidance_scale=4.0,
                    generator=torch.Generator().manual_seed(made.seed),
                ).images[0]
                difference = np.abs(np.asarray(made.image, int) - np.asarray(found, int)).max()
                assert difference <= (1 if quantize == "none" else 25)
