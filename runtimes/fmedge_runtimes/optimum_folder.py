"""Folders of `optimum-cli export onnx`: a graph beside the model's own config.json.

Their caches grow. Older versions wrote one graph for the first step and one for steps with a past, or merged both into
one. Format: https://huggingface.co/docs/optimum-onnx
"""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices, Field, PositiveInt

from fmedge_runtimes.errors import BundleError
from fmedge_runtimes.foreign_folder import ForeignFolder, GenerationSettings, Settings, read_json, settings, token_ids
from fmedge_runtimes.foreign_session import GraphNames

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
GRAPHS = (
    "model.onnx",
    "model_optimized.onnx",
    "model_quantized.onnx",
    "decoder_model_merged.onnx",
    "decoder_with_past_model.onnx",
)
"""Names of a graph that takes a past; the first that is there counts."""
WITHOUT_PAST = "decoder_model.onnx"
ENCODER = "encoder_model.onnx"
LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
"""Names that models give the length of their context."""


class _Config(Settings):
    model_type: str
    vocab_size: PositiveInt
    context: PositiveInt = Field(validation_alias=AliasChoices(*LENGTHS))
    is_encoder_decoder: bool = False
    eos_token_id: int | list[int] | None = None


class _Generation(GenerationSettings):
    eos_token_id: int | list[int] | None = None


def read_optimum_folder(folder: Path) -> ForeignFolder | None:
    """The decoder of a folder with a config.json and a graph; None if it has not both.

    Raises BundleError when it is no decoder that keeps a past, BundleFormatError when config.json lacks something.
    """
    path = folder / CONFIG
    graph = next((folder / name for name in GRAPHS if (folder / name).is_file()), None)
    if not path.is_file() or (graph is None and not (folder / WITHOUT_PAST).is_file()):
        return None
    raw = read_json(path)
    if (folder / ENCODER).is_file() or raw.get("is_encoder_decoder"):
        raise BundleError(f"{folder} holds an encoder and a decoder; fmedge runs decoders alone.")
    if graph is None:
        raise BundleError(
            f"{folder} has {WITHOUT_PAST} and none of the graphs that take a past ({', '.join(GRAPHS)}); export it "
            "again with --task text-generation-with-past."
        )
    # The decoder of a model with more modalities has its settings in a part of their own.
    text = raw.get("text_config")
    config = settings(path, {**raw, **text} if isinstance(text, dict) else raw, _Config)
    recommended = folder / GENERATION_CONFIG
    generation = settings(recommended, read_json(recommended) if recommended.is_file() else {}, _Generation)
    return ForeignFolder(
        folder=folder,
        exporter="optimum",
        graph=graph,
        names=GraphNames(),
        in_place=False,
        device="cpu",
        architecture=config.model_type,
        context=config.context,
        vocabulary=config.vocab_size,
        head_size=None,
        windows={},
        eos_token_ids=token_ids(config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id),
        sampling=generation.sampling(),
    )
