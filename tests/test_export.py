"""Exports as a user meets them: refusals, evidence, what is on the disk afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fmedge_converters import export as export_module
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_runtimes.bundle import open_bundle
from fmedge_runtimes.errors import BundleError, ExportError, ParityError, SourceError
from fmedge_runtimes.load import load
from fmedge_runtimes.manifest import Evidence, read_manifest
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.verify import verify
from models import add_tokenizer, greedy, make_model
from safetensors.torch import load_file, save_file


def options(source: Path | str, tmp_path: Path, **changes: object) -> ExportOptions:
    return ExportOptions(str(source), tmp_path / "bundle", **{"verify": "none", **changes})


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def leftovers(tmp_path: Path) -> list[str]:
    """What an export left beside the source."""
    return [path.name for path in tmp_path.iterdir() if path.name != "model"]


def test_the_evidence_is_in_the_manifest_and_the_golden_continuations_replay(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    graph, full = manifest.evidence
    assert (graph.name, graph.passed, full.name, full.passed) == ("graph", True, "full", True)
    assert graph.figures["equal"] == graph.figures["tokens"] == 74
    assert full.figures["greedy_equal"] == full.figures["greedy_tokens"] == 8 * 64
    assert full.figures["mean_kl"] < 1e-8
    result = verify(bundle)
    assert (result.tokens, result.near_ties) == (64, 0)


def test_a_golden_continuation_that_is_not_reproduced_is_an_error(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    manifest = json.loads((other / "fmedge.json").read_text())
    step = manifest["golden"][1]["steps"][5]
    step["token"], step["margin"] = (step["token"] + 1) % 320, 3.0
    (other / "fmedge.json").write_text(json.dumps(manifest))
    with pytest.raises(ParityError, match="golden continuation 1, step 5"):
        verify(other)


def test_text_prompts_and_chat(bundle: Path, llama: Path) -> None:
    with load(bundle) as model:
        (completion,) = model.generate("The list", Sampling(max_new_tokens=12, ignore_eos=True))
        assert model.tokenizer is not None
        prompt = model.tokenizer.encode("The list")
        assert list(completion.tokens) == greedy(llama, prompt, 12)
        assert completion.text == model.tokenizer.decode(completion.tokens)
        from transformers import AutoTokenizer

        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a tuple?"}]
        reference = AutoTokenizer.from_pretrained(llama).apply_chat_template(messages, add_generation_prompt=True)
        assert model.chat_prompt(messages) == list(reference["input_ids"])


@pytest.mark.usefixtures("traced_once")
def test_the_end_of_sequence_token_ends_a_row_and_not_its_neighbours(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    prompts = [list(range(5, 5 + length)) for length in (3, 9, 20)]
    plain = [greedy(folder, prompt, 16) for prompt in prompts]
    # An ordinary token of the first row's continuation becomes the end of sequence.
    eos = plain[0][3]
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [eos]}))
    bundle = export(options(folder, tmp_path)).folder
    with load(bundle) as model:
        found = model.generate(prompts, Sampling(max_new_tokens=16))
    for completion, row in zip(found, plain, strict=True):
        cut = row.index(eos) + 1 if eos in row else len(row)
        assert list(completion.tokens) == row[:cut]
        assert completion.finish_reason == ("eos" if eos in row else "length")
    assert found[0].finish_reason == "eos"


@pytest.mark.usefixtures("traced_once")
@pytest.mark.medium
@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("cpu", "int8"),
        ("cpu", "int4"),
        ("cuda", "none"),
        ("cuda", "int4"),
        ("cpu", "int4-gptq"),
        pytest.param("cuda", "w8a8", marks=pytest.mark.slow),
    ],
)
def test_quantized_bundles_pass_their_verification(target: str, scheme: str, llama: Path, tmp_path: Path) -> None:
    made = export(options(llama, tmp_path, target=target, quantize=scheme, verify="full"))
    full = made.manifest.evidence[-1]
    assert full.passed
    assert 0 < float(full.figures["mean_kl"]) < 0.35
    assert made.manifest.text.cache_dtype == ("float16" if target == "cuda" else "float32")
    result = verify(made.folder, "cpu")
    assert result.tokens == 64


@pytest.mark.usefixtures("traced_once")
@pytest.mark.medium
def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        for scheme in ("none", "int8", "int4"):
            folder = make_model(tmp_path / f"model-{tied}", tie_word_embeddings=tied, vocab_size=4096)
            made = export(ExportOptions(str(folder), tmp_path / f"{tied}-{scheme}", quantize=scheme, verify="none"))
            sizes[tied, scheme] = made.manifest.files["decoder.onnx.data"].bytes
    assert sizes[False, "none"] - sizes[True, "none"] == 4096 * 64 * 4
    assert sizes[False, "int8"] - sizes[True, "int8"] >= 4096 * 64
    assert sizes[False, "int4"] - sizes[True, "int4"] >= 4096 * 64


@pytest.mark.usefixtures("traced_once")
@pytest.mark.medium
def test_an_existing_output_is_refused_unless_forced(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="exists"):
        export(options(llama, tmp_path))
    with pytest.raises(ExportError, match="not a bundle"):
        export(options(llama, tmp_path, force=True))
    assert (tmp_path / "bundle" / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(tmp_path / "bundle")
    export(options(llama, tmp_path))
    with pytest.raises(ExportError, match="--force"):
        export(options(llama, tmp_path))
    export(options(llama, tmp_path, force=True, context=64))
    assert read_manifest(tmp_path / "bundle").text.context == 64
    assert leftovers(tmp_path) == ["bundle"]


@pytest.mark.usefixtures("traced_once")
def test_a_failed_verification_writes_nothing_unless_forced(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Evidence(name="graph", what="a comparison", passed=False, figures={"tokens": 74, "equal": 3})
    monkeypatch.setattr(export_module, "graph_evidence", lambda *_: failed)
    with pytest.raises(ParityError, match="equal 3"):
        export(options(llama, tmp_path, verify="graph"))
    assert leftovers(tmp_path) == []
    made = export(options(llama, tmp_path, verify="graph", force=True))
    assert made.manifest.forced
    assert not made.manifest.evidence[0].passed


@pytest.mark.usefixtures("traced_once")
@pytest.mark.medium
def test_the_comparison_notices_a_wrong_weight(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmedge_converters import build

    def swapped(traced: object, weights: dict[str, object]) -> object:
        first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        return bind(traced, {**weights, first: weights[second], second: weights[first]})

    bind = build.bind
    monkeypatch.setattr(build, "bind", swapped)
    with pytest.raises(ParityError, match="full"):
        monkeypatch.setattr(
            export_module, "graph_evidence", lambda *_: Evidence(name="graph", what="", passed=True, figures={})
        )
        export(options(llama, tmp_path, verify="full"))
    assert leftovers(tmp_path) == []


def test_refusals_of_folders(llama: Path, tmp_path: Path) -> None:
    cases: dict[str, str] = {
        "nothing-here": "not a folder, and the hub cannot be reached|neither a folder that exists nor",
        "owner/name/extra": "neither a folder that exists nor a hub id",
    }
    for source, words in cases.items():
        with pytest.raises(SourceError, match=words):
            export(options(source, tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SourceError, match=r"no config\.json"):
        export(options(empty, tmp_path))
    (empty / "config.json").write_text("{not json")
    with pytest.raises(SourceError, match="not JSON"):
        export(options(empty, tmp_path))
    for config, words in (
        ({"model_type": "bert"}, "pickle|not a causal|no weights"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "my-own", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "never runs"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}, "quantized by hqq"),
        ({"model_type": "llama"}, "holds no weights"),
    ):
        (empty / "config.json").write_text(json.dumps(config))
        with pytest.raises(SourceError, match=words):
            export(options(empty, tmp_path))
    (empty / "pytorch_model.bin").write_bytes(b"not loaded")
    with pytest.raises(SourceError, match="pickle"):
        export(options(empty, tmp_path))
    (empty / "config.json").unlink()
    (empty / "model_index.json").write_text("{}")
    with pytest.raises(SourceError, match="diffusers"):
        export(options(empty, tmp_path))
    with pytest.raises(ExportError, match="there is no target tpu"):
        export(options(llama, tmp_path, target="tpu"))
    with pytest.raises(ExportError, match="tensorrt has no quantization bf16: "):
        export(options(llama, tmp_path, target="tensorrt", quantize="bf16"))
    with pytest.raises(ExportError, match="no quantization int3"):
        export(options(llama, tmp_path, quantize="int3"))
    with pytest.raises(ExportError, match="256 positions"):
        export(options(llama, tmp_path, context=100000))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_size", "64", "expected int, got str"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_hidden_layers", 1, r"holds model\.layers\.1, but config\.json asks for 1"),
        ("num_hidden_layers", 9, "lacks 63 of the model's 84 tensors"),
        ("num_key_value_heads", 3, r"k_proj\.weight has shape"),
        ("rope_parameters", {"rope_type": "no-such", "rope_theta": 1e4}, "KeyError: 'no-such'"),
        ("hidden_act", "no-such", "no-such"),
    ],
)
def test_damaged_configurations(
    field: str, value: object, words: str, llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(llama, tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(SourceError, match=words) as raised:
        export(options(folder, tmp_path))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("generation_config.json", '{"do_sample": true, "temperature": "hot"}', "could not convert string to float"),
        ("generation_config.json", '{"do_sample": true, "temperature": -1}', "temperature is -1"),
        ("generation_config.json", '{"repetition_penalty": -3}', "repetition_penalty is -3"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("generation_config.json", '{"eos_token_id": 1.5}', r"eos_token_id is 1\.5"),
        ("chat_template.jinja", "{% for %}", "the chat template has a syntax error in line 1"),
        ("tokenizer.json", "{}", "cannot load the tokenizer: KeyError: 'added_tokens'"),
    ],
)
def test_damaged_files_beside_the_weights(name: str, content: str, words: str, llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(SourceError, match=words) as raised:
        export(options(folder, tmp_path))
    assert "\n" not in str(raised.value)
    assert leftovers(tmp_path) == []


def test_outputs_that_cannot_be(llama: Path, bundle: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(bundle, tmp_path / "kept"))
    folder = Path(shutil.copytree(llama, kept / "source"))
    for output, source, words in (
        (tmp_path / ("x" * 300), llama, "File name too long"),
        (tmp_path / "new" / "..", llama, "give its own name"),
        (kept, folder, "lies in .*which --force would replace"),
    ):
        with pytest.raises(ExportError, match=words):
            export(ExportOptions(str(source), output, verify="none", force=output == kept))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize("model_type", ["axk2", "xlnet"])
def test_a_past_that_fmedge_cannot_carry_is_refused(model_type: str, tmp_path: Path) -> None:
    from architectures import evaluate

    outcome = evaluate(model_type, tmp_path)
    assert outcome.kind == "refused"
    assert "cannot be" in outcome.detail
    assert leftovers(tmp_path) == []


@pytest.mark.medium
def test_damaged_checkpoints(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(SourceError, match=rf"lacks 1 of its {len(shards)} shards, {shards[1].name}"):
        export(options(folder, tmp_path))
    shards[1].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(SourceError, match="damaged"):
        export(options(folder, tmp_path))
    shards[1].write_bytes(kept)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(SourceError, match="not an index of shards"):
        export(options(folder, tmp_path))
    assert leftovers(tmp_path) == []


@pytest.mark.medium
def test_weights_that_do_not_belong_to_the_configuration(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=f"lacks 1 of the model's .* tensors, {name}"):
        export(options(folder, tmp_path))
    save_file({**weights, name: weights[name][:64].contiguous()}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=rf"{name} has shape \[64, 64\]"):
        export(options(folder, tmp_path))
    save_file({**weights, name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(SourceError, match="stored as int8"):
        export(options(folder, tmp_path))
    assert leftovers(tmp_path) == []


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = add_tokenizer(make_model(tmp_path / "model", vocab_size=270), size=320)
    with pytest.raises(SourceError, match="belongs to another model"):
        export(options(folder, tmp_path))
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("traced_once")
@pytest.mark.medium
def test_values_beyond_fp16_are_refused_for_cuda(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 4] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="beyond fp16"):
        export(options(folder, tmp_path, target="cuda"))
    assert leftovers(tmp_path) == []


def test_no_space_left(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ExportError, match="GB free"):
        export(options(llama, tmp_path))


@pytest.mark.usefixtures("traced_once")
def test_a_full_disk_while_writing_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from fmedge_converters import build

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_graph", full)
    with pytest.raises(ExportError, match="no space is left"):
        export(options(llama, tmp_path))
    assert leftovers(tmp_path) == []


@pytest.mark.medium
def test_a_killed_export_leaves_nothing_that_loads_and_runs_again(llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fmedge", "export", str(llama), str(tmp_path / "bundle"), "--verify", "none"]
    # Killed while it traces, when only the tokenizer is written, and while it writes the weights.
    for written in ("tokenizer.json", "decoder.onnx.data"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not any(tmp_path.glob(f"*/{written}")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert any(tmp_path.iterdir())
        for folder in tmp_path.iterdir():
            if folder.name == "bundle":
                open_bundle(folder)  # it was complete before the kill
                shutil.rmtree(folder)
            else:
                with pytest.raises(BundleError):
                    open_bundle(folder)
    assert export(options(llama, tmp_path)).manifest.source.architecture == "llama"
    assert leftovers(tmp_path) == ["bundle"]


def test_nothing_of_this_machine_is_in_a_bundle(bundle: Path) -> None:
    here = str(Path(__file__).parent.parent).encode()
    for path in bundle.iterdir():
        assert here not in path.read_bytes(), path.name


def test_options_that_would_be_ignored_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--block-size means nothing"):
        export(options(llama, tmp_path, block_size=64))
    with pytest.raises(ExportError, match="--text is for"):
        export(options(llama, tmp_path, text=Path("x.txt"), verify="graph"))
    with pytest.raises(ExportError, match="--context is 1"):
        export(options(llama, tmp_path, context=1))


@pytest.mark.medium
def test_tied_weights_with_two_values_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"ties (lm_head|model\.embed_tokens)\.weight"):
        export(options(folder, tmp_path))


def test_the_proof_of_the_architecture_sees_a_wrong_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmedge_converters import attention_interface
    from fmedge_converters.evidence import graph_evidence
    from fmedge_converters.targets import TARGETS
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 9999}
    config = AutoConfig.for_model("mistral", num_hidden_layers=8, intermediate_size=128, sliding_window=4096, **sizes)
    look = attention_interface._look

    def wrong(recording: Any, layer: int, *others: Any) -> None:
        look(recording, layer, *others)
        cache = recording.attended[layer]
        recording.attended[layer] = replace(cache, window=cache.window and cache.window + 1)

    monkeypatch.setattr(attention_interface, "_look", wrong)
    evidence = graph_evidence(config, TARGETS["cpu"], lambda *_: None)
    assert not evidence.passed


@pytest.mark.medium
def test_two_exports_of_one_source_are_equal_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    made = [tmp_path / name for name in "ab"]
    export(ExportOptions(str(llama), made[0], quantize="int4", verify="none"))
    # Another process, in which sets have another order.
    command = [sys.executable, "-m", "fmedge", "export", str(llama), str(made[1]), "--quantize", "int4"]
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    subprocess.run([*command, "--verify", "none"], check=True, capture_output=True, env=environment, timeout=300)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in made)
    assert first.keys() == second.keys()
    for name, content in first.items():
        assert content == second[name], name
