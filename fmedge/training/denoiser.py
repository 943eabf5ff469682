"""The parts of a text-to-image model, built from a preset and saved as a diffusers folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fmedge.training import pixel_pipeline
from fmedge.training.image_presets import ImagePreset
from fmedge.training.objectives import Objective
from fmedge.training.pixel_pipeline import PixelDiffusionPipeline

CHANNELS = 3
LONGEST_WAVE = 10.0
"""In patches, by 2 pi: a little longer than the grids that are trained here."""
INDEX = "model_index.json"
DEFAULT_STEPS = 10
DEFAULT_GUIDANCE = 1.0


class Denoiser(nn.Module):
    """The two parts that are trained together: from noisy pictures, times and captions to the prediction."""

    def __init__(self, preset: ImagePreset, *, vocabulary: int, start: int, end: int, length: int, size: int) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=preset.text_width,
                intermediate_size=2 * preset.text_width,
                projection_dim=preset.text_width,
                num_hidden_layers=preset.text_layers,
                num_attention_heads=preset.text_heads,
                max_position_embeddings=length,
                bos_token_id=start,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        self.transformer = SD3Transformer2DModel(
            sample_size=size,
            patch_size=preset.patch,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=preset.layers,
            attention_head_dim=preset.width // preset.heads,
            num_attention_heads=preset.heads,
            joint_attention_dim=preset.text_width,
            caption_projection_dim=preset.width,
            pooled_projection_dim=preset.text_width,
            pos_embed_max_size=size // preset.patch,
        )
        for layer in _zero_at_first(self.transformer):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        _learn_positions(self.transformer)

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Predict from noisy pictures [B, 3, S, S], times [B] and caption tokens [B, L]."""
        text = self.text_encoder(input_ids=captions)
        prediction: torch.Tensor = self.transformer(
            noisy,
            encoder_hidden_states=text.last_hidden_state,  # [B, L, D]
            pooled_projections=text.pooler_output,  # [B, D]
            timestep=times,
            return_dict=False,
        )[0]
        return prediction


def _zero_at_first(transformer: SD3Transformer2DModel) -> Iterator[nn.Linear]:
    """The layers that DiT (Peebles and Xie 2022, arXiv 2212.09748) begins with zeros, so that each block is the identity."""
    for block in transformer.transformer_blocks:
        yield from (block.norm1.linear, block.norm1_context.linear)
    yield from (transformer.norm_out.linear, transformer.proj_out)


def _learn_positions(transformer: SD3Transformer2DModel) -> None:
    """Train the embedding of the patches' places, a buffer of fixed waves in the stock class, under the same name.

    It begins with waves no longer than the grid. The stock ones are made for hundreds of patches; of a few, they make
    the places so alike that pictures fell into patches that knew their content but not their place.
    """
    embedding = transformer.pos_embed
    side, width = embedding.pos_embed_max_size, embedding.pos_embed.shape[-1]
    rates = LONGEST_WAVE ** -torch.linspace(0, 1, width // 4)  # [W / 4]
    places = torch.arange(side, dtype=torch.float32)[:, None] * rates  # [G, W / 4]
    waves = torch.cat([places.sin(), places.cos()], dim=1)  # [G, W / 2]
    grid = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)  # [G * G, W], rows first
    del embedding.pos_embed
    embedding.pos_embed = nn.Parameter(grid[None])


def pipeline_from_denoiser(
    denoiser: Denoiser, objective: Objective, tokenizer: CLIPTokenizer, size: int
) -> PixelDiffusionPipeline:
    """Put the parts together so that they sample."""
    pipeline = PixelDiffusionPipeline(
        transformer=denoiser.transformer,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        scheduler=objective.scheduler(),
        default_sample_size=size,
        default_steps=DEFAULT_STEPS,
        default_guidance=DEFAULT_GUIDANCE,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def read_pipeline(folder: Path) -> PixelDiffusionPipeline:
    """Load what `write_pipeline` saved, without running the folder's code: it is ours."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    scheduler = getattr(diffusers, index["scheduler"][1])
    pipeline = PixelDiffusionPipeline(
        transformer=SD3Transformer2DModel.from_pretrained(folder / "transformer"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=scheduler.from_pretrained(folder / "scheduler"),
        **{name: index[name] for name in ("default_sample_size", "default_steps", "default_guidance")},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_pipeline(pipeline: PixelDiffusionPipeline, folder: Path) -> None:
    """Save the parts, the pipeline's code, and an index that names it."""
    pipeline.save_pretrained(folder)
    code = folder / "pipeline.py"
    shutil.copyfile(pixel_pipeline.__file__, code)
    index = folder / INDEX
    content = json.loads(index.read_text(encoding="utf-8"))
    content["_class_name"] = [code.stem, PixelDiffusionPipeline.__name__]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        # safetensors leaves its files readable by their owner only, unlike those beside them.
        shutil.copymode(index, file)
