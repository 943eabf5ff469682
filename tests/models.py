"""Tiny models with random weights, saved as ordinary Hugging Face folders. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fmedge_converters.decoder import quiet_libraries
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "The list type is a mutable sequence. A tuple is immutable; a dictionary maps keys to values. "
    "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\n"
    "Once upon a time there was a small model that ran on a small device, and everyone was happy. "
) * 4
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}


def make_model(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a model of that type with random weights, spread so that greedy decoding has clear winners."""
    shard = changes.pop("max_shard_size", "5GB")
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if value is not None and (isinstance(value, list) or value >= config.get_text_config().vocab_size):
            setattr(config, name, 0)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.1)
    with quiet_libraries():
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def add_tokenizer(folder: Path, size: int = 320, chat_template: str | None = None, bos: bool = False) -> Path:
    """Train a byte-level BPE tokenizer and save it beside a model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>")
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def greedy(folder: Path, prompt: list[int], tokens: int, eos: int | None = None) -> list[int]:
    """What transformers.generate continues a prompt with, in fp32."""
    with quiet_libraries(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()
