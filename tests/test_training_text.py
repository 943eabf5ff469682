"""Whole runs of train_text on a model of a few thousand weights."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fmedge_runtimes.errors import DataError, TrainingError

from fmedge.training import pretraining, schedule
from fmedge.training.presets import PRESETS
from fmedge.training.schedule import learning_rate_factor
from fmedge.training.text import TextTraining, train_text
from fmedge.training.workfolder import WorkFolder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,  # So that a resumed run must restore the random state too.
    "tie_word_embeddings": True,
}
SEQUENCE = 32


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to share, and waiting for a second core that is busy takes long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Killed(BaseException):
    """Ends a run as a kill does: nothing between here and the test tidies up."""


@pytest.fixture
def options(tmp_path):
    """A run of 12 steps, in which one pass over the data takes 10."""
    lines = [f"Line {number} says that {number} and {number} make {2 * number}.\n" for number in range(100)]
    (tmp_path / "text.txt").write_text("".join(lines))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return TextTraining(
        output=tmp_path / "model",
        data=(str(tmp_path / "text.txt"),),
        config=tmp_path / "config.json",
        steps=12,
        sequence_length=SEQUENCE,
        batch=4,
        checkpoint_steps=5,
    )


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other):
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def killed_when(condition):
    def report(progress):
        if condition(progress):
            raise Killed

    return report


def validation_perplexity(folder, options):
    """Recomputed from the files alone, with the loss of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fmedge.training.corpus import documents_from_sources, split_documents

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    corpus = split_documents(documents_from_sources(options.data, field=options.field))
    ids = [token for text in corpus.validation for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    total = 0.0
    for start in range(0, len(ids) - 1, SEQUENCE):
        window = torch.tensor([ids[start : start + SEQUENCE + 1]])
        total += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
    return math.exp(total / (len(ids) - 1))


def test_a_run_learns_and_its_folder_loads_anywhere(options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen = []
    result = train_text(dataclasses.replace(options, steps=40, learning_rate=0.01), seen.append)
    assert result.perplexity_after < result.perplexity_before / 3
    assert result.perplexity_after == pytest.approx(validation_perplexity(options.output, options), rel=1e-5)

    names = {path.name for path in options.output.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "training.json"}
    assert names == {*expected, "tokenizer.json", "tokenizer_config.json"}
    assert not options.output.with_name("model.training").exists()

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(options.output),
        AutoTokenizer.from_pretrained(options.output),
    )
    assert model.num_parameters() == result.parameters
    assert model.config.vocab_size == 320 == result.vocabulary == len(tokenizer)
    assert model.config.use_cache
    special = model.generation_config
    assert (special.eos_token_id, special.bos_token_id, special.pad_token_id) == (tokenizer.eos_token_id,) * 3
    prompt = tokenizer("Line 7 says", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > prompt["input_ids"].shape[1]

    report = json.loads((options.output / "training.json").read_text())
    assert report["result"] == {name: value for name, value in dataclasses.asdict(result).items() if name != "output"}
    assert report["options"]["learning_rate"] == 0.01
    assert (result.steps, result.tokens_seen) == (40, 40 * 4 * SEQUENCE)
    assert result.tokens_per_second == pytest.approx(result.tokens_seen / result.seconds)

    steps = [moment.step for moment in seen if moment.phase == "training"]
    assert steps == list(range(1, 41))
    assert [moment.phase for moment in seen if moment.phase != "training"] == [
        *("reading", "tokenizing", "measuring", "writing", "measuring")
    ]


def test_a_seed_gives_the_same_weights_again(options):
    first = train_text(options)
    second = train_text(dataclasses.replace(options, output=options.output.with_name("second")))
    assert_same_weights(first.output, second.output)
    assert first.perplexity_after == second.perplexity_after
    other = train_text(dataclasses.replace(options, output=options.output.with_name("third"), seed=1))
    assert other.perplexity_after != first.perplexity_after


@pytest.mark.parametrize(
    "moment",
    [
        lambda progress: progress.phase == "tokenizing",
        lambda progress: progress.step == 3,  # Before the first checkpoint.
        lambda progress: progress.step == 8,
        lambda progress: progress.step == 11,  # In the second pass over the data.
        lambda progress: progress.phase == "measuring" and progress.fraction == 1,  # All but the rename.
    ],
    ids=["tokenizing", "early", "checkpoint", "epoch", "written"],
)
def test_a_killed_run_leaves_no_output_and_resumes_to_the_same_weights(options, moment):
    whole = dataclasses.replace(options, output=options.output.with_name("whole"))
    train_text(whole)
    with pytest.raises(Killed):
        train_text(options, killed_when(moment))
    assert not options.output.exists()
    result = train_text(dataclasses.replace(options, resume=True))
    assert result.steps == 12
    assert_same_weights(options.output, whole.output)
    assert not options.output.with_name("model.training").exists()


KILLED_IN_A_CHECKPOINT = """
import os, signal, sys, json
from pathlib import Path
from fmedge.training import workfolder
from fmedge.training import pretraining, schedule
from fmedge.training.presets import PRESETS
from fmedge.training.schedule import learning_rate_factor
from fmedge.training.text import TextTraining, train_text

complete = workfolder.WorkFolder.complete_checkpoint

def torn(self, step, seconds):
    if step == 5:
        return complete(self, step, seconds)
    weights = self.checkpoints / f"checkpoint-{step}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    os.kill(os.getpid(), signal.SIGKILL)

workfolder.WorkFolder.complete_checkpoint = torn
options = json.loads(sys.argv[1])
paths = {name: Path(options.pop(name)) for name in ("output", "config")}
train_text(TextTraining(**{**options, **paths, "data": tuple(options["data"])}))
"""


@pytest.mark.medium
def test_a_kill_within_a_checkpoint_costs_that_checkpoint_only(options):
    whole = dataclasses.replace(options, output=options.output.with_name("whole"))
    train_text(whole)
    plain = json.dumps(dataclasses.asdict(options), default=str)
    path = os.pathsep.join(sys.path)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_CHECKPOINT, plain],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (killed.stdout, killed.stderr) == ("", "")
    assert not options.output.exists()
    work = options.output.with_name("model.training")
    assert {path.name for path in (work / "checkpoints").iterdir()} == {"checkpoint-5", "checkpoint-10"}

    steps = []
    train_text(dataclasses.replace(options, resume=True), lambda progress: steps.append(progress.step))
    assert min(filter(None, steps)) == 6
    assert_same_weights(options.output, whole.output)


def test_minutes_end_the_run_and_count_across_a_kill(options, monkeypatch):
    clock = itertools.count(step=0.125)  # Every look at the clock takes an eighth of a second.
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    timed = dataclasses.replace(options, steps=None, minutes=3 / 60, checkpoint_steps=4)
    rates = []

    def factor(fraction):
        rates.append(learning_rate_factor(fraction))
        return rates[-1]

    monkeypatch.setattr(pretraining, "learning_rate_factor", factor)
    with pytest.raises(Killed):
        train_text(timed, killed_when(lambda progress: progress.step == 10))
    seen = []
    result = train_text(dataclasses.replace(timed, resume=True), seen.append)
    training = [progress for progress in seen if progress.phase == "training"]
    # The last checkpoint has the looks of 8 steps and of 2 checkpoints.
    assert (training[0].step, training[0].seconds) == (9, pytest.approx(11 / 8))
    assert [progress.fraction == 1.0 for progress in training] == [False] * (len(training) - 1) + [True]
    assert 3.0 <= result.seconds <= 3.25
    assert rates[-2 * len(training)] == pytest.approx(learning_rate_factor(11 / 24))
    assert rates[-2:] == [0.0, 0.0]  # One for each of the optimizer's parameter groups.


def test_a_checkpoint_is_written_every_so_many_minutes(options, monkeypatch):
    clock = itertools.count(step=1)
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    saved = []
    complete = WorkFolder.complete_checkpoint
    monkeypatch.setattr(
        WorkFolder,
        "complete_checkpoint",
        lambda *arguments: saved.append(arguments[1]) or complete(*arguments),
    )
    train_text(dataclasses.replace(options, checkpoint_minutes=4 / 60, checkpoint_steps=None))
    assert saved == [4, 7, 10]  # Writing one takes a look at the clock, too.


def test_a_resumed_run_keeps_to_its_options_and_needs_no_data(options, tmp_path):
    with pytest.raises(Killed):
        train_text(options, killed_when(lambda progress: progress.step == 6))
    with pytest.raises(TrainingError, match=r"other options \(steps was 12, is 13\)"):
        train_text(dataclasses.replace(options, resume=True, steps=13))
    with pytest.raises(TrainingError, match=r"model\.training: holds an interrupted run: continue it"):
        train_text(options)
    (tmp_path / "text.txt").unlink()
    result = train_text(dataclasses.replace(options, resume=True, checkpoint_steps=3))
    assert result.steps == 12


def test_force_discards_an_interrupted_run(options):
    with pytest.raises(Killed):
        train_text(options, killed_when(lambda progress: progress.step == 6))
    steps = []
    train_text(dataclasses.replace(options, force=True), lambda progress: steps.append(progress.step))
    assert 1 in steps


def test_an_output_is_replaced_by_force_only_and_only_by_a_complete_one(options, tmp_path):
    train_text(options)
    before = weights(options.output)
    with pytest.raises(TrainingError, match="model: exists already: replace it with --force"):
        train_text(options)
    again = dataclasses.replace(options, force=True, seed=1)
    with pytest.raises(Killed):
        train_text(again, killed_when(lambda progress: progress.phase == "writing"))
    np.testing.assert_array_equal(weights(options.output)["model.norm.weight"], before["model.norm.weight"])
    train_text(again)
    assert not np.array_equal(weights(options.output)["model.norm.weight"], before["model.norm.weight"])

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("Dear")
    with pytest.raises(TrainingError, match="--force replaces a model's folder only"):
        train_text(dataclasses.replace(options, output=tmp_path / "home", force=True))
    assert (tmp_path / "home" / "letter.txt").read_text() == "Dear"


def test_two_runs_do_not_share_a_folder(options):
    def second_run(progress):
        if progress.step == 2:
            with pytest.raises(TrainingError, match="another run is using it"):
                train_text(dataclasses.replace(options, force=True))

    assert train_text(options, second_run).steps == 12


def test_a_resume_without_a_run_is_refused(options):
    with pytest.raises(TrainingError, match="there is no interrupted run to resume"):
        train_text(dataclasses.replace(options, resume=True))


def test_unusable_data_is_refused_before_training_and_leaves_nothing(options, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"bad\.txt: is not UTF-8 \(byte 0xe9 at offset 3\)"):
        train_text(dataclasses.replace(options, data=(str(tmp_path / "bad.txt"),)))
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(DataError, match=r"too little text: it gives 0 training sequences of 32 tokens"):
        train_text(dataclasses.replace(options, data=(str(tmp_path / "short.txt"),)))
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "config.json", "bad.txt", "short.txt"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no-such-model"}, "transformers builds no language model from it"),
        ({"model_type": "vit"}, "transformers builds no language model from it"),
        ({"num_attention_heads": 5}, "transformers builds no language model from it"),
        ({"model_type": None}, "transformers builds no language model from it"),
        ({"max_position_embeddings": 16}, "--sequence-length 32 is more than the model's context of 16"),
    ],
)
def test_an_unusable_config_is_named(options, change, message):
    options.config.write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(TrainingError) as error:
        train_text(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not options.output.with_name("model.training").exists()


def test_a_config_that_is_no_config_is_named(options):
    for content, message in (("[]", 'with a "model_type"'), ("{", "config.json: is not JSON")):
        options.config.write_text(content)
        with pytest.raises(TrainingError, match=message):
            train_text(options)
    options.config.unlink()
    with pytest.raises(TrainingError, match=r"config\.json: cannot be read: No such file"):
        train_text(options)


def test_another_architecture_and_another_tokenizer(options, tmp_path):
    first = train_text(options)
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": 512,
    }
    options.config.write_text(json.dumps(gpt2))
    again = dataclasses.replace(options, output=tmp_path / "gpt2", tokenizer=first.output)
    result = train_text(again)
    assert result.vocabulary == 320
    assert (result.output / "tokenizer.json").read_bytes() == (first.output / "tokenizer.json").read_bytes()
    config = json.loads((result.output / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("gpt2", 512)
    assert result.perplexity_after == pytest.approx(validation_perplexity(result.output, again), rel=1e-5)
    options.config.write_text(json.dumps({**gpt2, "vocab_size": 300}))
    with pytest.raises(TrainingError, match="its vocab_size of 300 is less than the 320 tokens of"):
        train_text(dataclasses.replace(again, force=True))


def test_a_run_that_diverges_is_an_error_and_writes_nothing(options):
    with pytest.raises(TrainingError, match="diverged: the loss is no number at step 10: use a smaller"):
        train_text(dataclasses.replace(options, learning_rate=1e30, checkpoint_steps=None))
    assert not options.output.exists()
    assert not options.output.with_name("model.training").exists()


def test_without_a_vocabulary_in_the_config_the_preset_says_it(options):
    options.config.write_text(json.dumps({name: CONFIG[name] for name in CONFIG if name != "vocab_size"}))
    result = train_text(options)
    config = json.loads((options.output / "config.json").read_text())
    assert 257 < result.vocabulary == config["vocab_size"] < PRESETS["tiny"].vocabulary  # So little text.


def test_a_config_in_half_precision_is_trained_in_full(options):
    options.config.write_text(json.dumps({**CONFIG, "dtype": "bfloat16"}))
    train_text(options)
    assert {str(array.dtype) for array in weights(options.output).values()} == {"float32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "either --minutes or --steps"),
        ({"minutes": 1.0}, "either --minutes or --steps"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"steps": None, "minutes": math.nan}, "--minutes must be more than 0"),
        ({"preset": "huge"}, 'there is no preset "huge": choose one of tiny, small, base'),
        ({"sequence_length": 1}, "--sequence-length must be at least 2"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"learning_rate": -1.0}, "--learning-rate must be more than 0"),
        ({"checkpoint_minutes": 0.0}, "--checkpoint-minutes must be more than 0"),
        ({"checkpoint_steps": 0}, "--checkpoint-steps must be at least 1"),
        ({"seed": -1}, "--seed must be from 0"),
    ],
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(TrainingError, match=message):
        TextTraining(**{"output": Path("model"), "steps": 1, **change})


