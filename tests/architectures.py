"""Every causal language model that transformers knows, exported and compared: python tests/architectures.py

Each model type gets a tiny random model, saved as on the hub, exported in fp32 and run by the runtime in a ragged batch
with prefill in chunks; every token must be the one that PyTorch chooses. Writes docs/architectures.md from what ran.
Options: model types (all unless given, which also writes the page), --update (write the given types into the page, and
leave the others as they are there), --jobs N.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
LENGTHS = (1, 40, 7, 3, 23)
"""Of the prompts; more than the batch has rows, so that some wait."""
BUDGETS = (16, 5, 12, 16, 1)
CHUNK = 16
NEAR_TIE = 1e-3
"""Logits closer than this are level: kernels add in different orders."""
SECONDS = 600
"""After which a model type counts as failed."""


@dataclass(frozen=True)
class Outcome:
    """What became of one model type."""

    model_type: str
    kind: str
    """exact, refused, mismatch, or not a text decoder."""
    detail: str
    """Why it was refused, or what the exported layers keep."""


def evaluate(model_type: str, folder: Path, **changes: object) -> Outcome:
    """Export a tiny model of a type and compare its greedy tokens with PyTorch's."""
    import numpy as np
    from fmedge_converters.export import export
    from fmedge_converters.export_options import ExportOptions
    from fmedge_converters.reduced import write_random_model
    from fmedge_runtimes.errors import FmedgeError
    from fmedge_runtimes.load import load
    from fmedge_runtimes.sampling import Sampling
    from tiny import tiny_config

    config = tiny_config(model_type, **changes)
    if getattr(config, "is_encoder_decoder", False):
        return Outcome(model_type, "not a text decoder", "half of an encoder-decoder model")
    try:
        reference = write_random_model(config, folder / "model", seed=0)
        bundle = export(ExportOptions(str(folder / "model"), folder / "bundle", verify="none"))
    except FmedgeError as error:
        encoder = "it is an encoder" in str(error)
        kind = "not a text decoder" if encoder else "refused"
        return Outcome(model_type, kind, brief(str(error), folder))
    facts = bundle.manifest.text
    random = np.random.default_rng(0)
    prompts = [random.integers(3, facts.vocabulary, length).tolist() for length in LENGTHS]
    budgets = [Sampling(max_new_tokens=budget, ignore_eos=True) for budget in BUDGETS]
    with load(bundle.folder, max_batch=3, threads=1) as model:
        found = [list(completion.tokens) for completion in model.generate(prompts, budgets)]
    total = sum(map(len, found))
    wrong = differing(reference, prompts, found, NEAR_TIE)
    if wrong or total != sum(BUDGETS):
        return Outcome(model_type, "mismatch", f"{wrong} of {total} tokens differ from PyTorch's")
    return Outcome(model_type, "exact", _kept(bundle.manifest.text))


def differing(
    reference: torch.nn.Module, prompts: Sequence[list[int]], found: Sequence[list[int]], near_tie: float
) -> int:
    """How many tokens of the continuations of prompts a model of transformers would not have chosen."""
    import torch
    from fmedge_converters.decoder import quiet_libraries

    wrong = 0
    with torch.no_grad(), quiet_libraries():
        for prompt, tokens in zip(prompts, found, strict=True):
            ids = torch.tensor([[*prompt, *tokens[:-1]]])  # [1, S]
            logits = reference(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]  # [T, V]
            leads = logits.max(-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]  # [T]
            wrong += int((leads > near_tie).sum())
    return wrong


def _kept(facts: object) -> str:
    """What the layers of an exported model keep."""
    from fmedge_runtimes.manifest import TextFacts

    assert isinstance(facts, TextFacts)
    words = []
    if whole := sum(not cache.rolling for cache in facts.caches):
        words.append(f"{whole} caches")
    if windows := sum(cache.rolling for cache in facts.caches):
        words.append(f"{windows} window caches")
    if facts.states:
        words.append(f"{len(facts.states)} states")
    return ", ".join(words)


def brief(message: str, folder: Path) -> str:
    """A message for a row of the page."""
    return message.replace(f"{folder}/model", "the checkpoint").replace("|", "/").replace("\n", " ")


