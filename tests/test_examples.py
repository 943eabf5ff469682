"""The examples run as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
