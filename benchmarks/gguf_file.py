"""Write a llama or qwen2 folder of transformers as a GGUF file and let llama.cpp quantize it: what its own tools do.

Runs in llama.cpp's environment: python gguf_file.py MODEL_FOLDER OUTPUT Q4_0. The file has no tokenizer; the
measurements use token ids. Form `served` is for llama.cpp's server, which wants a tokenizer and whose package has no
quantizer: Q4_0, and Q8_0 for the embedding and the head that is tied to it, by the gguf package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def gguf_name(name: str) -> str:
    """The name of a tensor in a GGUF file."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama's rotary embedding, which pairs neighbours where transformers pairs halves."""
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(tensor.shape))


def write_gguf(folder: Path, output: Path, matrices: str = "BF16", embedding: str = "BF16") -> None:
    """The file with matrices and embedding of these types, the rest in fp32."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(output, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{matrices}"])
    if matrices == "BF16":
        writer.add_tokenizer_model("no_vocab")
    else:
        write_tokenizer(folder, writer, config["vocab_size"])
    with safe_open(folder / "model.safetensors", framework="pt") as reader:
        for name in sorted(reader.keys()):
            tensor = reader.get_tensor(name).float().numpy()
            if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
                tensor = interleaved(tensor, heads if "q_proj" in name else kv_heads)
            if tensor.ndim == 1:
                writer.add_tensor(gguf_name(name), tensor)
            else:
                kind = gguf.GGMLQuantizationType[embedding if "embed_tokens" in name else matrices]
                writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
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


def quantize_gguf(source: Path, output: Path, form: str) -> None:
    """llama.cpp's own quantization, as its llama-quantize does it (a tied embedding becomes Q6_K or Q8_0)."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), params)
    if code:
        raise SystemExit(f"llama_model_quantize failed with code {code}")


def main(folder: Path, output: Path, form: str) -> None:
    """Convert, quantize, forget what lies between."""
    if form == "served":
        write_gguf(folder, output, "Q4_0", "Q8_0")
        return
    plain = output.with_suffix(".plain")
    write_gguf(folder, plain)
    quantize_gguf(plain, output, form)
    plain.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
