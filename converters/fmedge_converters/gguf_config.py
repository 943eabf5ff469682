"""The configuration of a model in a GGUF file: transformers' reading of the metadata, and what that leaves out.

transformers ignores how rotary frequencies are scaled (Llama 3.1 and later, Phi 3, and anything with YaRN), and some
sizes that only matter where they differ from a model's default.
"""

from __future__ import annotations

from pathlib import Path

from fmedge_runtimes.errors import SourceError
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fmedge_converters.containers.gguf import ARCHITECTURE, SUFFIX, Header, read_header
from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.first_line import first_line

LICENCE = "general.license"
TOKENIZER = "tokenizer.ggml.model"
NO_TOKENIZER = (None, "none", "no_vocab")
SETTINGS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Keys below the architecture's name, and the attributes of configurations that they are."""
TABLES = {"token_embd.weight": "vocab_size", "position_embd.weight": "max_position_embeddings"}
"""Tensors whose rows are counted; the tokenizer may know fewer tokens than the model, or more."""
FULL_ATTENTION = "full_attention"


def gguf_config(file: Path) -> PretrainedConfig:
    """The configuration of the model in a file.

    Raises SourceError: the file is damaged, or its architecture is not one that transformers reads from GGUF.
    """
    header = read_header(file)
    facts = header.metadata
    architecture = str(facts.get(ARCHITECTURE))
    try:
        with quiet_libraries():
            config: PretrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # whatever transformers' loaders raise
        raise SourceError(
            f"{file}: transformers cannot read the GGUF architecture {architecture} ({first_line(error)}); "
            "export the model from its safetensors checkpoint."
        ) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(f"{file} ({config.model_type}) is not a causal language model; fmedge exports text decoders.")
    known = GGUF_CONFIG_MAPPING.get(architecture, {})
    for key, attribute in SETTINGS.items():
        value = facts.get(f"{architecture}.{key}")
        if value is not None and getattr(config, attribute, value) != value and not known.get(key):
            setattr(config, attribute, value)
    for name, attribute in TABLES.items():
        if name in header.tensors:
            setattr(config, attribute, header.tensors[name].shape[0])
    _complete_rope(config, header, architecture, file)
    return config


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a source is: itself, or the only one of a folder without other weights; None if it is none.

    Raises SourceError when there are several.
    """
    if path.is_file() and path.suffix.lower() == SUFFIX:
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        raise SourceError(f"{path} holds {len(found)} GGUF files; give one of them, {found[0]} for example.")
    return found[0] if found else None


def gguf_licence(file: Path) -> str | None:
    """The licence that a file names."""
    found = read_header(file).metadata.get(LICENCE)
    return found if isinstance(found, str) else None


def has_tokenizer(file: Path) -> bool:
    """Whether a file holds a vocabulary."""
    return read_header(file).metadata.get(TOKENIZER) not in NO_TOKENIZER


def _complete_rope(config: PretrainedConfig, header: Header, architecture: str, file: Path) -> None:
    """Write into a configuration how its rotary frequencies are scaled."""
    facts = header.metadata
    parameters = config.rope_parameters if isinstance(getattr(config, "rope_parameters", None), dict) else None
    stored = {name: tensor for name, tensor in header.tensors.items() if name.startswith("rope_f")}
    factors = {name: tensor.read(0, tensor.shape[0]).tolist() for name, tensor in stored.items()}
    kind = facts.get(f"{architecture}.rope.scaling.type")
    if parameters is None:
        return
    parameters = parameters.get(FULL_ATTENTION, parameters)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = facts.get(f"{architecture}.rope.dimension_count", head)
    if turned <= head and turned != int(head * parameters.get("partial_rotary_factor", 1.0)):
        parameters["partial_rotary_factor"] = turned / head
    first = facts.get(f"{architecture}.rope.scaling.original_context_length")
    length = config.max_position_embeddings
    if "rope_freqs.weight" in factors:
        # Divisors of the frequencies, as Llama 3.1 has them: long and short alike, and no scaling of the attention.
        same = factors["rope_freqs.weight"]
        parameters |= {"rope_type": "longrope", "short_factor": same, "long_factor": same, "factor": 1.0}
        parameters |= {"attention_factor": 1.0, "original_max_position_embeddings": length}
    elif len(factors) == 2:
        long, short = (factors[f"rope_factors_{name}.weight"] for name in ("long", "short"))
        parameters |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        parameters |= {"original_max_position_embeddings": first or length, "factor": length / (first or length)}
    elif kind in ("linear", "yarn"):
        parameters |= {"rope_type": kind, "factor": float(facts[f"{architecture}.rope.scaling.factor"])}
        if kind == "yarn" and first:
            parameters["original_max_position_embeddings"] = first
    elif factors or kind not in (None, "none"):
        raise SourceError(f"{file}: its rotary frequencies are scaled by {kind}, for which the file lacks the factors.")
