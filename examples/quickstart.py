"""The whole of fmedge in a few minutes: train a small decoder and a small image model, export both, generate with both.

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
PAINTER, PICTURES = FOLDER / "painter", FOLDER / "pictures"
MADE, GRID = FOLDER / "made", FOLDER / "grid.png"
MINUTES = 2.5
PAINTER_STEPS = 2000
PROMPTS = (
    "Return a new list",
    "The following example shows how to",
    "A dictionary is",
    "If the file does not exist,",
)
CAPTIONS = (
    "a large red circle in the center",
    "a small blue square in the left",
    "a large green triangle in the top",
    "a small purple circle in the bottom",
    "a large orange square in the right",
    "a small yellow triangle in the center",
)


def run(*arguments: str | Path) -> None:
    """Run a command of fmedge, and show it as one would type it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ fmedge {shlex.join(words)}", flush=True)
    finished = subprocess.run([sys.executable, "-m", "fmedge", *words], check=False)
    if finished.returncode != 0:
        sys.exit(finished.returncode)


def is_new(folder: Path) -> bool:
    """Whether something is still to be made; says so if it is not."""
    if folder.is_dir():
        print(f"{folder} is there from an earlier run: not made again.")
        return False
    return True


def resuming(folder: Path) -> list[str]:
    """What continues a run that was interrupted."""
    return ["--resume"] if folder.with_name(f"{folder.name}.training").is_dir() else []


def text() -> None:
    """Train a decoder on the documentation that Python carries, export it to int4, complete prompts."""
    if is_new(MODEL):
        print(f"Training for {MINUTES} minutes on the text of Python's own documentation and docstrings.")
        often = ("--checkpoint-minutes", "0.5")
        run("train", "text", MODEL, "--preset", "tiny", "--minutes", str(MINUTES), *often, *resuming(MODEL))
    if is_new(BUNDLE):
        run("export", MODEL, BUNDLE, "--target", "cpu", "--quantize", "int4")
    sampling = ("--max-new-tokens", "70", "--temperature", "0.6", "--top-p", "0.95", "--seed", "7")
    run("generate", BUNDLE, *PROMPTS, *sampling)


def images() -> None:
    """Train a diffusion model on captioned shapes that are drawn here, export it, make a grid of images."""
    if is_new(PAINTER):
        print("Training on captioned shapes: a fifth of the combinations are never shown.")
        often = ("--checkpoint-minutes", "0.5")
        run("train", "image", PAINTER, "--steps", str(PAINTER_STEPS), *often, *resuming(PAINTER))
    if is_new(PICTURES):
        run("export", PAINTER, PICTURES, "--target", "cpu")
    run("generate", PICTURES, *CAPTIONS, "--seed", "7", "--output", MADE, "--grid", GRID, "--force")


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


def images_per_second() -> float:
    """Of the image bundle, many at once."""
    with fmedge.load_image(PICTURES, max_batch=16) as model:
        model.generate(CAPTIONS[0], fmedge.Diffusion(seed=0))
        started = time.perf_counter()
        made = model.generate(CAPTIONS[0], fmedge.Diffusion(seed=0, n=64))
        return len(made) / (time.perf_counter() - started)


def accuracy() -> tuple[float, float]:
    """How many images show all that their captions say: of combinations that were trained on, and of held-out ones."""
    words = [sys.executable, "-m", "fmedge", "eval", str(PICTURES), "--json"]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return found["seen"]["all"], found["held_out"]["all"]


def table() -> list[tuple[str, str]]:
    """What came of it."""
    trained = json.loads((MODEL / "training.json").read_text("utf-8"))["result"]
    manifest = json.loads((BUNDLE / "fmedge.json").read_text("utf-8"))
    bundle_bytes = sum(facts["bytes"] for facts in manifest["files"].values())
    float_bytes = 4 * trained["parameters"]
    graph, full = (item["figures"] for item in manifest["evidence"])
    one, eight = rates()
    seen, held_out = accuracy()
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
        ("text speed", f"{one:.0f} tokens/s for one prompt, {eight:.0f} for eight together"),
        ("images", f"{seen:.0%} show all of their caption, {held_out:.0%} for combinations that were never trained on"),
        ("image speed", f"{images_per_second():.0f} images/s of 32x32 in 10 steps"),
    ]


def main() -> None:
    """Train, export, generate, report."""
    started = time.perf_counter()
    text()
    images()
    print()
    rows = table()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print(
        f"\nThat took {time.perf_counter() - started:.0f} s. The images are in {GRID}. Try the bundles with your words:"
    )
    print(f'  .venv/bin/fmedge generate {BUNDLE} "The list type" --temperature 0.7')
    print(f'  .venv/bin/fmedge generate {PICTURES} "a large blue circle in the top" --output circle.png')


if __name__ == "__main__":
    main()
