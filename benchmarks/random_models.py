"""Model folders with random weights and the real shapes of published models: config, bf16 safetensors, tokenizer.

Speed and memory depend on shapes, not on what the weights say, so nothing needs to be downloaded.

    folder = write_model(SHAPES["smol135"], Path("out/models/smol135"))
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """One decoder: the model type of transformers and the fields of its config."""

    model_type: str
    published: str
    """The model whose shape this is."""
    config: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.config["vocab_size"])


SHAPES = {
    "smol135": Shape(
        "llama",
        "SmolLM2-135M",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
            "rope_theta": 100_000.0,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
        },
    ),
    "qwen05": Shape(
        "qwen2",
        "Qwen2.5-0.5B",
        {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
        },
    ),
}


def write_model(shape: Shape, folder: Path) -> Path:
    """Write the model folder unless it is there already."""
    if (folder / "tokenizer.json").is_file():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    settings = dict(shape.config)
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    config = AutoConfig.for_model(shape.model_type, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers sets them to zero, and a zero could be folded away
            torch.nn.init.normal_(parameter.data, std=0.02)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges; peers' converters want one, the measurements use token ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    write_model(SHAPES[sys.argv[1]], Path(sys.argv[2]))
