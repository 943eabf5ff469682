"""The prior of unCLIP: from a prompt to CLIP's embedding of an image of it. Ramesh et al. 2022, arXiv 2204.06125.

    prior = ImagePrior(parts, "prior")
    embeddings = yield from prior.embed(order, prompts, schedule, ...)

It denoises an embedding [D], conditioned on CLIP's embedding of the text, its states and the mask of its padding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np

from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.clip_text import ClipText
from fmedge_runtimes.pipelines.condition import Condition
from fmedge_runtimes.pipelines.denoiser import Form
from fmedge_runtimes.pipelines.pipeline import Array, Order, Progress
from fmedge_runtimes.pipelines.stage import Beginning, Stage, sample
from fmedge_runtimes.schedulers.scheduler import Scheduler

FORM = Form(
    sample="hidden_states",
    output="predicted_image_embedding",
    timestep_rows=True,
    constants=("clip_mean", "clip_std"),
)
Text = dict[str, Array]
"""What is known of a prompt: `proj_embedding` [D], `encoder_hidden_states` [S, D], `attention_mask` [S]."""


class ImagePrior:
    """The part and its text encoder. The constructor reads files, and raises BundleError for what is missing."""

    def __init__(self, parts: Parts, name: str, encoder: str, tokenizer: str) -> None:
        parts.require(name)
        self._parts, self.name = parts, name
        self._text = ClipText(parts, encoder, tokenizer)
        self._width = parts.config(name).whole("embedding_dim")

    def texts(self, prompts: Sequence[str]) -> list[Text]:
        """What CLIP says of prompts, each encoded once. Raises RequestError for one that is too long."""
        windows = [self._text.window(prompt) for prompt in prompts]
        with self._parts.use(self._text.name) as part:
            encoded = self._text.encode(part, windows, "last_hidden_state", "text_embeds")
        found = []
        for window, one in zip(windows, encoded, strict=True):
            assert one.pooled is not None  # asked for
            mask = self._text.mask(window.ids)[0].astype(np.float32)
            found.append({"proj_embedding": one.pooled, "encoder_hidden_states": one.states, "attention_mask": mask})
        return found

    def embed(
        self,
        order: Order,
        wanted: Sequence[Sequence[Text]],
        away: Sequence[Text] | None,
        schedule: Callable[[], Scheduler],
        guidance: float,
    ) -> Generator[Progress, None, tuple[list[Array], int]]:
        """Embeddings [R, D] of the R texts of each job, and the steps; `away` is each job's other half of guidance.

        The texts of a job are denoised together, and share its noise generator. Raises BackendError.
        """
        conditions = []
        for number, texts in enumerate(wanted):
            negative = None if away is None else _stacked([away[number]] * len(texts))
            conditions.append(Condition(_stacked(texts), negative))

        def begin(scheduler: Scheduler, rows: Sequence[int]) -> Beginning:
            noise = order.normal(rows, (len(wanted[rows[0]]), self._width))  # [B, R, D]
            return Beginning(noise * np.float32(scheduler.init_noise_sigma))

        shape = (1, self._width)
        stage = Stage(self.name, FORM, shape, schedule, guidance=guidance, fold=True, begin=begin)
        found = yield from sample(self._parts, stage, conditions, order)
        mean, deviation = (found.constants[name] for name in FORM.constants)  # [1, D]
        return [one * deviation + mean for one in found.samples], found.steps


def _stacked(texts: Sequence[Text]) -> Text:
    return {name: np.stack([text[name] for text in texts]) for name in texts[0]}
