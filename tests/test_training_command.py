"""fmedge train text, from the command line."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys

import pytest
from fmedge_runtimes.errors import DataError, TrainingError
from typer.testing import CliRunner

from fmedge.commands import train
from fmedge.commands.train import app
from fmedge.training.text import TextTrainingResult

TINY = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
TINY |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}

RESULT_FIELDS = [field.name for field in dataclasses.fields(TextTrainingResult)]


@pytest.fixture
def small(tmp_path):
    """Arguments for a model and a batch that a test can afford."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return [
        *("--config", str(tmp_path / "config.json")),
        *("--steps", "2", "--batch", "1", "--sequence-length", "16"),
    ]


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, ["text", *map(str, arguments)], input=stdin)


def test_standard_input_is_trained_on_and_json_is_one_line(tmp_path, small):
    text = "".join(f"Sentence number {number}. " for number in range(100))
    result = run(tmp_path / "model", "--data", "-", *small, "--json", stdin=text)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # No bar where there is no terminal.
    line = json.loads(result.stdout)
    assert line["output"] == str(tmp_path / "model")
    assert line["steps"] == 2
    again = run(tmp_path / "model", "--data", "-", *small, "--force", stdin=text)
    assert again.stdout.startswith(f"{tmp_path / 'model'}: ")
    assert f"perplexity {line['perplexity_before']:.0f} before" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], TrainingError, "either --minutes or --steps"),
        (["--steps", "1", "--preset", "huge"], TrainingError, 'no preset "huge"'),
        (["--steps", "1", "--data", "nowhere.txt"], DataError, "nowhere.txt: there is no such file"),
        (["--steps", "1", "--resume"], TrainingError, "no interrupted run to resume"),
    ],
)
def test_unusable_input_exits_1(tmp_path, arguments, error, message):
    result = run(tmp_path / "model", *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--steps", "many"], ["--precision", "int4"], ["--no-such-option"]])
def test_wrong_usage_exits_2(tmp_path, arguments):
    assert run(tmp_path / "model", *arguments).exit_code == 2


def test_the_bar_shows_the_step_and_the_loss(tmp_path, small, monkeypatch):
    shown = []
    bar = contextlib.nullcontext(lambda *stage: shown.append(stage))
    monkeypatch.setattr(train, "progress_bar", lambda: bar)
    small[small.index("--steps") + 1] = "11"
    text = "".join(f"Sentence number {number}. " for number in range(100))
    assert run(tmp_path / "model", "--data", "-", *small, stdin=text).exit_code == 0
    assert ("reading", 0, 1000) in shown
    training = [stage for stage in shown if stage[0].startswith("training")]
    assert [done for _, done, _ in training] == [round(step / 11 * 1000) for step in range(1, 12)]
    stage, done, total = training[-1]
    assert re.fullmatch(r"training, step 11, \d+ tokens/s, loss \d\.\d{3}", stage)
    assert done == total


def test_other_processes_of_torchrun_print_nothing(tmp_path, monkeypatch):
    result = TextTrainingResult(**dict.fromkeys(RESULT_FIELDS))
    monkeypatch.setattr(train, "train_text", lambda options, report: result)
    monkeypatch.setenv("RANK", "1")
    done = run(tmp_path / "model", "--steps", "1", "--json")
    assert (done.exit_code, done.output) == (0, "")


def test_importing_the_command_imports_nothing_heavy():
    heavy = ["torch", "transformers", "tokenizers", "numpy", "accelerate", "rich.progress"]
    code = f"import sys, fmedge.commands.train; print([name for name in {heavy} if name in sys.modules])"
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def small_image(monkeypatch):
    """A preset and drawings that a test can afford."""
    from fmedge.training import image_preparation, image_presets

    preset = image_presets.ImagePreset(32, 1, 2, 2.5, 8, 16, 1, 2, batch=4, learning_rate=4e-3)
    monkeypatch.setattr(image_presets, "IMAGE_PRESETS", {"tiny": preset})
    monkeypatch.setattr(image_preparation, "VARIANTS", 1)


def run_image(*arguments):
    return CliRunner().invoke(app, ["image", *map(str, arguments)])


def test_an_image_model_is_trained_and_json_is_one_line(tmp_path, small_image, monkeypatch):
    shown = []
    bar = contextlib.nullcontext(lambda *stage: shown.append(stage))
    monkeypatch.setattr(train, "progress_bar", lambda: bar)
    result = run_image(tmp_path / "model", "--steps", 11, "--size", 24, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    line = json.loads(result.stdout)
    assert (line["output"], line["steps"], line["pictures_seen"]) == (str(tmp_path / "model"), 11, 44)
    stage, done, total = [stage for stage in shown if stage[0].startswith("training")][-1]
    assert re.fullmatch(r"training, step 11, \d+ pictures/s, loss \d\.\d{3}", stage)
    assert done == total
    again = run_image(tmp_path / "model", "--steps", 1, "--size", 24, "--objective", "ddpm-v", "--force")
    assert again.stdout.startswith(f"{tmp_path / 'model'}: ")
    assert "loss" in again.stdout
    scheduler = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], TrainingError, "either --minutes or --steps"),
        (["--steps", 1, "--preset", "huge"], TrainingError, 'no preset "huge"'),
        (["--steps", 1, "--data", "nowhere"], DataError, "nowhere: there is no such folder"),
        (["--steps", 1, "--size", 30], TrainingError, "--size must be a multiple of 8"),
        (["--steps", 1, "--resume"], TrainingError, "no interrupted run to resume"),
    ],
)
def test_unusable_image_input_exits_1(tmp_path, arguments, error, message):
    result = run_image(tmp_path / "model", *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--steps", "many"], ["--objective", "gan"], ["--precision", "int4"]])
def test_wrong_image_usage_exits_2(tmp_path, arguments):
    assert run_image(tmp_path / "model", *arguments).exit_code == 2
