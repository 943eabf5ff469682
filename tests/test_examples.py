"""The examples run as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_batch_writes_a_completion_for_each_prompt(bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The list type\n\nOnce upon a time there\n" + "too long " * 400 + "\n")
    done = run("batch.py", bundle, prompts, tmp_path / "out.jsonl")
    assert done.returncode == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["The list type", "Once upon a time there"]
    assert all(record["completion"] for record in records)
    assert "context holds 256" in done.stderr


def test_stream_prints_what_generate_gives(bundle: Path) -> None:
    import fmedge

    done = run("stream.py", bundle, "The list")
    with fmedge.load(bundle) as model:
        (whole,) = model.generate("The list", fmedge.Sampling(max_new_tokens=64))
    assert done.stdout.rstrip("\n") == whole.text.rstrip("\n")
    assert f"({whole.stats.new_tokens} tokens" in done.stderr


def test_chat_turn_replies(bundle: Path) -> None:
    done = run("chat_turn.py", bundle, "What is a tuple?")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.medium
def test_images_writes_one_for_each_prompt_and_a_grid(stable_diffusion: tuple[Path, Path], tmp_path: Path) -> None:
    _, bundle = stable_diffusion
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle\n\na cat in the rain\n")
    start = tmp_path / "start.png"
    Image.new("RGB", (40, 32), "red").save(start)
    for name, more in (("made", ()), ("varied", (start,))):
        done = run("images.py", bundle, prompts, tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        assert "denoise" in done.stderr
        files = [tmp_path / name / file for file in ("00000.png", "00001.png", "grid.png")]
        assert sorted((tmp_path / name).iterdir()) == files
        assert [opened(file).text["parameters"].splitlines()[0] for file in files[:2]] == [
            "a small red circle",
            "a cat in the rain",
        ]
        assert opened(files[2]).size == (2 * opened(files[0]).width, opened(files[0]).height)
    assert opened(tmp_path / "varied" / "00000.png").size == (40, 32)


def opened(path: Path) -> Any:
    with Image.open(path) as image:
        image.load()
        return image