def test_a_missing_extra_is_named(options, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else name)
    with pytest.raises(TrainingError, match=r"accelerate is not installed: pip install 'fmedge\[train\]'"):
        train_text(options)


def test_an_output_needs_a_name_and_a_folder_to_stand_in(options, tmp_path):
    (tmp_path / "nowhere").write_text("a file")
    with pytest.raises(TrainingError, match="nowhere: cannot hold model"):
        train_text(dataclasses.replace(options, output=tmp_path / "nowhere" / "model"))
    with pytest.raises(TrainingError, match="name a folder to write"):
        train_text(dataclasses.replace(options, output=Path("/")))


TORCHRUN = "import sys; from fmedge.commands.train import app; app(sys.argv[1:])"


@pytest.mark.medium
def test_torchrun_trains_on_two_processes_and_one_of_them_writes(options, tmp_path):
    (tmp_path / "run.py").write_text(TORCHRUN)
    arguments = {
        "--data": options.data[0],
        "--config": str(options.config),
        "--steps": "6",
        "--sequence-length": str(SEQUENCE),
        "--batch": "2",
        "--checkpoint-steps": "2",
    }
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(tmp_path / "run.py"), "text", str(options.output), "--json"),
            *(part for pair in arguments.items() for part in pair),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)  # One line: the other process prints nothing.
    assert (result["devices"], result["tokens_seen"]) == (2, 6 * 2 * 2 * SEQUENCE)
    assert result["perplexity_after"] == pytest.approx(validation_perplexity(options.output, options), rel=1e-5)
    alone = train_text(dataclasses.replace(options, output=tmp_path / "alone", steps=6))
    # The same sequences in each step, but added up in another order.
    assert result["perplexity_after"] == pytest.approx(alone.perplexity_after, rel=0.01)
