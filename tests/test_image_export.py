"""Export of text-to-image pipelines: parts, tables, tokenizers, quantization, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tokenizers
import torch
import transformers
from fmedge_converters import part_build
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.graph import DecoderGraph
from fmedge_converters.image_adapter import ImageAdapter
from fmedge_converters.image_facts import image_facts
from fmedge_converters.part_build import PartOptions, build_part
from fmedge_converters.part_evidence import DIFFERENCES, compare
from fmedge_converters.parts import find_kind
from fmedge_converters.parts.encoders import text_encoder
from fmedge_converters.parts.part import Asked
from fmedge_converters.passes.constant_folding import fold_constants
from fmedge_converters.pipeline_files import write_part_files
from fmedge_converters.pipeline_source import empty_part, loaded_part, open_pipeline
from fmedge_converters.targets import TARGETS
from fmedge_runtimes.bundle import ImageBundle, open_image_bundle
from fmedge_runtimes.errors import ExportError, ParityError, SourceError
from fmedge_runtimes.schedulers import read_config
from tiny_diffusers import PIPELINES, PIXEL, save_pipeline, save_three_stages, tiny_pipeline

CPU = TARGETS["cpu"]
STAGES = ("kandinsky_prior", "kandinsky_decoder")
WHOLE = [name for name in PIPELINES if name not in STAGES]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, made once."""
    root, made = tmp_path_factory.mktemp("pipelines"), set()

    def folder(name: str) -> Path:
        if name not in made:
            save_pipeline(name, root / name)
            made.add(name)
        return root / name

    return folder


