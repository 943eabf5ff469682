"""A Llama checkpoint of any size with random bf16 weights, written tensor by tensor.

write_checkpoint(SHAPES["8b"], layers=8, folder)
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

BLOCK = 1 << 22
"""Elements that are drawn at once."""
SHARD_BYTES = 1 << 30
"""A shard is closed once it is larger."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama."""

    published: str
    """The model whose shape this is, cut to fewer layers."""
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    def tensors(self, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the layers."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(layers):
            for name, shape in self._layer().items():
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def _layer(self) -> dict[str, tuple[int, ...]]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def nbytes(self, layers: int) -> int:
        """Size of all weights in bf16."""
        return sum(2 * math.prod(shape) for _, shape in self.tensors(layers))

    def largest_nbytes(self) -> int:
        """Size of the largest tensor in bf16."""
        return max(2 * math.prod(shape) for _, shape in self.tensors(1))

    def layers_in(self, nbytes: int) -> int:
        """How many layers fit, at least one."""
        return max(1, (nbytes - self.nbytes(0)) // (self.nbytes(1) - self.nbytes(0)))

    def config(self, layers: int) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SHAPES = {
    "360m": Shape("SmolLM2-360M", 960, 2560, 49152, heads=15, kv_heads=5, head_dim=64, tied=True),
    "1b": Shape("Llama-3.2-1B", 2048, 8192, 128256, heads=32, kv_heads=8, head_dim=64, tied=True),
    "3b": Shape("Llama-3.2-3B", 3072, 8192, 128256, heads=24, kv_heads=8, head_dim=128, tied=True),
    "8b": Shape("Llama-3.1-8B", 4096, 14336, 128256, heads=32, kv_heads=8, head_dim=128, tied=False),
}


def write_checkpoint(shape: Shape, layers: int, folder: Path) -> None:
    """config.json, shards and their index, unless they are there already."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names: dict[str, str] = {}
    for number, tensors in enumerate(_shards(shape, layers)):
        file = f"model-{number:05d}.safetensors"
        _write_shard(folder / file, tensors, random)
        names |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps(shape.config(layers), indent=1), "utf-8")
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}), "utf-8")


def _shards(shape: Shape, layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, size in shape.tensors(layers):
        shard[name] = size
        if sum(2 * math.prod(each) for each in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], random: np.random.Generator) -> None:
    """A safetensors file: the length of a JSON header, the header, the bytes of the tensors."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            _write_tensor(file, shape, random)


def _write_tensor(file: BinaryIO, shape: tuple[int, ...], random: np.random.Generator) -> None:
    """Normal values around 0, or around 1 for a norm; bf16 is the upper half of fp32."""
    size = math.prod(shape)
    for start in range(0, size, BLOCK):
        values = random.standard_normal(min(BLOCK, size - start), np.float32) * np.float32(0.02)
        if len(shape) == 1:
            values += 1
        file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
