"""Bundles on the device "tensorrt" as a whole: verified, planned, checked, and exported ones with text and images.

Over the doubles of TensorRT and CUDA, whose engines ONNX Runtime computes: it proves the way through our code, and
nothing of TensorRT's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_bundle import CAPACITY, HEADS, SIZE, doubles, engine_bundle, with_goldens
from fake_cuda import FakeCuda
from fmedge_converters.engines.bundle_engines import EngineBuildOptions, build_engines
from fmedge_converters.engines.served import Served
from fmedge_converters.preflight.check import CheckOptions, check
from fmedge_runtimes.bundle import open_bundle
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.engine_file import read_engine
from fmedge_runtimes.errors import ParityError
from fmedge_runtimes.load import load
from fmedge_runtimes.manifest import write_manifest
from fmedge_runtimes.plan import plan
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.verify import verify
from PIL import Image


def test_levels_follow_what_was_built_and_run(tmp_path: Path) -> None:
    folder = with_goldens(engine_bundle(tmp_path / "bundle")).folder
    options = CheckOptions(up_to="rules", target="10.16")
    inventory = "tensorrt-10.16.1.11"
    assert check(folder, options).level == "rules passed"
    with doubles(inventory=inventory):
        list(build_engines(folder, EngineBuildOptions()))
        assert check(folder, options).level == "built"
        assert verify(folder).tokens == 24
        assert check(folder, options).level == "ran on this device with matching output"
        assert read_engine(folder / "decoder.onnx", "tensorrt").facts.ran == "24 golden tokens"
        # Another version's engine says nothing of this one.
        assert check(folder, CheckOptions(up_to="rules", target="11")).level == "rules passed"
    with doubles(FakeCuda(name="Thor"), inventory=inventory):
        assert check(folder, options).level == "ran on a GPU"
    assert check(folder, options).level == "ran on a GPU"
    assert check(folder, options).passed


def test_an_engine_that_computes_something_else_has_not_run(tmp_path: Path) -> None:
    bundle = with_goldens(engine_bundle(tmp_path / "bundle"))
    golden = bundle.manifest.golden[0]
    wrong = golden.steps[3].model_copy(update={"token": (golden.steps[3].token + 1) % 20, "margin": 9.0})
    steps = (*golden.steps[:3], wrong, *golden.steps[4:])
    changed = (golden.model_copy(update={"steps": steps}), *bundle.manifest.golden[1:])
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"golden": changed}))
    with doubles():
        list(build_engines(bundle.folder, EngineBuildOptions()))
        with pytest.raises(ParityError):
            verify(bundle.folder)
    assert read_engine(bundle.folder / "decoder.onnx", "tensorrt").facts.ran is None


def test_a_plan_takes_the_engine_s_own_figures_and_a_static_cache_is_a_cache(tmp_path: Path) -> None:
    folder = engine_bundle(tmp_path / "bundle").folder
    before = plan(open_bundle(folder), 3, 16)
    assert before.cache == 3 * 2 * HEADS * CAPACITY * SIZE * 4 and before.states == 0
    with doubles():
        list(build_engines(folder, EngineBuildOptions()))
    engine = read_engine(folder / "decoder.onnx", "tensorrt").facts
    after = plan(open_bundle(folder), 3, 16)
    assert after.working - engine.device_memory == 3 * 24 * 8
    files = open_bundle(folder).manifest.files
    graph = sum(facts.bytes for name, facts in files.items() if name.startswith("decoder.onnx"))
    assert after.weights == before.weights - graph + engine.bytes
    assert after.cache == before.cache


@pytest.mark.medium
def test_an_exported_decoder_generates_what_it_does_on_the_cpu(llama: Path, tmp_path: Path) -> None:
    from fmedge_converters.export import export
    from fmedge_converters.export_options import ExportOptions

    made = export(
        ExportOptions(str(llama), tmp_path / "bundle", target="tensorrt-compat", verify="none", quantize="int4")
    )
    prompts = [list(range(5, 5 + length)) for length in (3, 30, 11, 70)]
    sampling = [Sampling(max_new_tokens=length, ignore_eos=True) for length in (40, 4, 25, 12)]
    # The same steps on both: fp16 rounds by the number of rows.
    with load(made.folder, device="cpu", max_batch=3) as model:
        expected = [item.tokens for item in model.generate(prompts, sampling)]
    with doubles(FakeCuda(integrated=True)):
        list(build_engines(made.folder, EngineBuildOptions(served=Served(rows=3))))
        with load(made.folder) as model:
            assert [item.tokens for item in model.generate(prompts, sampling)] == expected
            assert model.options.max_batch == 3
    assert check(made.folder, CheckOptions(up_to="rules")).passed


@pytest.mark.slow
def test_an_exported_pipeline_makes_the_images_that_it_makes_on_the_cpu(tmp_path: Path) -> None:
    """With a ControlNet, an IP-Adapter and a LoRA of any scale; TensorRT-RTX builds all of it."""
    from fmedge_converters import rtx
    from fmedge_converters.export import export
    from fmedge_converters.export_options import ExportOptions
    from test_image_export import lora
    from tiny_diffusers import save_controlnet, save_ip_adapter, save_pipeline

    source = save_pipeline("sd", tmp_path / "model")
    asked = ExportOptions(
        str(source),
        tmp_path / "bundle",
        target="tensorrt",
        controlnets=(str(save_controlnet("sd", tmp_path / "net")),),
        ip_adapter=str(save_ip_adapter("sd", tmp_path / "ip")),
        adapter=str(lora(tmp_path / "lora", "diffusers")),
        keep_adapter=True,
    )
    made = export(asked)
    assert [item.passed for item in made.manifest.evidence] == [True, True]  # graphs, and diffusers' images
    for facts in made.manifest.graphs.values() if rtx.is_available() else ():
        built = rtx.build(made.file(facts.file), facts.profiles)
        assert built.problems == () and built.engine is not None, facts.file
    shown = Image.fromarray(np.indices((40, 24)).sum(0).astype(np.uint8)).convert("RGB")
    every = [
        Diffusion(steps=4, seed=3),
        Diffusion(steps=2, seed=3, control=(shown,), control_start=0.5, adapter_scale=0.3),
        Diffusion(steps=2, seed=3, control=(shown,), guess_mode=True, ip_adapter_image=shown, n=5),
        Diffusion(steps=2, seed=3, image=shown, preview_every=1),
    ]
    with load(made.folder, device="cpu") as model:
        expected = [[np.asarray(one.image) for one in model.generate("a red circle", each)] for each in every]
    cuda = FakeCuda()
    with doubles(cuda) as library:
        list(build_engines(made.folder, EngineBuildOptions()))
        with load(made.folder) as model:
            for each, wanted in zip(every, expected, strict=True):
                found = model.generate("a red circle", each)
                assert all(
                    np.array_equal(np.asarray(one.image), other) for one, other in zip(found, wanted, strict=True)
                )
        assert {"sample", "timestep", "encoder_hidden_states"} < set.union(
            *(set(shapes) for _, shapes in library.executed)
        )
        # The steps of the denoiser are alike, so they are captured.
        assert cuda.launches >= 2
    assert check(made.folder, CheckOptions("10.16", up_to="rules")).passed
