"""Prompts through a text encoder that reads them padded to one length: T5, Gemma.

    text = PaddedText(parts, "text_encoder_3", "tokenizer_3")
    tokens = text.tokens(prompt, 256)
    with parts.use(text.name) as part:
        states = text.encode(part, [tokens])[0]

Padding is part of what the encoder, or the denoiser, sees unless a mask hides it, so the length is diffusers'. A prompt
that is longer is refused: cut, it would make another image than it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import BundleDamagedError, RequestError
from fmedge_runtimes.parts import Part, Parts
from fmedge_runtimes.pipelines.pipeline import Array
from fmedge_runtimes.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
TOGETHER = 2048
"""Tokens that go through the encoder in one call at most, if they are of several prompts."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt, padded."""

    ids: Ids
    """[S]"""
    mask: Ids
    """[S]: 1 where the prompt is, 0 where padding is."""


class PaddedText:
    """One text encoder with its tokenizer. The constructor reads files, and raises BundleError for what is missing."""

    def __init__(self, parts: Parts, encoder: str = "text_encoder", tokenizer: str = "tokenizer") -> None:
        parts.require(encoder)
        self.name = encoder
        settings = parts.config(tokenizer, "tokenizer_config.json")
        self._tokenizer = Tokenizer(parts.folder / tokenizer / "tokenizer.json")
        named = settings.values.get("pad_token")
        pad = named.get("content") if isinstance(named, dict) else named
        found = self._tokenizer.token_id(pad) if isinstance(pad, str) else None
        if found is None:
            raise BundleDamagedError(f"{settings.path}: pad_token {pad!r} is no token; export the bundle again.")
        self._pad = found

    def count(self, text: str) -> int:
        """Tokens of a text, those around it included. Raises RequestError."""
        return len(self._tokenizer.encode(text))

    def tokens(self, prompt: str, length: int, *, before: str = "", most: int | None = None) -> Tokens:
        """Tokenize a prompt, behind a text that is not the user's. Raises RequestError if it is too long.

        `most` is the largest length that may be asked for instead.
        """
        ids = self._tokenizer.encode(before + prompt)
        if len(ids) > length:
            fits = most is None or len(ids) <= most
            more = f"set max_sequence_length to {len(ids)}, or shorten it" if fits else "shorten it"
            raise RequestError(
                f"the prompt {prompt[:40]!r}... has {len(ids)} tokens, and {length} are read by {self.name}; {more}."
            )
        padded = np.full(length, self._pad, np.int64)  # [S]
        padded[: len(ids)] = ids
        return Tokens(padded, (np.arange(length) < len(ids)).astype(np.int64))

    def encode(self, part: Part, prompts: Sequence[Tokens]) -> list[Array]:
        """The states [S, D] of prompts of one length, each different one encoded once. Raises BackendError."""
        if not prompts:
            return []
        every = np.stack([prompt.ids for prompt in prompts])  # [N, S]
        masks = np.stack([prompt.mask for prompt in prompts])
        _, first, place = np.unique(
            np.concatenate([every, masks], axis=1), axis=0, return_index=True, return_inverse=True
        )
        most = part.most("batch", max(TOGETHER // every.shape[1], 1))
        found: list[Array] = []
        for start in range(0, len(first), most):
            rows = first[start : start + most]
            feeds = {"input_ids": every[rows]}
            if "attention_mask" in part.inputs:
                feeds["attention_mask"] = masks[rows]
            states = part.output("last_hidden_state", part.run(feeds))
            found += list(states.astype(np.float32, copy=False))
        return [found[row] for row in place.reshape(-1)]


def length_of(asked: int | None, default: int, most: int | None) -> int:
    """The length to pad to. Raises RequestError if the one asked for is more than the family reads."""
    if asked is not None and most is not None and asked > most:
        raise RequestError(f"Diffusion.max_sequence_length is {asked}; this pipeline reads {most} tokens at most.")
    return default if asked is None else asked
