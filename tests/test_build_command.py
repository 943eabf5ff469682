"""`fmedge build`, over the doubles of TensorRT and CUDA: what it asks of them, and what it leaves behind when it fails.

It proves nothing about what TensorRT makes of a graph.
"""

from __future__ import annotations

import _thread
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_bundle import doubles, engine_bundle
from fake_cuda import FakeCuda
from fmedge_converters.engines.build import LEAST_WORKSPACE, MOST_WORKSPACE, workspace_of
from fmedge_converters.engines.bundle_engines import EngineBuildOptions, build_engines
from fmedge_converters.engines.failure import CURES, explain
from fmedge_converters.engines.served import Served, fit_decoder, fit_part
from fmedge_runtimes.engine_file import read_engine
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.load import load
from fmedge_runtimes.manifest import GraphFacts, ImageFacts, ProfileFacts, TensorFacts
from fmedge_runtimes.sampling import Sampling
from typer.testing import CliRunner

from fmedge.cli import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return engine_bundle(tmp_path / "bundle").folder


def fmedge(*arguments):
    return CliRunner().invoke(app, ["build", *map(str, arguments)])


def build(folder: Path, **options):
    return list(build_engines(folder, EngineBuildOptions(**options)))


def test_an_engine_is_built_once_and_told_of(folder: Path) -> None:
    with doubles() as library:
        done = fmedge(folder, "--workspace", "256MiB", "--optimization-level", 2, "--version-compatible", "--json")
        assert done.exit_code == 0, done.output
        (record,) = map(json.loads, done.output.splitlines())
        weights = (folder / "decoder.onnx.data").stat().st_size
        assert library.limits == {"WORKSPACE": 256 << 20, "TACTIC_DRAM": (512 << 20) + weights}
        facts = read_engine(folder / "decoder.onnx", "tensorrt").facts
        assert record["engine"] == facts.model_dump(mode="json")
        assert (facts.version, facts.capability, facts.device) == ("10.3.0", "8.7", "Orin")
        assert facts.options.optimization_level == 2 and facts.options.version_compatible
        plan = json.loads((folder / "engines" / "decoder.tensorrt.engine").read_text())
        assert plan["flags"] == ["VERSION_COMPATIBLE"]  # and no TF32: fp32 is meant
        assert [sorted(profile) for profile in plan["profiles"]] == [sorted(plan["profiles"][0])] * 2
        assert plan["profiles"][1]["input_ids"] == [[1, 1], [1, 1], [4, 1]]
        again = fmedge(folder, "--optimization-level", 2, "--version-compatible")
        assert "is there already" in again.output
        assert "built in" in fmedge(folder, "--optimization-level", 3).output
        assert "built in" in fmedge(folder, "--optimization-level", 3, "--rows", 2).output
    with doubles(FakeCuda(name="Thor", capability=(11, 0))):
        assert "built in" in fmedge(folder, "--optimization-level", 3, "--rows", 2).output
        assert read_engine(folder / "decoder.onnx", "tensorrt").facts.device == "Thor"


def test_timings_are_kept_and_those_of_others_are_not_used(folder: Path) -> None:
    with doubles() as library:
        build(folder)
        build(folder, force=True)
        assert library.timing == [b"", b"timed"]
        (folder / "engines" / "timing.tensorrt.cache").write_bytes(b"another GPU's")
        build(folder, force=True)
        assert library.timing[2:] == [b""]


