"""What a run asks of its devices and its other processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Iterator

import torch
from accelerate import PartialState
from fmedge_runtimes.errors import TrainingError

from fmedge.training.schedule import Budget


@contextlib.contextmanager
def reproducible(budget: Budget) -> Iterator[None]:
    """Ask CUDA for deterministic kernels where the run promises the same weights again."""
    if budget.steps is None or not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def processes() -> PartialState:
    """The processes of torchrun, joined; alone, one. accelerate must be told that they have no accelerator."""
    state = PartialState(cpu=torch.accelerator.current_accelerator(check_available=True) is None)
    _leave_at_exit()
    return state


@functools.cache
def _leave_at_exit() -> None:
    """Leave the other processes in order: a thread of theirs that still runs when Python ends may abort the process."""
    atexit.register(lambda: PartialState().destroy_process_group())


def agreed(seconds: float, device: torch.device) -> float:
    """Rank 0's time, in every process."""
    if not torch.distributed.is_initialized():
        return seconds
    time = torch.tensor([seconds], device=device)
    torch.distributed.broadcast(time, src=0)
    return float(time)


def device_name(device: torch.device) -> str:
    """The model of a GPU; else what kind of device it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def diverged(step: int) -> TrainingError:
    """The error of a run whose loss is no number."""
    return TrainingError(f"the training diverged: the loss is no number at step {step}: use a smaller --learning-rate")
