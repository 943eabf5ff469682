"""GGUF files: what is read is what llama.cpp's own package reads, under the names and in the order of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import empty_model, quiet_libraries
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.gguf_config import gguf_config
from fmedge_converters.source import open_source
from fmedge_converters.weight import Weight
from fmedge_runtimes.errors import SourceError
from fmedge_runtimes.load import load
from fmedge_runtimes.sampling import Sampling
from gguf_files import write_gguf
from models import add_tokenizer, make_model
from safetensors.torch import load_file, save_file
from test_quantized_formats import restored
from transformers import AutoModelForCausalLM, PreTrainedModel

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16},
    "phi3": {"pad_token_id": 0},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}
"""Model types that transformers reads from GGUF at these sizes."""


def reference(file: Path) -> PreTrainedModel:
    with quiet_libraries():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


def weights(file: Path, dtype: type = np.float32) -> dict[str, Weight]:
    source = open_source(str(file))
    model = empty_model(source.config, torch.float32)
    return Checkpoint(source.files, np.dtype(dtype)).weights(model)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_transformers_reads(kind: str, tmp_path: Path) -> None:
    folder = add_tokenizer(make_model(tmp_path / "model", kind, **KINDS[kind]))
    file = write_gguf(folder, tmp_path / "model.gguf", "Q4_0", forms={"token_embd.weight": "Q8_0"})
    wanted = {name: value.detach().numpy() for name, value in reference(file).named_parameters(remove_duplicate=False)}
    found = weights(file)
    assert set(found) == set(wanted)
    matrices = 0
    for name, weight in found.items():
        assert np.array_equal(weight.array(), wanted[name]), name
        assert np.array_equal(weight.read(1, 3), wanted[name][1:3]), name
        if weight.packed is not None:
            matrices += 1
            assert np.array_equal(restored(weight.packed, wanted[name].shape), wanted[name]), name
    assert matrices == sum(value.ndim == 2 for value in wanted.values())


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "qwen3", "gpt2"])
def test_sizes_that_transformers_leaves_out_are_read(kind: str, tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128} if kind == "gpt2" else {}
    moe = {**MOE, "shared_expert_intermediate_size": 32} if kind == "qwen2_moe" else MOE
    folder = make_model(tmp_path / "model", kind, **(moe if "moe" in kind else sizes))
    found = weights(write_gguf(folder, tmp_path / "model.gguf", "F32"))
    plain = Checkpoint(Files(folder), np.dtype(np.float32)).weights(
        empty_model(open_source(str(folder)).config, torch.float32)
    )
    assert set(found) == set(plain)
    for name, weight in found.items():
        assert np.array_equal(weight.array(), plain[name].array()), name


def test_experts_keep_their_codes(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3_moe", **MOE)
    found = weights(write_gguf(folder, tmp_path / "model.gguf", "Q4_0"))
    with Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint:
        plain = checkpoint.weights(empty_model(open_source(str(folder)).config, torch.float32))
        experts = [name for name in found if ".experts." in name]
        assert len(experts) == 4
        for name in experts:
            rows = plain[name].array()
            rows = rows.reshape(-1, rows.shape[-1])
            wanted = gguf.quants.dequantize(
                gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0
            )
            packed = found[name].packed
            assert packed is not None
            assert np.array_equal(found[name].array().reshape(rows.shape), wanted), name
            assert np.array_equal(restored(packed, rows.shape), wanted), name
            assert np.array_equal(restored(packed, rows.shape, 40, 150), wanted[40:150]), name


@pytest.mark.parametrize(
    "form", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "Q6_K", "Q4_K"]
)
def test_every_type_is_read_as_its_package_reads_it(form: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[form]
    random = np.random.default_rng(0)
    values = random.standard_normal((24, 512)).astype(np.float32)
    try:
        data = gguf.quants.quantize(values, kind)
    except NotImplementedError:  # made of random bytes; their scales are small numbers in fp16
        data = random.integers(0, 60, gguf.quants.quant_shape_to_byte_shape(values.shape, kind)).astype(np.uint8)
    wanted = gguf.quants.dequantize(data, kind)
    with Checkpoint(
        Files(tmp_path, gguf=write_tensor(tmp_path / "model.gguf", data, form)), np.dtype(np.float32)
    ) as checkpoint:
        weight = checkpoint.tensors["output.weight"]
        assert np.array_equal(weight.array(), wanted)
        assert np.array_equal(weight.read(5, 11), wanted[5:11])
        assert (weight.packed is not None) == (form in ("Q4_0", "Q8_0"))
        if weight.packed is not None:
            assert np.array_equal(restored(weight.packed, wanted.shape), wanted)
    with Checkpoint(Files(tmp_path, gguf=tmp_path / "model.gguf"), np.dtype(np.float16)) as checkpoint:
        assert np.array_equal(checkpoint.tensors["output.weight"].array(), wanted.astype(np.float16))


def write_tensor(file: Path, data: np.ndarray, form: str) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("output.weight", data, raw_dtype=gguf.GGMLQuantizationType[form])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("exact", [True, False])
def test_q4_1_keeps_its_codes_where_zero_points_stand_for_its_minima(exact: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    scales = np.float16(2.0) ** random.integers(-6, -3, (24, 4)).astype(np.float16)
    least = (scales * -random.integers(0, 16, (24, 4))).astype(np.float16)
    if not exact:
        least[23, 3] = np.nextafter(least[23, 3], np.float16(1))
    halves = [value[..., None].view(np.uint8).reshape(24, 4, 2) for value in (scales, least)]
    codes = random.integers(0, 256, (24, 4, 16)).astype(np.uint8)
    data = np.concatenate([*halves, codes], -1).reshape(24, -1)
    wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1)
    with Checkpoint(
        Files(tmp_path, gguf=write_tensor(tmp_path / "model.gguf", data, "Q4_1")), np.dtype(np.float32)
    ) as checkpoint:
        weight = checkpoint.tensors["output.weight"]
        assert np.array_equal(weight.array(), wanted)
        assert (weight.packed is not None) == exact
        if weight.packed is not None:
            assert np.array_equal(restored(weight.packed, (24, 128)), wanted)


def test_norms_are_exact_in_fp16_too(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gemma2", sliding_window=16)
    file = write_gguf(folder, tmp_path / "model.gguf", "F16")
    name = "model.norm.weight"
    exact = reference(file).get_parameter(name).detach().numpy()
    assert np.array_equal(weights(file, np.float16)[name].array(), exact.astype(np.float16))


def test_divisors_of_the_rotary_frequencies_are_those_of_llama_3(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = make_model(tmp_path / "model", rope_parameters=scaling)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), torch.device("cpu"))
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    divisors = (plain / wanted).numpy()
    assert divisors.max() == pytest.approx(8.0)
    config = gguf_config(write_gguf(folder, tmp_path / "model.gguf", "Q8_0", extra={"rope_freqs.weight": divisors}))
    found, attention = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert attention == 1.0


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
    ],
)
def test_scaled_rotary_frequencies(metadata: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = gguf_config(write_gguf(folder, tmp_path / "model.gguf", "Q8_0", metadata=metadata))
    assert {key: config.rope_parameters[key] for key in wanted} == wanted


@pytest.mark.medium
@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_a_gguf_file_becomes_a_bundle(quantize: str, tmp_path: Path) -> None:
    folder = add_tokenizer(make_model(tmp_path / "model", vocab_size=352, eos_token_id=0), chat_template=CHAT_TEMPLATE)
    forms = {"token_embd.weight": "Q8_0", "output.weight": "Q8_0", "blk.1.attn_v.weight": "Q4_1"}
    home = tmp_path / "gguf"
    home.mkdir()
    file = write_gguf(folder, home / "tiny.Q4_0.gguf", "Q4_0", forms=forms)
    verify = "full" if quantize == "none" else "none"
    bundle = export(ExportOptions(str(home), tmp_path / "bundle", quantize=quantize, verify=verify))
    manifest = bundle.manifest
    kept = manifest.evidence[0]
    assert [item.name for item in manifest.evidence] == ["weights", "graph", "full"][: 3 if verify == "full" else 1]
    assert all(item.passed for item in manifest.evidence)
    assert (manifest.source.id, manifest.source.licence) == ("tiny.Q4_0.gguf", "apache-2.0")
    assert manifest.source.quantization == "GGUF Q4_0 Q4_1 Q8_0"
    assert kept.figures == ({"matrices": 11, "kept": 10} if quantize == "int4" else {"matrices": 10, "kept": 0})
    assert manifest.text.eos_token_ids == (0,)
    with load(bundle.folder) as model, torch.no_grad():
        assert model.tokenizer is not None
        prompt = model.tokenizer.encode("The list type")
        messages = [{"role": "user", "content": "What is a tuple?"}]
        assert model.chat_prompt(messages)
        (completion,) = model.generate([prompt], Sampling(max_new_tokens=16, ignore_eos=True))
        ids = torch.tensor([prompt])
        theirs = reference(file).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        if quantize == "none":
            assert list(completion.tokens) == theirs[0, len(prompt) :].tolist()


def test_the_tokenizer_of_a_file_is_the_one_it_was_written_from(tmp_path: Path) -> None:
    from fmedge_converters.tokenizer_files import write_tokenizer
    from tokenizers import Tokenizer

    folder = add_tokenizer(make_model(tmp_path / "model"), chat_template=CHAT_TEMPLATE)
    file = write_gguf(folder, tmp_path / "model.gguf", "Q8_0")
    facts = write_tokenizer(tmp_path, tmp_path, file)
    assert facts is not None
    assert facts.special_tokens["eos_token"] == "<|end|>"
    ours, original = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (tmp_path, folder))
    text = "The list type,  def fib(n):\n    return <|end|> Größe"
    assert ours.encode(text).ids == original.encode(text).ids
    without = write_gguf(make_model(tmp_path / "plain"), tmp_path / "plain.gguf", "Q8_0")
    assert write_tokenizer(tmp_path, tmp_path, without) is None


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    home = tmp_path / "files"
    home.mkdir()
    whole = write_gguf(folder, home / "a.gguf", "Q4_0").read_bytes()

    def refused(words: str, source: Path = home / "a.gguf") -> None:
        with pytest.raises(SourceError, match=words) as raised:
            weights(source)
        assert "\n" not in str(raised.value)

    for size in (3, 100, len(whole) // 2, len(whole) - 1):
        (home / "a.gguf").write_bytes(whole[:size])
        refused("damaged or is not GGUF")
    (home / "a.gguf").write_bytes(b"PK" + whole[2:])
    refused("damaged or is not GGUF")
    (home / "a.gguf").write_bytes(whole)
    write_gguf(folder, home / "b.gguf", "Q4_0")
    refused("holds 2 GGUF files; give one of them", home)
    write_gguf(folder, home / "a.gguf", "Q4_0", extra={"blk.0.attn_q.bias": np.zeros(64, np.float32)})
    refused(r"blk\.0\.attn_q\.bias has no place in transformers' llama")
    writer = gguf.GGUFWriter(home / "a.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused("one of 3 parts")
    writer = gguf.GGUFWriter(home / "a.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused("transformers cannot read the GGUF architecture rwkv7")
    write_gguf(folder, home / "a.gguf", "Q4_0", metadata={"rope.scaling.type": "longrope"})
    refused("scaled by longrope, for which the file lacks the factors")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    file = write_gguf(folder, tmp_path / "model.gguf", "Q4_0")
    with pytest.raises(SourceError, match=r"lacks 1 of the model's 21 tensors, model\.layers\.1\.mlp\.up_proj\.weight"):
        weights(file)
