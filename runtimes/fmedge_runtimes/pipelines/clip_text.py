"""Prompts through a CLIP text encoder: windows of 77 tokens, as many as the prompt needs, and weights of words.

A prompt that fits one window is encoded exactly as diffusers does. A longer one is cut into pieces of 75 tokens, each
encoded in a window of its own, and their states stand one behind the other: the denoiser's attention takes any length.
A word's weight moves its state away from (or toward) that of the empty prompt at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmedge_runtimes.errors import BundleDamagedError, RequestError
from fmedge_runtimes.parts import Part, Parts
from fmedge_runtimes.pipelines.pipeline import Array, Order
from fmedge_runtimes.pipelines.prompt_weights import pieces
from fmedge_runtimes.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
ROWS = 16
"""Windows that go through the encoder together at most."""


@dataclass(frozen=True, slots=True)
class Windows:
    """A tokenized prompt."""

    ids: Ids
    """[W, S]"""
    weights: Array | None
    """[W, S]; None: all are 1."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's states and pooled embedding."""

    states: Array
    """[W * S, D]"""
    pooled: Array | None
    """[P], of the first window; None where the encoder has none."""


class ClipText:
    """One text encoder with its tokenizer. The constructor reads files, and raises BundleError for what is missing."""

    def __init__(self, parts: Parts, encoder: str = "text_encoder", tokenizer: str = "tokenizer") -> None:
        parts.require(encoder)
        self.name = encoder
        config = parts.config(encoder)
        self.layers = config.whole("num_hidden_layers")
        settings = parts.config(tokenizer, "tokenizer_config.json")
        positions = config.whole("max_position_embeddings", 77)
        self.length = min(settings.whole("model_max_length", positions), positions)
        self._masked = config.flag("use_attention_mask")
        self._tokenizer = Tokenizer(parts.folder / tokenizer / "tokenizer.json")
        around = self._tokenizer.encode("")
        if len(around) != 2 or self.length <= 2:
            raise BundleDamagedError(
                f"{parts.folder / tokenizer} puts {len(around)} tokens around a text of {self.length} at most, where "
                "CLIP has one at each end; export the bundle again."
            )
        self._start, self._end = around
        self._pad = _pad_token(self._tokenizer, settings.values.get("pad_token"), self._end)

    def windows(self, prompt: str, *, weighted: bool, least: int = 1) -> Windows:
        """Tokenize a prompt into at least so many windows. Raises RequestError."""
        ids: list[int] = []
        weights: list[float] = []
        for piece in pieces(prompt) if weighted else ():
            found = self._tokenizer.encode(piece.text, special=False)
            ids += found
            weights += [piece.weight] * len(found)
        if not weighted or all(weight == 1.0 for weight in weights):
            # As one text, so that tokens reach over what would be the ends of pieces.
            text = "".join(piece.text for piece in pieces(prompt)) if weighted else prompt
            ids = self._tokenizer.encode(text, special=False)
            weights = []
        room = self.length - 2
        count = max(least, -(-len(ids) // room), 1)
        table = np.full((count, self.length), self._pad, np.int64)  # [W, S]
        factors = np.ones((count, self.length), np.float32) if weights else None  # [W, S]
        for number in range(count):
            part = ids[number * room : (number + 1) * room]
            table[number, : len(part) + 2] = [self._start, *part, self._end]
            if factors is not None:
                factors[number, 1 : len(part) + 1] = weights[number * room : (number + 1) * room]
        return Windows(table, factors)

    def window(self, prompt: str) -> Windows:
        """Tokenize a prompt as it is, into one window. Raises RequestError if it is longer."""
        found = self.windows(prompt, weighted=False)
        if len(found.ids) > 1:
            count = len(self._tokenizer.encode(prompt, special=False))
            raise RequestError(
                f"the prompt {prompt[:40]!r}... has {count} tokens, and this model reads {self.length - 2}; shorten it."
            )
        return found

    def encode(self, part: Part, prompts: Sequence[Windows], states: str, pooled: str | None) -> list[Encoded]:
        """Encode prompts, each different window once. `states` and `pooled` name the graph's outputs.

        Raises BackendError.
        """
        every = np.concatenate([prompt.ids for prompt in prompts])  # [N, S]
        if any(prompt.weights is not None for prompt in prompts):
            every = np.concatenate([every, self.windows("", weighted=False).ids])
        different, place = np.unique(every, axis=0, return_inverse=True)
        place = place.reshape(-1)
        found, pools = self._run(part, different, states, pooled)
        empty = found[place[-1]]  # [S, D]; only used if there are weights
        encoded, start = [], 0
        for prompt in prompts:
            rows = place[start : start + len(prompt.ids)]
            start += len(prompt.ids)
            own = found[rows]  # [W, S, D]
            if prompt.weights is not None:
                own = empty + (own - empty) * prompt.weights[..., None]
            encoded.append(Encoded(own.reshape(-1, own.shape[-1]), None if pools is None else pools[rows[0]]))
        return encoded

    def _run(self, part: Part, ids: Ids, states: str, pooled: str | None) -> tuple[Array, Array | None]:
        found, pools = [], []
        most = part.most("batch", ROWS)
        for start in range(0, len(ids), most):
            some = ids[start : start + most]
            outputs = part.run(self._feeds(part, some))
            found.append(part.output(states, outputs).astype(np.float32, copy=False))
            if pooled is not None:
                pools.append(part.output(pooled, outputs).astype(np.float32, copy=False))
        return np.concatenate(found), np.concatenate(pools) if pools else None

    def mask(self, ids: Ids) -> Ids:
        """1 up to the end of the text, as a tokenizer gives it [W, S]."""
        ends = (ids[:, 1:] == self._end).argmax(axis=1) + 1  # [N]
        mask: Ids = (np.arange(ids.shape[1]) <= ends[:, None]).astype(np.int64)
        return mask

    def _feeds(self, part: Part, ids: Ids) -> dict[str, Ids]:
        if "attention_mask" not in part.inputs:
            return {"input_ids": ids}
        # A model that is not meant to have a mask is given one that hides nothing.
        return {"input_ids": ids, "attention_mask": self.mask(ids) if self._masked else np.ones_like(ids)}


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its negative one, tokenized for each of a pipeline's text encoders, all to the same length."""

    positive: tuple[Windows, ...]
    negative: tuple[Windows, ...] | None
    """None: without guidance."""


def paired(texts: Sequence[ClipText], order: Order, *, guided: bool) -> dict[tuple[str, str | None], Pair]:
    """The different pairs of prompt and negative prompt of an order. Raises RequestError.

    Both are as long as the longer one, since they share a batch; no other prompt's length changes that.
    """
    found: dict[tuple[str, str | None], Pair] = {}
    for job in order.jobs:
        if (job.prompt, job.negative) in found:
            continue
        both = [job.prompt, job.negative or ""] if guided else [job.prompt]

        def windows(prompt: str, least: int) -> tuple[Windows, ...]:
            return tuple(text.windows(prompt, weighted=order.options.weights, least=least) for text in texts)

        least = max(len(one.ids) for prompt in both for one in windows(prompt, 1))
        positive, *negative = (windows(prompt, least) for prompt in both)
        found[job.prompt, job.negative] = Pair(positive, negative[0] if negative else None)
    return found


def check_layers(text: ClipText, skip: int, kept: int) -> None:
    """Raise RequestError if so many layers cannot be skipped: `kept` must be left."""
    if skip > text.layers - kept:
        raise RequestError(
            f"Diffusion.clip_skip is {skip}, and {text.name} has {text.layers} layers, of which {kept} must be left."
        )


def _pad_token(tokenizer: Tokenizer, named: object, end: int) -> int:
    text = named.get("content") if isinstance(named, dict) else named
    found = tokenizer.token_id(text) if isinstance(text, str) else None
    return end if found is None else found
