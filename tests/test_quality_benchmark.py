"""benchmarks/quality.py: the sizes that it compares, the files that it makes for llama.cpp, and what it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("traced_once")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HEADS, KV_HEADS, HEAD, HIDDEN, WIDE, VOCABULARY = 2, 1, 32, 64, 96, 40


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def shards(folder: Path, model_type: str = "mistral", *, tied: bool = False, **changes: object) -> dict[str, Any]:
    """A checkpoint of one layer in two shards of bf16, and its tensors; a tied head is in the files, too."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        "model.layers.0.mlp.gate_proj.weight": (WIDE, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (WIDE, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, WIDE),
    }
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    names = sorted(tensors)
    files = {name: f"model-{index % 2 + 1:05d}-of-00002.safetensors" for index, name in enumerate(names)}
    folder.mkdir()
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    # Mistral's folders hold all weights once more, under other names.
    save_file({"tok_embeddings.weight": tensors["lm_head.weight"]}, folder / "consolidated.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = {
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "tie_word_embeddings": tied,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return tensors


@pytest.mark.parametrize("tied", [False, True])
def test_all_matrices_of_a_checkpoint_are_counted_once(tied: bool, tmp_path: Path) -> None:
    from matrices import parameters_of_matrices

    tensors = shards(tmp_path / "model", tied=tied)
    matrices = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 2)
    assert parameters_of_matrices(tmp_path / "model") == matrices - tied * VOCABULARY * HIDDEN


@pytest.mark.parametrize("shared", [False, True])
def test_all_matrices_of_a_graph_are_counted_once(shared: bool, tmp_path: Path) -> None:
    from matrices import onnx_matrix_bytes

    def stored(name: str, kind: int, dims: list[int], offset: int) -> onnx.TensorProto:
        made = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
        made.external_data.add(key="location", value="decoder.onnx.data")
        made.external_data.add(key="offset", value=str(offset))
        return made

    initializers = [
        stored("codes", TensorProto.UINT8, [8, 2, 16], 0),
        stored("scales", TensorProto.BFLOAT16, [8, 2], 4096),
        stored("table", TensorProto.FLOAT, [40, 8], 8192),
        stored("head", TensorProto.FLOAT, [8, 40], 8192 if shared else 16384),
        stored("positions", TensorProto.FLOAT, [99, 8], 32768),
    ]
    nodes = [
        helper.make_node("Cast", ["scales"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Gather", ["positions", "seen"], ["p"]),
        helper.make_node("MatMulNBits", ["x", "codes", "wide"], ["y"], domain="com.microsoft"),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "decoder", [], [], initializers)), tmp_path / "decoder.onnx")
    assert onnx_matrix_bytes(tmp_path) == 8 * 2 * 16 + 8 * 2 * 2 + 40 * 8 * 4 * (1 if shared else 2)