def left(folder: Path) -> set[str]:
    return {path.name for path in (folder / "engines").rglob("*") if path.is_file()}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What is started in the background by a shell ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_a_build_and_leaves_nothing_half(folder: Path, interruptible: None) -> None:
    with doubles() as library:
        build(folder)
        whole = {name: (folder / "engines" / name).read_bytes() for name in left(folder) if "cache" not in name}
        library.steps = 200
        seen = []

        def interrupt(step: int) -> None:
            seen.append(step)
            if step == 3:
                _thread.interrupt_main()
            if step > 3:
                time.sleep(0.05)

        library.on_step = interrupt
        with pytest.raises(KeyboardInterrupt):
            build(folder, force=True)
        assert 3 < len(seen) < 200
        # The builder has come to its end: nothing goes on behind the back of who pressed Ctrl-C.
        stopped = len(seen)
        time.sleep(0.15)
        assert len(seen) == stopped
        assert whole == {name: (folder / "engines" / name).read_bytes() for name in left(folder) if "cache" not in name}
        with load(folder) as model:
            assert model.generate("abc", Sampling(max_new_tokens=2))[0].tokens


@pytest.mark.parametrize(
    ("message", "cure"),
    [
        ("Could not find any implementation for node {ForeignNode[/layers.0/attn]}.", "--workspace"),
        ("Tactic Device request: 4229MB Available: 2658MB. Device memory is insufficient to use tactic.", "add swap"),
        ("NvMapMemAllocInternalTagged: 1075072515 error 12", "memory is short"),
        ("composite_op->is_decomposable() failed ... no dedicated kernel", "fp16"),
        ("something that nobody has seen", "--debug"),
    ],
)
def test_a_build_that_fails_says_what_tensorrt_says_and_what_helps(folder: Path, message: str, cure: str) -> None:
    with doubles() as library:
        library.fail = (message,)
        with pytest.raises(BackendError) as raised:
            build(folder)
    assert message.rstrip(".") in str(raised.value) and cure in str(raised.value)
    assert left(folder) == {"timing.tensorrt.cache"}


def test_a_graph_that_the_parser_refuses_names_the_node(folder: Path) -> None:
    with doubles() as library:
        library.refuse = (("TensorScatter", "node7", "No importer registered for op: TensorScatter"),)
        with pytest.raises(BackendError, match=r"parsing .* failed.*TensorScatter node7.*fmedge check") as raised:
            build(folder)
    assert "node7" in str(raised.value)
    assert not (folder / "engines").exists() or left(folder) == set()


def test_explanations_name_the_layer_and_every_cure_is_reachable() -> None:
    words = explain("building", ["10: Could not find any implementation for node {ForeignNode[/mlp/Add]}."])
    assert "at {ForeignNode[/mlp/Add]}" in words
    assert len({cure.advice for cure in CURES}) == len(CURES)
    assert "drop_caches" in explain("building", ["NvMapMemHandleAlloc: error 0"])


def test_what_a_version_lacks_is_said(folder: Path) -> None:
    words = r"10\.3\.0 has no --hardware same-compute-capability"
    with doubles(inventory="tensorrt-10.3.0"), pytest.raises(BackendError, match=words):
        build(folder, hardware="same-compute-capability")
    with doubles(inventory="tensorrt-10.16.1.11"):
        build(folder, hardware="same-compute-capability")
    with doubles(FakeCuda(name="Another"), inventory="tensorrt-10.16.1.11"), load(folder) as model:
        assert model.options.max_batch == 4


def test_options_that_cannot_be_are_refused_before_anything_is_built(folder: Path) -> None:
    with doubles() as library:
        for options, words in (
            ({"served": Served(sizes=((512, 512),))}, "--size and --batch are for bundles that make images"),
            ({"parts": ("unet",)}, "has no graph unet; it has decoder"),
            ({"device": "cuda"}, "of which no engines are built"),
        ):
            with pytest.raises(RequestError, match=words):
                build(folder, **options)
        assert library.calls == []
    with doubles(), pytest.raises(RequestError, match="pieces of 256 at most"):
        build(folder, served=Served(tokens=9999))
    for wrong in ({"rows": 0}, {"tokens": 8}, {"batch": 0}):
        with pytest.raises(RequestError):
            Served(**wrong)
    with pytest.raises(RequestError, match="goes from 0 to 5"):
        EngineBuildOptions(optimization_level=6)
    assert fmedge(folder, "--size", "big").exit_code == 2


