"""What a bundle's second graph is for, if it has one. Light to import: the CLI takes its choices from here."""

from __future__ import annotations

from typing import Literal, get_args

from fmedge_runtimes.errors import RequestError

PrefillGraph = Literal["prompts", "batches", "off"]
"""Pieces of prompts; steps of many rows, too, which influence each other there; nothing, so that it is not opened."""


def check_prefill_graph(use: str) -> None:
    """Raise RequestError for a use that there is not."""
    if use not in get_args(PrefillGraph):
        raise RequestError(f"prefill_graph is {use!r}; it must be one of {', '.join(get_args(PrefillGraph))}.")
