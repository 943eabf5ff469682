"""Bundles with `--layout genai`: what is in them, and that onnxruntime-genai computes with them what we do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmedge_converters.decoder import TracedDecoder
from fmedge_converters.evidence import layout_evidence
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_converters.layouts import genai
from fmedge_converters.layouts.layout import Finished
from fmedge_converters.recording import LayerCache, LayerState
from fmedge_converters.targets import TARGETS
from fmedge_runtimes.bundle import Bundle, open_bundle
from fmedge_runtimes.errors import ExportError
from fmedge_runtimes.load import load
from fmedge_runtimes.manifest import SamplingFacts
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.verify import verify
from models import SIZES, greedy, make_model
from transformers import AutoConfig, GenerationConfig

pytestmark = pytest.mark.usefixtures("traced_once")
STEPS = 16
RAGGED, EVEN = (3, 40, 7, 23), (9, 9, 9)
"""Lengths of prompts."""


def made(source: Path, tmp_path: Path, **changes: Any) -> Bundle:
    options = {"verify": "none", "layout": "genai", "context": 256, **changes}
    return export(ExportOptions(str(source), tmp_path / "bundle", **options))


def lay_out(bundle: Path, folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of a bundle of the tiny Llama with the layout's files; `changes` are facts of it."""
    opened = open_bundle(Path(shutil.copytree(bundle, folder)))
    config = AutoConfig.for_model("llama", **SIZES, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    facts = opened.manifest.text.model_copy(update=changes)
    decoder, target = folder / "decoder.onnx", TARGETS["cuda" if facts.cache_dtype == "float16" else "cpu"]
    genai.GENAI.finish(Finished(folder, decoder, config, GenerationConfig(**(generation or {})), facts, target))
    return folder


def settings(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "genai_config.json").read_text("utf-8"))
    return content