def test_a_bundle_for_the_cpu_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = engine_bundle(tmp_path / "bundle", target="cpu").folder
    with pytest.raises(RequestError, match="give a bundle of --target tensorrt"):
        build(folder)
    graph = GraphFacts(file="decoder.onnx", inputs=(), outputs=())
    with pytest.raises(RequestError, match="was not exported for TensorRT"):
        fit_decoder(graph, Served())


def test_profiles_grow_with_what_is_to_be_served() -> None:
    prefill = ProfileFacts(name="prefill", axes={"batch": (1, 1, 1), "sequence": (1, 256, 256), "logits": (1, 1, 256)})
    decode = ProfileFacts(name="decode", axes={"batch": (1, 1, 8), "sequence": (1, 1, 1), "logits": (1, 1, 8)})
    graph = GraphFacts(file="decoder.onnx", inputs=(), outputs=(), profiles=(prefill, decode))
    made = fit_decoder(graph, Served(rows=3, tokens=64))
    assert made[0].axes == {"batch": (1, 1, 1), "sequence": (1, 64, 64), "logits": (1, 1, 64)}
    assert made[1].axes == {"batch": (1, 1, 3), "sequence": (1, 1, 1), "logits": (1, 1, 3)}
    assert fit_decoder(graph, Served()) == (prefill, decode)
    names = ("sample", "timestep", "encoder_hidden_states")
    inputs = tuple(TensorFacts(name=name, dtype="float16", shape=()) for name in names)
    axes = {
        "batch": (1, 2, 8),
        "height": (32, 64, 128),
        "width": (32, 64, 128),
        "sequence": (1, 77, 1024),
        "steps": (1, 1, 8),
        "residuals": (1, 2, 8),
        "height/4": (1, 16, 32),
    }
    unet = GraphFacts(file="unet", inputs=inputs, outputs=(), profiles=(ProfileFacts(name="default", axes=axes),))
    image = ImageFacts(pipeline="P", height=512, width=512, steps=4, guidance=7.5)
    (made,) = fit_part(unet, image, Served(sizes=((512, 768), (1024, 512)), batch=3, tokens=231))
    assert made.axes == {
        "batch": (1, 6, 6),
        "height": (64, 96, 96),
        "width": (64, 64, 128),
        "sequence": (1, 77, 231),
        "steps": (1, 1, 6),
        "residuals": (1, 6, 6),  # of ControlNets: one row, and one place, where none is at work
        "height/4": (1, 24, 24),
    }
    # A decoder gets as many images as it is given together, and tiles of those that are large.
    latents = (TensorFacts(name="latent_sample", dtype="float16", shape=()),)
    axes = {"batch": (1, 1, 1), "height": (1, 64, 128), "width": (1, 64, 128)}
    decoder = GraphFacts(file="d", inputs=latents, outputs=(), profiles=(ProfileFacts(name="default", axes=axes),))
    (small,) = fit_part(decoder, image, Served(sizes=((512, 512),), batch=8))
    assert small.axes == {"batch": (1, 4, 4), "height": (1, 64, 64), "width": (1, 64, 64)}
    (large,) = fit_part(decoder, image, Served(sizes=((512, 512), (2048, 1024))))
    assert large.axes == {"batch": (1, 4, 4), "height": (1, 64, 128), "width": (1, 64, 128)}
    with pytest.raises(RequestError, match="510x512 cannot be made by this bundle: width goes in steps of 8 pixels"):
        fit_part(unet, image, Served(sizes=((510, 512),)))


def test_the_workspace_leaves_room_for_the_weights() -> None:
    assert workspace_of(8 << 30, 1 << 30) == 3 << 30
    assert workspace_of(1 << 30, 1 << 30) == LEAST_WORKSPACE
    assert workspace_of(1 << 40, 1 << 30) == MOST_WORKSPACE


def test_building_needs_no_torch() -> None:
    code = "import fmedge_converters.engines.bundle_engines, fmedge.commands.build, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "transformers", "onnx", "onnx_ir", "tensorrt", "cuda", "onnxruntime"}