def run_all(
    model_types: list[str], jobs: int, evaluate: Callable[[str, Path], Outcome] = evaluate, seconds: int = SECONDS
) -> list[Outcome]:
    """Evaluate each type in a process of its own, forked once everything is imported; one that takes longer ends."""
    import fmedge_converters.export  # noqa: F401 - imported once, for all children
    import fmedge_runtimes.text  # noqa: F401 - as above
    import tiny  # noqa: F401 - as above
    import torch

    torch.set_num_threads(1)
    outcomes: dict[str, Outcome] = {}
    live: dict[int, tuple[str, int]] = {}

    def reap() -> None:
        pid, status = os.wait()
        model_type, pipe = live.pop(pid)
        with os.fdopen(pipe) as file:
            text = file.read()
        outcomes[model_type] = (
            Outcome(**json.loads(text))
            if text and status == 0
            else Outcome(model_type, "refused", f"the process ended with status {status}, or took {seconds} s")
        )
        found = outcomes[model_type]
        print(f"{len(outcomes)}/{len(model_types)} {model_type}: {found.kind} ({found.detail})", flush=True)

    for model_type in model_types:
        while len(live) >= jobs:
            reap()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(evaluate, model_type, writer, seconds)
        os.close(writer)
        live[pid] = model_type, reader
    while live:
        reap()
    return [outcomes[model_type] for model_type in model_types]


def _child(evaluate: Callable[[str, Path], Outcome], model_type: str, pipe: int, seconds: int) -> None:
    signal.alarm(seconds)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        with tempfile.TemporaryDirectory(prefix="fmedge-") as folder:
            outcome = evaluate(model_type, Path(folder))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        outcome = Outcome(model_type, "refused", f"{type(error).__name__}: {first[:300]}")
    with os.fdopen(pipe, "w") as file:
        file.write(json.dumps(vars(outcome)))
    os._exit(0)


def page(outcomes: list[Outcome]) -> str:
    """docs/architectures.md."""
    import torch
    import transformers

    kinds = ("exact", "refused", "mismatch", "not a text decoder")
    counts = {kind: [outcome for outcome in outcomes if outcome.kind == kind] for kind in kinds}
    lines = [
        "# Architectures",
        "",
        "Written by `python tests/architectures.py` from what ran; do not edit. Each model type of transformers'",
        "causal language models got a tiny random model, saved as on the hub, exported in fp32, and run in a ragged",
        f"batch (prompts of {', '.join(map(str, LENGTHS))} tokens in three rows, prefill in chunks of {CHUNK}).",
        "*Exact*: every greedy token is PyTorch's. No code of fmedge knows any of these types.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, "
        f"{datetime.date.today().isoformat()}: "
        + ", ".join(f"{len(counts[kind])} {kind}" for kind in kinds if counts[kind])
        + f", of {len(outcomes)}.",
    ]
    for kind in kinds:
        if not counts[kind]:
            continue
        last = {"exact": "its layers keep"}.get(kind, "why")
        lines += ["", f"## {kind.capitalize()}", "", f"| model type | {last} |", "|---|---|"]
        lines += [f"| {outcome.model_type} | {outcome.detail} |" for outcome in counts[kind]]
    return "\n".join(lines) + "\n"


def recorded() -> dict[str, Outcome]:
    """What the page says of each model type."""
    outcomes: dict[str, Outcome] = {}
    kind = ""
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            kind = line.removeprefix("## ").lower()
        elif line.startswith("| ") and not line.startswith("| model type"):
            model_type, detail = line.removeprefix("| ").removesuffix(" |").split(" | ", 1)
            outcomes[model_type] = Outcome(model_type, kind, detail)
    return outcomes


def documented() -> dict[str, str]:
    """The kind that the page states for each model type."""
    return {model_type: outcome.kind for model_type, outcome in recorded().items()}


def main() -> None:
    """Run from the command line."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--update", action="store_true", help="write the given model types into the page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes = run_all(options.model_types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), options.jobs)
    if options.update:
        known = recorded() | {outcome.model_type: outcome for outcome in outcomes}
        outcomes = [known[model_type] for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if model_type in known]
    if options.model_types and not options.update:
        print(page(outcomes))
    else:
        PAGE.write_text(page(outcomes), "utf-8")
    mismatches = [outcome.model_type for outcome in outcomes if outcome.kind == "mismatch"]
    sys.exit(f"mismatch: {', '.join(mismatches)}" if mismatches else 0)


if __name__ == "__main__":
    main()
