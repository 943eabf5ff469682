"""Conditions of families whose only text encoder is padded, and whose denoiser is given its mask: PixArt, SANA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.padded_text import PaddedText, Tokens
from fmedge_runtimes.pipelines.pipeline import Array

Inputs = dict[str, Array]


def plain(prompt: str) -> str:
    """A prompt in the form in which these models saw captions: lower case, no space around it."""
    return prompt.lower().strip()


def masked_conditions(
    parts: Parts,
    text: PaddedText,
    prompts: Sequence[Tokens],
    negatives: Sequence[Tokens],
    kept: Callable[[Array], Array] | None = None,
) -> list[Condition]:
    """States and mask of each prompt, and of the negative ones; there are none without guidance.

    `kept` chooses from a prompt's tokens [S, ...]; None: all. Raises BackendError.
    """
    with parts.use(text.name) as part:
        positive = [_inputs(*both, kept) for both in zip(prompts, text.encode(part, prompts), strict=True)]
        negative = [_inputs(*both, None) for both in zip(negatives, text.encode(part, negatives), strict=True)]
    return [Condition(own, negative[number] if negative else None) for number, own in enumerate(positive)]


def _inputs(tokens: Tokens, states: Array, kept: Callable[[Array], Array] | None) -> Inputs:
    mask = tokens.mask.astype(np.float32)  # [S]
    if kept is not None:
        states, mask = kept(states), kept(mask)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}