@pytest.fixture
def copied(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny pipeline's folder, to be damaged."""
    return lambda name: Path(shutil.copytree(folders(name), tmp_path / name))


@pytest.fixture(scope="module")
def traces() -> dict[Any, Any]:
    return {}


@pytest.fixture
def traced_once(traces: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the same part share a trace, which is most of the work for a tiny one."""
    trace = part_build.trace_module

    def trace_once(module: Any, call: Any, dtype: Any, where: str, operators: Any) -> Any:
        key = (where.rsplit("/", 2)[-2:], type(module).__name__, str(call.inputs), str(dtype), operators.opset)
        if str(key) not in traces:
            traces[str(key)] = trace(module, call, dtype, where, operators)
        traced = traces[str(key)]
        return replace(traced, model=traced.model.clone())

    monkeypatch.setattr(part_build, "trace_module", trace_once)


def check_parts(folder: Path, output: Path, scheme: str, *names: str) -> None:
    """Export parts and compare their graphs with the modules as diffusers loads them."""
    source = open_pipeline(str(folder))
    for part in source.parts:
        if not part.is_module or (names and part.name not in names):
            continue
        module = empty_part(part)
        kind = find_kind(part.kind)
        assert kind is not None
        options = PartOptions(CPU, CPU.dtype, (CPU.image_schemes[scheme],), None)
        calls = kind.graphs(module, Asked(part.name, source.pipeline))
        reference = loaded_part(part, torch.float32, allow_pickle=False)
        for graph in build_part(part, module, calls, [output], options, lambda *_: None)[0]:
            found = compare(reference, graph.call, graph.written.graph)
            allowed = DIFFERENCES["float32", scheme]
            assert found.largest < allowed.largest, (part.name, found)
            assert (found.mean > 1e-5) == (scheme != "none"), (part.name, found)


@pytest.mark.parametrize("name", [*WHOLE, PIXEL])
def test_every_part_is_known(folders: Callable[[str], Path], name: str) -> None:
    source = open_pipeline(str(folders(name)))
    modules = {part.name: empty_part(part) for part in source.parts if part.is_module}
    for part in source.parts:
        if part.is_module:
            kind = find_kind(part.kind)
            assert kind is not None
            calls = kind.graphs(modules[part.name], Asked(part.name, source.pipeline))
            assert all(call.inputs for call in calls.values())
            assert all(value.is_meta for value in modules[part.name].parameters())
    facts = image_facts(source, modules)
    assert facts.steps > 0
    assert facts.height == facts.width > 0


FACTS = {
    "sd": (32, 50, 7.5),
    "sdxl": (32, 50, 5.0),
    "lcm": (32, 4, 8.5),
    "sd3": (32, 28, 7.0),
    "flux": (256, 28, 3.5),
    "flux_schnell": (256, 4, 0.0),
    "unclip": (32, 25, 8.0),
    "if": (32, 100, 7.0),
    "upscaler": (32, 75, 9.0),
    "kandinsky": (32, 100, 4.0),
    PIXEL: (32, 10, 1.0),
}


@pytest.mark.parametrize("name", FACTS)
def test_defaults_are_those_of_the_pipeline(folders: Callable[[str], Path], name: str) -> None:
    source = open_pipeline(str(folders(name)))
    facts = image_facts(source, {part.name: empty_part(part) for part in source.parts if part.is_module})
    assert (facts.height, facts.steps, facts.guidance) == FACTS[name]


def test_a_cascade_makes_what_its_last_stage_makes(tmp_path: Path) -> None:
    source = open_pipeline(str(save_three_stages(tmp_path / "if")))
    modules = {part.name: empty_part(part) for part in source.parts if part.is_module}
    facts = image_facts(source, modules)
    assert (facts.height, facts.steps, facts.guidance) == (128, 100, 7.0)
    kind = find_kind(type(modules["unet_3"]))
    assert kind is not None
    (call,) = kind.graphs(modules["unet_3"], Asked("unet_3", source.pipeline)).values()
    label = next(item for item in call.inputs if item.name == "class_labels")
    assert (label.dims, label.integer, label.below) == (("batch",), True, 1000)
    # T5 gets a mask in this pipeline, CLIP does not.
    inputs = {
        name: [item.name for item in text_encoder(modules[name], Asked(name, source.pipeline))[name].inputs]
        for name in ("text_encoder", "text_encoder_3")
    }
    assert inputs == {"text_encoder": ["input_ids", "attention_mask"], "text_encoder_3": ["input_ids"]}


def test_a_pipeline_that_the_runtime_has_not_is_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("upscaler")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionLatentUpscalePipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="is a StableDiffusionLatentUpscalePipeline: the runtime has no such"):
        export(ExportOptions(str(folder), tmp_path / "out", verify="none"))


@pytest.mark.parametrize(
    "name", ["sd", "sdxl", "lcm", "unclip", "kandinsky", "if", "if_super_resolution", "pixart_alpha", "upscaler"]
)
def test_tables_of_schedulers_are_diffusers_own(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    seen = 0
    for part in open_pipeline(str(folders(name))).parts:
        if part.name.endswith("scheduler"):
            write_part_files(part, tmp_path)
            table = np.load(tmp_path / part.name / "alphas_cumprod.npy")
            wanted = part.kind.from_pretrained(part.folder).alphas_cumprod.numpy()
            assert table.dtype == np.float32
            assert np.array_equal(table, wanted)
            seen += 1
    assert seen


def test_a_scheduler_without_betas_has_no_table(folders: Callable[[str], Path], tmp_path: Path) -> None:
    part = next(part for part in open_pipeline(str(folders("sd3"))).parts if part.name == "scheduler")
    write_part_files(part, tmp_path)
    assert [path.name for path in (tmp_path / "scheduler").iterdir()] == ["scheduler_config.json"]


def test_a_scheduler_is_of_the_class_that_the_index_names(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """As diffusers opens it, whatever its own file says."""
    folder = copied("sd")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    (part,) = (part for part in open_pipeline(str(folder)).parts if part.name == "scheduler")
    write_part_files(part, tmp_path)
    assert read_config(tmp_path / "scheduler").class_name == "DDIMScheduler"


def test_a_slow_tokenizer_becomes_a_fast_one(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("sd2")
    slow = folder / "tokenizer"
    with quiet_libraries():
        whole = transformers.CLIPTokenizer.from_pretrained(slow)
    # As the folders of Stable Diffusion have it: vocabulary and merges, and the pad token in a file of its own.
    whole.backend_tokenizer.model.save(str(slow))
    (slow / "tokenizer.json").unlink()
    (slow / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    (slow / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    )
    part = next(part for part in open_pipeline(str(folder)).parts if part.name == "tokenizer")
    output = tmp_path / "out"
    output.mkdir()
    write_part_files(part, output)
    plain = tokenizers.Tokenizer.from_file(str(output / "tokenizer" / "tokenizer.json"))
    assert plain.encode("a small red circle").ids == whole("a small red circle")["input_ids"]
    assert plain.padding is None
    config = json.loads((output / "tokenizer" / "tokenizer_config.json").read_text())
    assert (config["pad_token"], config["model_max_length"]) == ("!", 77)


def test_other_forms_of_weights_are_found(copied: Callable[[str], Path], tmp_path: Path) -> None:
    reference = tiny_pipeline("sd").unet.state_dict()
    with quiet_libraries():
        half = tiny_pipeline("sd").to(torch.float16)
        half.save_pretrained(tmp_path / "half", variant="fp16")
        half.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
        half.save_pretrained(tmp_path / "both", variant="fp16", max_shard_size="300KB")
    from fmedge_converters.checkpoint import Checkpoint, Files

    for name in ("half", "sharded", "both"):
        part = next(part for part in open_pipeline(str(tmp_path / name)).parts if part.name == "unet")
        assert len(list(part.folder.glob("*.safetensors"))) > (name != "half")
        module = empty_part(part)
        with Checkpoint(Files(part.folder), np.dtype(np.float32)) as checkpoint:
            weights = checkpoint.weights(module)
            for key, value in reference.items():
                assert np.array_equal(weights[key].array(), value.half().float().numpy())


INDEX: dict[str, dict[str, Any]] = {
    "null": {"unet": [None, None]},
    "text": {"unet": "UNet2DConditionModel"},
    "unknown": {"unet": ["diffusers", "UNet3DConditionModel"]},
    "controlnet": {"_class_name": "StableDiffusionControlNetPipeline"},
    "scheduler": {"scheduler": ["diffusers", "DEISMultistepScheduler"]},
}
"""What model_index.json says other than it did."""


def _broken(folder: Path, how: str) -> None:
    if how in INDEX:
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), **INDEX[how]}))
    elif how == "schedule":
        (folder / "scheduler" / "scheduler_config.json").unlink()
    elif how == "vocabulary":
        (folder / "tokenizer" / "tokenizer.json").unlink()
    else:
        _break_part(folder, how)


def _break_part(folder: Path, how: str) -> None:
    unet, index = folder / "unet", folder / "model_index.json"
    weights = unet / "diffusion_pytorch_model.safetensors"
    if how == "missing":
        shutil.rmtree(unet)
    elif how == "class":
        index.write_text(index.read_text().replace("UNet2DConditionModel", "UNet9000"))
    elif how == "code":
        text = json.loads(index.read_text())
        text["unet"] = ["my_unet", "MyUNet"]
        index.write_text(json.dumps(text))
        (folder / "my_unet.py").write_text("raise RuntimeError")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "none":
        weights.unlink()
    elif how == "pickle":
        state = diffusers.UNet2DConditionModel.from_pretrained(unet).state_dict()
        weights.unlink()
        torch.save(state, unet / "diffusion_pytorch_model.bin")
    elif how == "other":
        config = json.loads((unet / "config.json").read_text())
        (unet / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 48}))
    elif how == "json":
        (unet / "config.json").write_text("{")
    elif how == "index":
        index.write_text("[]")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "no folder unet"),
        ("class", "UNet9000"),
        ("code", "never run"),
        ("truncated", "damaged"),
        ("none", "holds no weights"),
        ("pickle", "--allow-pickle"),
        ("other", "config.json asks for"),
        ("json", "is not JSON"),
        ("index", "no table of settings"),
        ("unknown", "UNet3DConditionModel"),
        ("null", "names no unet, which a StableDiffusionPipeline needs"),
        ("text", "names no unet"),
        ("controlnet", "names no controlnet"),
        ("scheduler", "DEISMultistepScheduler, which is not supported"),
        ("schedule", "scheduler_config.json is missing"),
        ("vocabulary", "has none of tokenizer.json, vocab.json"),
    ],
)
def test_what_is_damaged_is_refused(
    copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, words: str
) -> None:
    folder = copied("sd")
    _broken(folder, how)
    # The part that comes before it, and the trace, which must not be reached.
    for name in ("text_encoder",):
        text = json.loads((folder / "model_index.json").read_text())
        if isinstance(text, dict):
            text[name] = [None, None]
            (folder / "model_index.json").write_text(json.dumps(text))
    monkeypatch.setattr(part_build, "trace_module", lambda *_: pytest.fail("it was traced"))
    with pytest.raises(SourceError, match=words):
        export(ExportOptions(str(folder), tmp_path / "out", verify="none"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 64},
        {"text": Path("x")},
        {"layout": "genai"},
        {"cache": "int8"},
        {"verify": "graph"},
        {"quantize": "int3"},
        {"block_size": 32},
        {"adapter_scale": 0.5},
    ],
)
def test_options_of_decoders_are_refused(
    folders: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ExportError):
        export(ExportOptions(str(folders(PIXEL)), tmp_path / "out", **changes))


def test_two_stages_are_one_pipeline(folders: Callable[[str], Path]) -> None:
    prior, decoder = (str(folders(name)) for name in STAGES)
    both, combined = open_pipeline(decoder, prior=prior), open_pipeline(str(folders("kandinsky")))
    assert both.index == combined.index
    assert both.pipeline == combined.pipeline == "KandinskyV22CombinedPipeline"
    named = [{(part.name, part.kind) for part in source.parts} for source in (both, combined)]
    assert named[0] == named[1]
    for source, first in ((decoder, None), (prior, None), (decoder, decoder), (str(folders("sd")), prior)):
        with pytest.raises(SourceError, match=r"prior|Prior"):
            open_pipeline(source, prior=first)


def lora(folder: Path, kind: str) -> Path:
    """A LoRA for the tiny UNet and text encoder, as diffusers or kohya's trainer writes it."""
    random = torch.Generator().manual_seed(5)
    pipeline = tiny_pipeline("sd")
    state = {}
    for part, module in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        for name, layer in module.named_modules():
            if not name.endswith(("to_q", "to_out.0", "conv1", "q_proj", "out_proj")):
                continue
            shape = layer.weight.shape
            a = torch.randn((4, *shape[1:]), generator=random) * 0.1
            b = torch.randn((shape[0], 4, *([1] * (len(shape) - 2))), generator=random) * 0.1
            if kind == "diffusers":
                state |= {f"{part}.{name}.lora_A.weight": a, f"{part}.{name}.lora_B.weight": b}
                continue
            stem = "lora_unet_" if part == "unet" else "lora_te_text_model_"
            key = stem + name.removeprefix("text_model.").replace(".", "_")
            state |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(2.0)}
    folder.mkdir()
    from safetensors.torch import save_file

    save_file(state, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_a_lora_is_merged_as_diffusers_does(folders: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    adapter = lora(tmp_path / kind, kind)
    with quiet_libraries():
        fused = tiny_pipeline("sd")
        fused.load_lora_weights(adapter)
        fused.fuse_lora(lora_scale=0.7)
        fused.unload_lora_weights()
    source = open_pipeline(str(folders("sd")))
    unet = next(part for part in source.parts if part.name == "unet")
    updates = ImageAdapter(adapter, source.pipeline, 0.7, ["unet", "text_encoder", "vae"], empty_part(unet))
    changed = 0
    for part in source.parts:
        if part.name not in ("unet", "text_encoder"):
            continue
        from fmedge_converters.checkpoint import Checkpoint, Files

        wanted = getattr(fused, part.name).state_dict()
        base = getattr(tiny_pipeline("sd"), part.name).state_dict()
        with Checkpoint(Files(part.folder), np.dtype(np.float32)) as checkpoint:
            for name, weight in updates.applied(part.name, checkpoint.weights(empty_part(part))).items():
                assert np.allclose(weight.array(), wanted[name].numpy(), atol=1e-6), name
                changed += not torch.equal(base[name], wanted[name])
    assert changed > 20


def test_a_lora_of_another_model_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = lora(tmp_path / "lora", "diffusers")
    with pytest.raises(SourceError, match="no such part"):
        ImageAdapter(adapter, "StableDiffusionPipeline", 1.0, ["transformer"], None)
    updates = ImageAdapter(adapter, "StableDiffusionPipeline", 1.0, ["unet", "text_encoder"], None)
    with pytest.raises(SourceError, match="another model"):
        updates.applied("unet", {})


def test_a_repository_of_the_hub_is_fetched_piece_by_piece(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, snapshot = Path(shutil.copytree(folders("sd"), tmp_path / "remote")), tmp_path / "0123abc"
    for name in ("unet/diffusion_pytorch_model.fp16", "unet/diffusion_pytorch_model.non_ema", "v1-5"):
        shutil.copyfile(remote / "unet/diffusion_pytorch_model.safetensors", remote / f"{name}.safetensors")
    (remote / "unet" / "code.py").write_text("raise RuntimeError")

    def download(_source: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: object) -> str:
        assert revision in (None, snapshot.name)
        for path in remote.rglob("*"):
            name = path.relative_to(remote).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_pipeline("owner/name")
    assert (source.id, source.revision) == ("owner/name", "0123abc")
    fetched = {path.name for path in snapshot.rglob("*.safetensors")}
    assert fetched == {"diffusion_pytorch_model.safetensors", "model.safetensors"}
    assert not list(snapshot.rglob("*.py"))


def test_a_number_that_is_almost_zero_is_kept() -> None:
    tiny, zero = (ir.tensor(np.float32(number), name=name) for number, name in ((1e-15, "tiny"), (0.0, "zero")))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
    constants = [ir.Value(name=item.name, const_value=item, shape=item.shape) for item in (tiny, zero)]
    kept = ir.node("Add", [x, constants[0]])
    dropped = ir.node("Add", [kept.outputs[0], constants[1]])
    kept.outputs[0].shape = dropped.outputs[0].shape = ir.Shape(["n"])
    graph = ir.Graph([x], [dropped.outputs[0]], nodes=[kept, dropped], initializers=constants, opset_imports={"": 20})
    fold_constants(DecoderGraph(ir.Model(graph, ir_version=10), {}), 0)
    assert [node.op_type for node in graph] == ["Add"]


# What follows traces.


def test_a_text_encoder_of_any_length(folders: Callable[[str], Path], tmp_path: Path, traced_once: None) -> None:
    check_parts(folders(PIXEL), tmp_path, "none", "text_encoder")


@pytest.mark.medium
@pytest.mark.parametrize("scheme", ["none", "fp16", "bf16", "int8", "int4"])
def test_precisions_of_a_transformer(
    folders: Callable[[str], Path], tmp_path: Path, traced_once: None, scheme: str
) -> None:
    check_parts(folders(PIXEL), tmp_path, scheme, "transformer")


@pytest.mark.medium
def test_a_second_export_gives_the_same_bytes(
    pixel: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, first = pixel
    capsys.readouterr()
    second = export(ExportOptions(str(source), tmp_path / "second"))
    assert isinstance(second, ImageBundle)
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second.folder)
    ]
    assert contents[0] == contents[1]
    assert capsys.readouterr() == ("", "")
    manifest = open_image_bundle(second.folder).manifest
    assert [(item.name, item.passed) for item in manifest.evidence] == [("parts", True), ("image", True)]
    assert not manifest.forced
    assert set(manifest.graphs) == {"text_encoder", "transformer"}
    assert manifest.graphs["transformer"].file == "transformer/model.onnx"
    inputs = {item.name: (item.dtype, item.shape) for item in manifest.graphs["transformer"].inputs}
    assert inputs["hidden_states"] == ("float32", ("batch", 3, "height", "width"))
    assert manifest.image.pipeline == "PixelDiffusionPipeline"
    assert not (second.folder / "pipeline.py").exists()


@pytest.mark.medium
def test_a_graph_that_differs_is_not_written(
    folders: Callable[[str], Path], tmp_path: Path, traced_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = part_build.Checkpoint.weights

    def wrong(self: Any, model: Any) -> Any:
        weights = check(self, model)
        name = (
            next(name for name in weights if name.endswith("final_layer.linear.bias"))
            if hasattr(model, "blocks")
            else ""
        )
        if name:
            read = weights[name].read
            weights[name] = replace(weights[name], read=lambda start, stop: read(start, stop) + np.float32(0.01))
        return weights

    monkeypatch.setattr(part_build.Checkpoint, "weights", wrong)
    options = ExportOptions(str(folders(PIXEL)), tmp_path / "out")
    with pytest.raises(ParityError, match="transformer_largest"):
        export(options)
    assert not list(tmp_path.iterdir())
    assert export(replace(options, force=True)).manifest.forced


@pytest.mark.slow
def test_a_unet_of_any_size(folders: Callable[[str], Path], tmp_path: Path) -> None:
    check_parts(folders("sdxl"), tmp_path, "none", "unet", "text_encoder_2", "vae")
    model = onnx.load(tmp_path / "unet" / "model.onnx", load_external_data=False)
    counts = {
        name: sum(node.op_type == name for node in model.graph.node) for name in ("MultiHeadAttention", "Softmax")
    }
    assert counts["MultiHeadAttention"] > 0
    assert counts["Softmax"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WHOLE if name not in ("sdxl", "flux_schnell")])
def test_every_pipeline(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    bundle = export(ExportOptions(str(folders(name)), tmp_path / "out"))
    assert bundle.manifest.evidence[0].passed
    assert open_image_bundle(tmp_path / "out").manifest == bundle.manifest
    assert isinstance(bundle, ImageBundle)
