"""How commands ask for a device, and for a bundle's second graph."""

from __future__ import annotations

from typing import Annotated

import typer
from fmedge_runtimes.prefill_graph import PrefillGraph

DEVICE_HELP = "cpu, cuda (cuda:1 for the second GPU), tensorrt or rtx; the bundle's target unless given."
GRAPHS_HELP = "On a GPU: record the steps that come often, and replay them."

PrefillOption = Annotated[
    PrefillGraph,
    typer.Option(
        help="What a second graph (--prefill) serves: prompts; batches, too, whose rows then influence each other; "
        "or off: it takes no memory."
    ),
]
