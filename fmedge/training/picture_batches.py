"""Batches of prepared pictures, each decided by the seed and the step's number alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fmedge.training.objectives import Draw, Objective
from fmedge.training.workfolder import WorkFolder

VALIDATION_SEED = 1
VALIDATION_BATCH = 64


@dataclass(frozen=True, slots=True)
class Pictures:
    """The data of a run."""

    train: NDArray[np.uint8]
    """[N, S, S, 3]"""
    captions: NDArray[np.int32]
    """Tokens, [N, L]."""
    validation: NDArray[np.uint8]
    """[M, S, S, 3]"""
    validation_captions: NDArray[np.int32]
    """[M, L]"""
    empty_caption: NDArray[np.int32]
    """[L]"""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on."""

    clean: torch.Tensor
    """[B, 3, S, S], from -1 to 1."""
    captions: torch.Tensor
    """[B, L]"""
    draw: Draw


def read_pictures(work: WorkFolder) -> Pictures:
    """What was prepared, mapped rather than read."""
    return Pictures(
        train=work.read_array("pictures"),
        captions=work.read_array("captions"),
        validation=work.read_array("validation_pictures"),
        validation_captions=work.read_array("validation_captions"),
        empty_caption=work.read_array("empty_caption"),
    )


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Which pictures a step of a process sees: all of them in each epoch, in an order of its own, but for a rest."""

    pictures: int
    batch: int
    """Pictures of one step of one process."""
    processes: int
    process: int
    seed: int

    def numbers(self, step: int) -> NDArray[np.int64]:
        """Of the pictures of a step, [B]."""
        epoch, place = divmod(step, self.pictures // (self.batch * self.processes))
        order = np.random.default_rng([self.seed, epoch]).permutation(self.pictures)
        start = (place * self.processes + self.process) * self.batch
        return order[start : start + self.batch]

    def random(self, step: int) -> np.random.Generator:
        """What draws times, noise and left-out captions of a step."""
        return np.random.default_rng([self.seed, step, self.process, 1])


def train_batch(
    pictures: Pictures, order: BatchOrder, step: int, objective: Objective, dropout: float, device: torch.device
) -> Batch:
    """Make the batch of a step (from 0), with a share of the captions left out."""
    random = order.random(step)
    numbers = order.numbers(step)
    captions = pictures.captions[numbers]  # [B, L]
    captions = np.where(random.random((len(captions), 1)) < dropout, pictures.empty_caption, captions)
    return _batch(pictures.train[numbers], captions, random, objective, device)


def validation_batches(pictures: Pictures, objective: Objective, device: torch.device) -> Iterator[Batch]:
    """The held-out pictures, with the same times and noise whenever they are asked for."""
    random = np.random.default_rng(VALIDATION_SEED)
    for start in range(0, len(pictures.validation), VALIDATION_BATCH):
        rows = slice(start, start + VALIDATION_BATCH)
        yield _batch(pictures.validation[rows], pictures.validation_captions[rows], random, objective, device)


def _batch(
    pictures: NDArray[np.uint8],
    captions: NDArray[np.int32],
    random: np.random.Generator,
    objective: Objective,
    device: torch.device,
) -> Batch:
    clean = (
        torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).to(device, torch.float32) / 127.5 - 1
    )  # [B, 3, S, S]
    times = torch.from_numpy(objective.times(random, len(pictures)))
    noise = torch.from_numpy(random.standard_normal(clean.shape, dtype=np.float32))
    return Batch(
        clean=clean.contiguous(),
        captions=torch.from_numpy(captions.astype(np.int64)).to(device),
        draw=Draw(times.to(device), noise.to(device)),
    )
