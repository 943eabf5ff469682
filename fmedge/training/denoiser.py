"""The parts of a text-to-image model, built from a preset and saved as a diffusers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import PRXTransformer2DModel
from fmedge_converters import pixel_pipeline
from fmedge_converters.pixel_pipeline import PixelDiffusionPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fmedge.training.image_presets import ImagePreset
from fmedge.training.objectives import Objective

CHANNELS = 3
ROTARY_BASE = 10
"""Of the angles that tell patches their places. Patches are few: the usual 10000 would leave most angles unused."""
INDEX = "model_index.json"
DEFAULT_STEPS = 10
DEFAULT_GUIDANCE = 1.0


class Denoiser(nn.Module):
    """The two parts that are trained together: from noisy pictures, times and captions to the prediction."""

    def __init__(self, preset: ImagePreset, *, vocabulary: int, start: int, end: int, length: int) -> None:
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
        head = preset.width // preset.heads
        self.transformer = PRXTransformer2DModel(
            in_channels=CHANNELS,
            patch_size=preset.patch,
            context_in_dim=preset.text_width,
            hidden_size=preset.width,
            mlp_ratio=preset.mlp_ratio,
            num_heads=preset.heads,
            depth=preset.layers,
            axes_dim=[head // 2, head // 2],
            theta=ROTARY_BASE,
            time_factor=1.0,  # The schedulers' own times, 0 to 1000.
        )
        last = self.transformer.final_layer
        for layer in (
            last.linear,
            last.adaLN_modulation[1],
        ):  # A first prediction of zero, as in DiT (arXiv 2212.09748).
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Predict from noisy pictures [B, 3, S, S], times [B] and caption tokens [B, L]."""
        embedded = self.text_encoder(input_ids=captions).last_hidden_state  # [B, L, D]
        prediction: torch.Tensor = self.transformer(noisy, times, embedded, return_dict=False)[0]
        return prediction


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
        transformer=PRXTransformer2DModel.from_pretrained(folder / "transformer"),
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