@pytest.fixture(scope="module")
def laid_out(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(bundle, tmp_path_factory.mktemp("genai") / "bundle")


@pytest.mark.medium
def test_an_export_proves_the_second_graph(llama: Path, tmp_path: Path) -> None:
    exported = made(llama, tmp_path, verify="full")
    files = exported.manifest.files
    assert {"model.onnx", "genai_config.json", "tokenizer_config.json"} <= files.keys()
    layout = exported.manifest.evidence[-1]
    assert (layout.name, layout.passed, layout.figures["tokens"]) == ("layout", True, 64)
    facts = exported.manifest.graphs["genai"]
    assert [item.name for item in facts.inputs][:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert (facts.file, facts.outputs[0].shape[1:]) == ("model.onnx", (1, 320))
    # It is a bundle like any other.
    assert verify(exported.folder).tokens == 64


def test_the_weights_are_shared(laid_out: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in laid_out.iterdir()}
    assert [name for name in sizes if name.endswith(".data")] == ["decoder.onnx.data"]
    assert sizes["model.onnx"] < sizes["decoder.onnx"] + 2000


def test_the_proof_sees_a_wrong_graph(laid_out: Path, tmp_path: Path) -> None:
    manifest = open_bundle(laid_out).manifest
    graph = laid_out / "model.onnx"
    proof = layout_evidence("genai", genai.GENAI.open(graph, manifest.text), manifest.text, manifest.golden)
    assert (proof.passed, proof.figures["tokens"], proof.figures["near_ties"]) == (True, 64, 0)
    wrong = Path(shutil.copytree(laid_out, tmp_path / "wrong")) / "model.onnx"
    content = wrong.read_bytes()
    for old, new in ((b"0.key", b"0.---"), (b"1.key", b"0.key"), (b"0.---", b"1.key")):
        content = content.replace(b"present." + old, b"present." + new)
    wrong.write_bytes(content)
    proof = layout_evidence("genai", genai.GENAI.open(wrong, manifest.text), manifest.text, manifest.golden)
    assert (proof.passed, proof.figures["continuations_that_differ"]) == (False, 2)


def test_the_settings_are_those_of_the_model(laid_out: Path, bundle: Path, tmp_path: Path) -> None:
    model = settings(laid_out)["model"]
    assert (model["context_length"], model["vocab_size"], model["eos_token_id"]) == (256, 320, [0])
    # As the tokenizer has them, and the end for padding: the model itself says nothing.
    assert (model["bos_token_id"], model["pad_token_id"]) == (1, 0)
    decoder = model["decoder"]
    assert [decoder[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")] == [2, 4, 2]
    assert (decoder["head_size"], decoder["session_options"]["provider_options"]) == (16, [])
    sampling = SamplingFacts(temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.1)
    changes = {"sampling": sampling, "eos_token_ids": (7, 9), "cache_dtype": "float16", "context": 64}
    found = settings(lay_out(bundle, tmp_path / "changed", {"pad_token_id": 5, "bos_token_id": 3}, **changes))
    assert [found["model"][f"{name}_token_id"] for name in ("eos", "pad", "bos")] == [[7, 9], 5, 3]
    search = found["search"]
    drawn = [search[name] for name in ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")]
    assert drawn == [True, 0.6, 0.9, 20, 1.1]
    assert (search["max_length"], search["past_present_share_buffer"]) == (64, True)
    assert found["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]


def test_models_without_special_tokens_get_ids_that_do_not_occur(bundle: Path, tmp_path: Path) -> None:
    folder = lay_out(bundle, tmp_path / "plain", tokenizer=None, eos_token_ids=(), special_tokens={})
    model = settings(folder)["model"]
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([-1], -1, -1)
    assert not (folder / "tokenizer_config.json").exists()


def test_the_folder_loads_as_one_of_genai_too(laid_out: Path, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(laid_out, tmp_path / "foreign"))
    (folder / "fmedge.json").unlink()
    prompts = [list(range(5, 5 + length)) for length in RAGGED]
    with load(folder, max_batch=3) as model:
        assert model.bundle.exporter == "onnxruntime-genai"
        found = model.generate(prompts, Sampling(max_new_tokens=STEPS, ignore_eos=True))
        scored = model.logits(prompts[0])
    assert [list(item.tokens) for item in found] == [greedy(llama, prompt, STEPS) for prompt in prompts]
    assert scored.argmax(-1)[-1] == found[0].tokens[0]


def test_refusals(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no layout ollama; choose one of genai"):
        made(llama, tmp_path, layout="ollama")
    even = LayerCache(0, 2, 16, 16, None, rolling=False)
    window = replace(even, layer=1, window=8, rolling=True)

    def check(*caches: LayerCache, states: tuple[LayerState, ...] = ()) -> None:
        genai.GENAI.check_decoder(TracedDecoder(None, None, caches, states, {}))

    check(even, window)
    check(even, window, replace(even, layer=2, window=32), replace(window, layer=3))
    with pytest.raises(ExportError, match="layer 2 keeps keys of 16 and values of 8"):
        check(even, replace(even, layer=2, value_dim=8))
    with pytest.raises(ExportError, match="windows of 8 and 16 tokens"):
        check(window, replace(window, layer=2, window=16))
    with pytest.raises(ExportError, match="1 recurrent states"):
        check(even, states=(LayerState("0.conv", (3,), torch.float32, in_place=True),))


@pytest.mark.medium
def test_a_refused_decoder_writes_nothing(tmp_path: Path) -> None:
    hybrid = make_model(tmp_path / "lfm2", "lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(ExportError, match="1 recurrent states"):
        made(hybrid, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lfm2"]


def test_tokenizers_that_genai_does_not_read_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ExportError, match=r"byte pairs \(BPE\), and this one is WordPiece"):
        genai.GENAI.check_tokenizer(tmp_path / "tokenizer.json")


def test_an_ordinary_bundle_has_nothing_of_it(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert list(manifest.graphs) == ["decoder"]
    assert not {"model.onnx", "genai_config.json", "tokenizer_config.json"} & manifest.files.keys()


# With onnxruntime-genai itself


def generated(model: Any, prompts: list[list[int]], pad: int) -> list[list[int]]:
    """Greedy continuations by onnxruntime-genai; prompts of different lengths are padded on their right."""
    import onnxruntime_genai

    longest = max(map(len, prompts))
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = longest + STEPS
    # The minimum length keeps the end-of-sequence token away.
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt + [pad] * (longest - len(prompt)) for prompt in prompts], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)][longest:] for row in range(len(prompts))]


def check_against_genai(folder: Path, source: Path | None, *, ragged: bool = True) -> None:
    """Its tokens, ours and (in fp32) PyTorch's, row by row and in batches."""
    reason = "onnxruntime-genai is not installed (pip install onnxruntime-genai)"
    model = pytest.importorskip("onnxruntime_genai", reason=reason).Model(str(folder))
    pad = settings(folder)["model"]["pad_token_id"]
    random = np.random.default_rng(0)
    with load(folder) as ours:
        for lengths in (EVEN, RAGGED):
            prompts = [random.integers(pad + 1, 320, length).tolist() for length in lengths]
            found = ours.generate(prompts, Sampling(max_new_tokens=STEPS, ignore_eos=True))
            wanted = [list(completion.tokens) for completion in found]
            if source is not None:
                assert wanted == [greedy(source, prompt, STEPS) for prompt in prompts]
            assert [generated(model, [prompt], pad)[0] for prompt in prompts] == wanted
            if lengths == EVEN or ragged:
                assert generated(model, prompts, pad) == wanted
            else:
                with pytest.raises(RuntimeError, match="too small for sequence_length"):
                    generated(model, prompts, pad)


def test_genai_generates_the_same_tokens(laid_out: Path, llama: Path) -> None:
    check_against_genai(laid_out, llama)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("gemma2", {"sliding_window": 8}, True),  # one cache holds a window
        ("bloom", {"n_layer": 2, "n_head": 4}, False),  # positions are fed, attention is not the operator's
    ],
)
def test_genai_generates_the_same_tokens_more(
    model_type: str, changes: dict[str, Any], window: bool, tmp_path: Path
) -> None:
    source = make_model(tmp_path / "model", model_type, **changes)
    bundle = made(source, tmp_path)
    assert any(cache.rolling for cache in bundle.manifest.text.caches) == window
    # A cache that holds a window takes no padding: the operator says so, instead of letting it push tokens out.
    check_against_genai(bundle.folder, source, ragged=not window)


@pytest.mark.medium
def test_genai_generates_the_same_tokens_at_int4(llama: Path, tmp_path: Path) -> None:
    check_against_genai(made(llama, tmp_path, quantize="int4").folder, None)


def test_genai_reads_the_tokenizer_and_the_chat_template(laid_out: Path) -> None:
    onnxruntime_genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(laid_out)))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe? 日本語 🙂"}]
    with load(laid_out) as ours:
        assert ours.tokenizer is not None
        for text in ("The list type", "  two  spaces\n\tand a tab, naïve 日本語 🙂", "<|begin|>a tuple<|end|>"):
            assert [int(token) for token in tokenizer.encode(text)] == ours.tokenizer.encode(text, special=False)
        prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        assert [int(token) for token in tokenizer.encode(prompt)] == ours.chat_prompt(messages)