def test_matrices_of_a_gguf_file_are_counted(tmp_path: Path) -> None:
    from matrices import gguf_matrix_bytes

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("norm", np.ones(64, np.float32))
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("matrix", gguf.quants.quantize(np.ones((8, 64), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_matrix_bytes(tmp_path / "model.gguf") == 8 * 64 * 18 // 32


def test_a_checkpoint_in_shards_becomes_a_gguf_file(tmp_path: Path) -> None:
    from gguf_file import write_gguf

    tensors = shards(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.rope.freq_base"].contents() == 5000.0
    assert reader.fields["llama.attention.key_length"].contents() == HEAD
    found = {item.name: gguf.quants.dequantize(item.data, item.tensor_type) for item in reader.tensors}
    assert len(found) == len(tensors)
    same = {"output.weight": "lm_head", "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj"}
    for name, module in same.items():
        assert np.array_equal(found[name], tensors[f"{module}.weight"].float().numpy())
    q = tensors["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    # Row 1 of a head in llama.cpp is the first of the second half in transformers.
    assert np.array_equal(found["blk.0.attn_q.weight"][[0, 1, 2, HEAD]], q[[0, HEAD // 2, 1, HEAD]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma3_text"}, "this model is gemma3_text"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "of type llama3"),
    ],
)
def test_what_is_not_written_for_llama_cpp_says_why(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    from gguf_file import write_gguf

    shards(tmp_path / "model", **changes)
    with pytest.raises(SystemExit, match=words):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_statistics_become_an_importance_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmedge_converters.calibration.linear_inputs import Place
    from fmedge_converters.calibration.statistics import Statistics, StatisticsKey, write_statistics
    from gguf_file import importance_from_statistics, quantize_gguf

    one = Statistics(4, torch.tensor([1.0, 4.0]), torch.ones(2))
    layer = "model.layers.3.mlp"
    found = {
        Place(f"{layer}.up_proj.weight"): one,
        Place(f"{layer}.gate_proj.weight"): one,
        Place("lm_head.weight"): one,
    }
    write_statistics(tmp_path / "s", StatisticsKey("", "", "", "", 4), found)
    importance = importance_from_statistics(tmp_path / "s")
    assert set(importance) == {"blk.3.ffn_up.weight", "blk.3.ffn_gate.weight"}

    import ctypes

    class Entry(ctypes.Structure):
        _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t)]

    params = SimpleNamespace()
    library = SimpleNamespace(
        llama_model_quantize_default_params=lambda: params,
        LLAMA_FTYPE_MOSTLY_Q4_K_M=15,
        llama_model_imatrix_data=Entry,
        llama_model_quantize=lambda *_: 0,
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    quantize_gguf(tmp_path / "in", tmp_path / "out", "Q4_K_M", importance)
    assert [entry.name for entry in params.imatrix] == [*(name.encode() for name in importance), None]
    assert params.imatrix[0].data[: params.imatrix[0].size] == [1.0, 4.0]


def row(form: str, bits: float, kl: float, text: str = "a.txt") -> Any:
    from quality_report import Row

    return Row(form, text, 1000, bits, 20.0 + kl, 20.0, kl, 0.9)


def test_peers_stand_beside_the_best_form_that_is_not_larger(capsys: pytest.CaptureFixture[str]) -> None:
    from quality_report import print_report

    rows = [row("fmedge/a", 4.5, 0.4), row("fmedge/b", 5.0, 0.1), row("fmedge/c", 4.9, 0.3)]
    rows += [row("llamacpp/q", 5.0, 0.2), row("genai/r", 4.6, 0.2), row("genai/s", 4.0, 0.9)]
    print_report([*rows, row("fmedge/a", 4.5, 0.7, "b.txt")], ["genai/t: it does not fit"])
    lines = capsys.readouterr().out.splitlines()
    peers = lines[2:7]
    assert [line.split()[1] for line in peers[2:]] == ["genai/s", "genai/r", "llamacpp/q"]
    assert "| none |" in peers[2]
    assert "fmedge/a" in peers[3] and peers[3].endswith("| 0.50 |")
    assert "fmedge/b" in peers[4] and peers[4].endswith("| 2.00 |")
    assert lines[-1] == "left out: genai/t: it does not fit"
    assert sum(line.startswith("b.txt: perplexity of PyTorch") for line in lines) == 1


def test_rows_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quality
    from peers import FMEDGE, Form

    (tmp_path / "w.npy").write_bytes(b"ids")
    text = quality.Windows("a.txt", tmp_path / "w.npy", tmp_path / "l.npy")
    options = SimpleNamespace(window=2, resume=True, only=("",), peers=tmp_path)
    made: list[str] = []

    def rows_of(bench: object, form: Any, texts: list[Any]) -> list[Any]:
        made.append(form.name)
        if form.precision == "broken":
            raise ValueError("no such scheme")
        return [row(form.name, 4.0, 0.5)]

    def measured(names: list[str]) -> Any:
        bench = quality.Bench(options, tmp_path, tmp_path, [text], 1)
        bench.measure(Form("fmedge", name, "", lambda *_: [], FMEDGE) for name in names)
        return bench

    monkeypatch.setattr(quality.Bench, "_rows", rows_of)
    first = measured(["a", "broken"])
    assert first.left_out == ["fmedge/broken: no such scheme"]
    assert [one.form for one in measured(["a", "b"]).rows] == ["fmedge/a", "fmedge/b"]
    assert made == ["fmedge/a", "fmedge/broken", "fmedge/b"]
    (tmp_path / "w.npy").write_bytes(b"others")  # another text
    assert measured([]).rows == []


def test_a_budget_is_measured_for_each_peer_of_note() -> None:
    import quality

    options = SimpleNamespace(match=("genai/int4", "llamacpp/Q4_0", "llamacpp/Q4_K_M"), bits=(5.0,))
    rows = [row("genai/int4", 5.0, 1), row("llamacpp/Q4_0", 5.329, 1), row("llamacpp/Q4_K_M", 3.9, 1)]
    (form,) = quality.matched_forms(options, [*rows, row("llamacpp/Q8_0", 8.5, 1)])
    assert form.name == "fmedge/int4-gptq-bits-5.32"
