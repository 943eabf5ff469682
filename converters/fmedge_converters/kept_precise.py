"""Which products with weights stay in floating point when a part of a pipeline is quantized, and why.

They are few and small, and an error in them is one in every pixel or in every step. The rows hold for convolutions,
too, which int8 on the CPU quantizes. Norms, embeddings and biases are never quantized.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """A row of the table."""

    pattern: re.Pattern[str]
    """Found in the name of a parameter."""
    why: str


KEPT: tuple[Kept, ...] = (
    Kept(
        re.compile(
            r"(^|\.)(time_embedding|time_embed|time_in|time_text_embed|timestep_embedder|time_proj|adaln_single)\."
        ),
        "what becomes of the timestep reaches every layer, and neighbouring steps differ little",
    ),
    Kept(
        re.compile(r"(^|\.)(add_embedding|class_embedding|add_time_proj|guidance_in|vector_in|time_guidance_embed)\."),
        "sizes, guidance and pooled text join the timestep",
    ),
    Kept(
        re.compile(r"(^|\.)(time_emb_proj|norm_out|norm1\.linear|norm1_context\.linear|modulation)\b"),
        "scales and shifts of whole layers",
    ),
    Kept(
        re.compile(r"^(proj_out|conv_out|final_layer|proj_to_clip_embeddings|text_projection|visual_projection)\b"),
        "the last product makes the output",
    ),
    Kept(re.compile(r"\.lora_[ab]\b"), "a LoRA that stays apart has few numbers, and is there to be scaled"),
    Kept(
        re.compile(r"^ip_projection\b|\.processor\.to_[kv]_ip\b"),
        "an image's few tokens are made once, and are attended to in every layer",
    ),
    Kept(
        re.compile(r"^(controlnet_cond_embedding|controlnet_down_blocks|controlnet_mid_block)\b"),
        "the control image is read once, and what a ControlNet gives is added to every layer that follows",
    ),
    Kept(
        re.compile(
            r"^(conv_in|x_embedder|img_in|proj_in|context_embedder|txt_in|caption_projection|pos_embed|patch_embed)\b"
            r"|\.patch_embedding\."
        ),
        "the first product reads the noise, or the text",
    ),
)


def is_kept(name: str) -> bool:
    """Whether the weight of that parameter stays as it is."""
    return any(row.pattern.search(name) for row in KEPT)
