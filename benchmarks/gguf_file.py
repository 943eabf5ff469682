"""Write a folder of transformers as a GGUF file and let llama.cpp quantize it: what its own tools do.

Runs in llama.cpp's environment: python gguf_file.py MODEL_FOLDER OUTPUT Q4_0 [STATISTICS]. The file has no tokenizer;
the measurements use token ids. STATISTICS is what `fmedge export --statistics` writes: its mean squares are llama.cpp's
importance matrix, of the products that its own llama-imatrix looks at. Form `served` is for llama.cpp's server, which
wants a tokenizer and whose package has no quantizer: Q4_0, and Q8_0 for the embedding and the head that is tied to it,
by the gguf package.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from matrices import weight_files
from safetensors import safe_open

ARCHITECTURES = MappingProxyType({"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"})
"""llama.cpp's name of each `model_type` whose tensors are those below. Others need a conversion of their own, which
llama.cpp's packages leave out (its convert_hf_to_gguf.py)."""
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """The name of a tensor in a GGUF file."""
    if name in NAMES:
        return NAMES[name]
    try:
        _, _, layer, rest = name.split(".", 3)
        module, kind = rest.rsplit(".", 1)
        return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"
    except (ValueError, KeyError):
        raise SystemExit(f"gguf_file.py has no name for the tensor {name}") from None


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama's rotary embedding, which pairs neighbours where transformers pairs halves."""
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(tensor.shape))


def tensors(folder: Path, *, tied: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of all shards in fp32; a head that is tied comes once."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as reader:
            for name in sorted(reader.keys()):
                if not (tied and name == "lm_head.weight") and not name.endswith("rotary_emb.inv_freq"):
                    yield name, reader.get_tensor(name).float().numpy()


def rope_base(config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding, which must be plain. Raises SystemExit."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise SystemExit(f"gguf_file.py writes plain rotary embeddings, and this model's is of type {kind}")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def write_gguf(folder: Path, output: Path, matrices: str = "BF16", embedding: str = "BF16") -> None:
    """The file with matrices and embedding of these types, the rest in fp32. Raises SystemExit."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise SystemExit(f"gguf_file.py writes {', '.join(ARCHITECTURES)}, and this model is {config['model_type']}")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(output, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_base(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{matrices}"])
    if matrices == "BF16":
        writer.add_tokenizer_model("no_vocab")
    else:
        write_tokenizer(folder, writer, config["vocab_size"])
    for name, tensor in tensors(folder, tied=bool(config.get("tie_word_embeddings"))):
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = interleaved(tensor, heads if "q_proj" in name else kv_heads)
        else:
            values = tensor
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            kind = gguf.GGMLQuantizationType[embedding if "embed_tokens" in name else matrices]
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(folder: Path, writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """The byte-level tokens of random_models.py, and a name for every other id."""
    known = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    tokens = [f"<{number}>" for number in range(vocabulary)]
    for token, number in known.items():
        tokens[number] = token
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def importance_from_statistics(path: Path) -> dict[str, np.ndarray]:
    """For the matrix [N, K] of each name in a GGUF file, the mean squares [K] of its inputs; not for the head."""
    found = {}
    with safe_open(path, framework="np") as reader:
        for number, inputs in enumerate(json.loads(reader.metadata()["fmedge_statistics"])["inputs"]):
            squares = reader.get_tensor(f"{number}.mean_square").astype(np.float32)  # [K]
            found.update({gguf_name(name): squares for name, _ in inputs["matrices"] if name not in NAMES})
    return found


def quantize_gguf(source: Path, output: Path, form: str, importance: Mapping[str, np.ndarray]) -> None:
    """llama.cpp's own quantization, as its llama-quantize does it (a tied embedding becomes Q6_K or Q8_0)."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    if importance:
        floats = ctypes.POINTER(ctypes.c_float)
        entries = [
            llama_cpp.llama_model_imatrix_data(name.encode(), squares.ctypes.data_as(floats), squares.size)
            for name, squares in importance.items()
        ]
        end = llama_cpp.llama_model_imatrix_data(None, None, 0)
        params.imatrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries, end)
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), params)
    if code:
        raise SystemExit(f"llama_model_quantize failed with code {code}")


def main(folder: Path, output: Path, form: str, statistics: str = "") -> None:
    """Convert, quantize, forget what lies between."""
    if form == "served":
        write_gguf(folder, output, "Q4_0", "Q8_0")
        return
    plain = output.with_suffix(".plain")
    try:
        write_gguf(folder, plain)
        quantize_gguf(plain, output, form, importance_from_statistics(Path(statistics)) if statistics else {})
    finally:
        plain.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
