"""The whole of fmedge in a few minutes: train a small decoder, export it to int4, generate with it.

Run it with `make quickstart`. What is there already is used again; remove out/quickstart to start over.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import fmedge

FOLDER = Path("out/quickstart")
MODEL, BUNDLE = FOLDER / "model", FOLDER / "bundle"
MINUTES = 3.5
PROMPTS = (
    "Return a new list",
    "The following example shows how to",
    "A dictionary is",
    "If the file does not exist,",
)


def run(*arguments: str | Path) -> None:
    """Run a command of fmedge, and show it as one would type it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ fmedge {shlex.join(words)}", flush=True)
    finished = subprocess.run([sys.executable, "-m", "fmedge", *words], check=False)
    if finished.returncode != 0:
        sys.exit(finished.returncode)


def train() -> None:
    """Train on the documentation that Python carries, unless that was done before."""
    if MODEL.is_dir():
        print(f"{MODEL} is there from an earlier run: not trained again.")
        return
    unfinished = MODEL.with_name(f"{MODEL.name}.training").is_dir()
    resume = ["--resume"] if unfinished else []
    print(f"Training for {MINUTES} minutes on the text of Python's own documentation and docstrings.")
    run("train", "text", MODEL, "--preset", "tiny", "--minutes", str(MINUTES), "--checkpoint-minutes", "0.5", *resume)


def export() -> None:
    """Export to int4 with full evidence, unless that was done before."""
    if BUNDLE.is_dir():
        print(f"{BUNDLE} is there from an earlier run: not exported again.")
        return
    run("export", MODEL, BUNDLE, "--target", "cpu", "--quantize", "int4")


def rates() -> tuple[float, float]:
    """Tokens per second of one row, and of eight together."""
    sampling = fmedge.Sampling(max_new_tokens=128, ignore_eos=True)
    found = []
    # A model this small repeats itself, and what repeats itself is decoded several tokens at a time: not counted here.
    with fmedge.load(BUNDLE, prompt_lookup=False) as model:
        for rows in (1, 8):
            started = time.perf_counter()
            completions = model.generate([PROMPTS[0]] * rows, sampling)
            found.append(sum(len(item.tokens) for item in completions) / (time.perf_counter() - started))
    return found[0], found[1]


def table() -> list[tuple[str, str]]:
    """What came of it."""
    trained = json.loads((MODEL / "training.json").read_text("utf-8"))["result"]
    manifest = json.loads((BUNDLE / "fmedge.json").read_text("utf-8"))
    bundle_bytes = sum(facts["bytes"] for facts in manifest["files"].values())
    float_bytes = 4 * trained["parameters"]
    graph, full = (item["figures"] for item in manifest["evidence"])
    one, eight = rates()
    return [
        (
            "validation perplexity",
            f"{trained['perplexity_before']:.0f} before training, {trained['perplexity_after']:.1f} after",
        ),
        ("size", f"{bundle_bytes / 1e6:.1f} MB as an int4 bundle, {float_bytes / 1e6:.1f} MB as fp32 weights"),
        ("architecture", f"{graph['equal']} of {graph['tokens']} greedy tokens equal PyTorch's at fp32"),
        (
            "int4 against PyTorch",
            f"perplexity {full['perplexity']:.2f} instead of {full['source_perplexity']:.2f}, "
            f"KL {full['mean_kl']:.3f}, same best token {full['top1_agreement']:.0%}",
        ),
        ("speed", f"{one:.0f} tokens/s for one prompt, {eight:.0f} for eight together"),
    ]


def main() -> None:
    """Train, export, generate, report."""
    started = time.perf_counter()
    train()
    export()
    run(
        "generate", BUNDLE, *PROMPTS, "--max-new-tokens", "70", "--temperature", "0.6", "--top-p", "0.95", "--seed", "7"
    )
    print()
    rows = table()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print(f"\nThat took {time.perf_counter() - started:.0f} s. The bundle is {BUNDLE}; try it with your own words:")
    print(f'  .venv/bin/fmedge generate {BUNDLE} "The list type" --temperature 0.7')


if __name__ == "__main__":
    main()
