"""Whole runs of train_image on a model of a few thousand weights."""

import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fmedge_runtimes.errors import DataError, TrainingError
from PIL import Image
from safetensors.numpy import load_file

from fmedge.training import image_preparation, image_presets
from fmedge.training.image import ImageTraining, train_image
from fmedge.training.image_presets import ImagePreset

MINUTE = ImagePreset(32, 1, 2, 2.5, 8, 16, 1, 2, batch=8, learning_rate=4e-3)
"""A preset that takes milliseconds a step."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model, drawings and threads that a test can afford."""
    import torch

    monkeypatch.setattr(image_presets, "IMAGE_PRESETS", {"minute": MINUTE})
    monkeypatch.setattr(image_preparation, "VARIANTS", 1)
    monkeypatch.setattr(image_preparation, "HELD_OUT_VARIANTS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def options(tmp_path):
    """A run of 24 steps, in which one pass over the pictures takes 18."""
    return ImageTraining(
        output=tmp_path / "model", preset="minute", size=24, steps=24, sample_minutes=0, checkpoint_steps=5
    )


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") | load_file(
        folder / "text_encoder" / "model.safetensors"
    )


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


class Killed(BaseException):
    """Ends a run as a kill does: nothing between here and the test tidies up."""


def killed_at(step):
    def report(progress):
        if progress.phase == "training" and progress.step == step:
            raise Killed

    return report


def test_a_run_learns_and_diffusers_opens_its_folder_and_samples(options):
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PRXTransformer2DModel

    reports = []
    result = train_image(options, reports.append)
    assert result.loss_after < result.loss_before / 2
    assert (result.steps, result.pictures_seen, result.device) == (24, 24 * 8, "cpu")
    assert (result.train_pictures, result.validation_pictures, result.captions_cut) == (144, 36, 0)
    assert result.pictures_per_second == pytest.approx(result.pictures_seen / result.seconds)
    phases = list(dict.fromkeys(report.phase for report in reports))
    assert phases == ["reading", "tokenizing", "measuring", "training", "writing"]
    assert [report.step for report in reports if report.phase == "training"] == list(range(1, 25))
    assert not options.output.with_name("model.training").exists()

    pipeline = DiffusionPipeline.from_pretrained(options.output, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.transformer, PRXTransformer2DModel)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    images = pipeline(
        ["a small red circle in the left", "a large blue square in the top"], num_inference_steps=3
    ).images
    assert [image.size for image in images] == [(24, 24)] * 2
    assert sum(parameter.numel() for parameter in pipeline.transformer.parameters()) < result.parameters

    report = json.loads((options.output / "training.json").read_text())
    assert report["options"]["objective"] == "flow-x"
    assert report["options"]["batch"] == 8
    assert report["result"]["loss_after"] == result.loss_after
    with Image.open(options.output / "samples" / "step-000024.png") as grid:
        assert min(grid.size) > 4 * 96


def test_the_pipeline_guides_repeats_and_seeds_as_those_of_diffusers(options):
    import torch

    from fmedge.training.denoiser import read_pipeline

    train_image(options)
    pipeline = read_pipeline(options.output)

    def arrays(prompts, seeds, **others):
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(prompts, generator=noise, output_type="np", num_inference_steps=3, **others).images

    one, two = "a small red circle in the left", "a large blue square in the top"
    both = arrays([one, two], [5, 6])
    assert np.allclose(both, np.concatenate([arrays(one, [5]), arrays(two, [6])]), atol=1e-5)
    guided = arrays([one, two], [5, 6], guidance_scale=2.0)
    assert not np.allclose(both, guided, atol=1e-3)
    # Guidance away from the prompt itself is none.
    assert np.allclose(arrays([one], [5], guidance_scale=2.0, negative_prompt=one), both[:1], atol=1e-4)
    assert arrays(one, [1, 2, 3], num_images_per_prompt=3).shape == (3, 24, 24, 3)
    assert arrays(one, [1], height=16, width=24).shape == (1, 16, 24, 3)
    latents = pipeline(one, latents=torch.zeros(1, 3, 24, 24), output_type="latent", num_inference_steps=2).images
    assert latents.shape == (1, 3, 24, 24)
    for wrong in ({"height": 20}, {"negative_prompt": ["a", "b", "c"]}):
        with pytest.raises(ValueError, match=r"multiples of 8|3 negative prompts"):
            arrays([one], [1], **wrong)


@pytest.mark.medium
@pytest.mark.parametrize("objective", ["flow-v", "ddpm-epsilon", "ddpm-v"])
def test_every_objective_learns_and_samples(options, objective):
    from fmedge.training.denoiser import read_pipeline

    result = train_image(dataclasses.replace(options, objective=objective, learning_rate=1e-2))
    assert result.loss_after < result.loss_before * 0.95
    pipeline = read_pipeline(options.output)
    pixels = pipeline(["a small red circle in the left"], output_type="np", num_inference_steps=4).images
    assert np.isfinite(pixels).all()
    assert pixels.std() > 0.01


@pytest.mark.parametrize("objective", ["flow-x", "flow-v", "ddpm-epsilon", "ddpm-v"])
def test_a_perfect_prediction_has_no_loss_and_samples_the_picture(objective):
    """The forward process, the target and the scheduler belong together."""
    import torch

    from fmedge.training.objectives import OBJECTIVES, TIMES, Draw

    row = OBJECTIVES[objective]
    clean = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def perfect(noisy, times):
        signal, level = (one[:, None, None, None] for one in row.levels(times))
        return row.target(clean[: len(noisy)], (noisy - signal * clean[: len(noisy)]) / level, signal, level)

    random = np.random.default_rng(0)
    times = torch.from_numpy(row.times(random, 6)).clamp(1, TIMES - 1)
    noise = torch.from_numpy(random.standard_normal(clean.shape, dtype=np.float32))
    assert float(row.loss(perfect, clean, Draw(times, noise))) < 1e-6
    assert float(row.loss(lambda noisy, times: torch.zeros_like(noisy), clean, Draw(times, noise))) > 0.1
    scheduler = row.scheduler()
    scheduler.set_timesteps(8)
    sample = noise
    for time in scheduler.timesteps:
        sample = scheduler.step(perfect(sample, time.float().expand(6)), time, sample).prev_sample
    assert torch.allclose(sample, clean, atol=0.02)


@pytest.mark.medium
def test_a_seed_gives_the_same_weights_again_and_another_seed_others(options, tmp_path):
    train_image(options)
    again = dataclasses.replace(options, output=tmp_path / "again")
    train_image(again)
    assert same(weights(options.output), weights(again.output))
    other = dataclasses.replace(options, output=tmp_path / "other", seed=1)
    train_image(other)
    assert not same(weights(options.output), weights(other.output))


def test_a_killed_run_leaves_no_output_and_resumes_to_the_same_weights(options, tmp_path):
    whole = dataclasses.replace(options, output=tmp_path / "whole", checkpoint_steps=None)
    train_image(whole)
    with pytest.raises(Killed):
        train_image(options, killed_at(13))
    assert not options.output.exists()
    work = options.output.with_name("model.training")
    assert sorted(folder.name for folder in (work / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-5"]
    steps = []
    result = train_image(
        dataclasses.replace(options, resume=True),
        lambda progress: steps.append(progress.step) if progress.phase == "training" else None,
    )
    assert steps == list(range(11, 25))
    assert result.steps == 24
    assert same(weights(whole.output), weights(options.output))
    assert not work.exists()


TERMINATED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
import test_training_image as tests
from fmedge.training import image_presets, image_preparation
from fmedge.training.image import ImageTraining, train_image
import torch
torch.set_num_threads(1)
image_presets.IMAGE_PRESETS = {{"minute": tests.MINUTE}}
image_preparation.VARIANTS = image_preparation.HELD_OUT_VARIANTS = 1
from accelerate import Accelerator
save = Accelerator.save_state
def torn(self, folder, *rest):
    if folder.endswith("-10"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, folder, *rest)
Accelerator.save_state = torn
train_image(ImageTraining(output=Path({output!r}), preset="minute", size=24, steps=24, sample_minutes=0,
                          checkpoint_steps=5))
"""


@pytest.mark.medium
def test_a_kill_within_a_checkpoint_costs_that_checkpoint_only(options, tmp_path):
    code = TERMINATED.format(path=[*sys.path, str(Path(__file__).parent)], output=str(options.output))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (killed.stdout, killed.stderr) == ("", "")
    steps = []
    train_image(dataclasses.replace(options, resume=True), lambda progress: steps.append(progress.step))
    assert min(step for step in steps if step) == 6
    whole = dataclasses.replace(options, output=tmp_path / "whole")
    train_image(whole)
    assert same(weights(whole.output), weights(options.output))


def test_minutes_end_the_run_and_grids_are_drawn_on_the_way(options, monkeypatch):
    now = 0.0

    def tick():
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr("time.monotonic", tick)
    timed = dataclasses.replace(options, steps=None, minutes=0.5, sample_minutes=0.2, checkpoint_steps=None)
    result = train_image(timed)
    assert result.seconds == pytest.approx(30, abs=2)
    grids = sorted(file.name for file in (options.output / "samples").iterdir())
    assert len(grids) >= 3
    assert grids[-1] == f"step-{result.steps:06}.png"


@pytest.mark.medium
def test_sampling_on_the_way_does_not_change_the_weights(options, tmp_path):
    train_image(options)
    busy = dataclasses.replace(options, output=tmp_path / "busy", sample_minutes=1e-9)
    train_image(busy)
    assert len(list((busy.output / "samples").iterdir())) == 24
    assert same(weights(options.output), weights(busy.output))


@pytest.mark.medium
def test_the_average_is_what_is_written(options, tmp_path):
    train_image(options)
    plain = dataclasses.replace(options, output=tmp_path / "plain", ema=0.0)
    train_image(plain)
    short = dataclasses.replace(options, output=tmp_path / "short", ema=0.5)
    train_image(short)
    assert not same(weights(options.output), weights(plain.output))
    assert not same(weights(options.output), weights(short.output))


@pytest.mark.medium
def test_left_out_captions_teach_the_empty_one(options, monkeypatch):
    from fmedge.training import diffusion

    seen = []
    batch_of = diffusion.train_batch

    def watched(pictures, *rest):
        batch = batch_of(pictures, *rest)
        seen.append((batch.captions.numpy() == pictures.empty_caption).all(axis=1).mean())
        return batch

    monkeypatch.setattr(diffusion, "train_batch", watched)
    train_image(dataclasses.replace(options, caption_dropout=0.5))
    assert 0.3 < np.mean(seen) < 0.7
    seen.clear()
    train_image(dataclasses.replace(options, caption_dropout=0.0, force=True))
    assert np.mean(seen) == 0


def test_each_epoch_sees_every_picture_once(options):
    from fmedge.training.picture_batches import BatchOrder

    orders = [BatchOrder(pictures=20, batch=3, processes=2, process=process, seed=1) for process in range(2)]
    for epoch in range(2):
        numbers = [n for step in range(3) for one in orders for n in one.numbers(epoch * 3 + step)]
        assert len(set(numbers)) == len(numbers) == 18
    assert not np.array_equal(orders[0].numbers(0), orders[0].numbers(3))


def folder_of(tmp_path, count, caption="a picture of number {}"):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption.replace("{}", str(number)))
    return folder


def test_a_folder_of_pictures_is_trained_on(options, tmp_path):
    folder = folder_of(tmp_path, 30)
    result = train_image(dataclasses.replace(options, data=folder, size=32, steps=8))
    assert (result.train_pictures, result.validation_pictures) == (28, 2)
    report = json.loads((options.output / "training.json").read_text())
    assert report["options"]["data"] == str(folder)
    index = json.loads((options.output / "model_index.json").read_text())
    assert index["default_sample_size"] == 32


@pytest.mark.medium
def test_long_captions_are_cut_and_counted(options, tmp_path):
    folder = folder_of(tmp_path, 12, "word {} " * 60)
    result = train_image(dataclasses.replace(options, data=folder, steps=2))
    assert result.captions_cut == 12
    tokenizer = json.loads((options.output / "tokenizer" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 77


@pytest.mark.parametrize(
    ("count", "change", "error", "message"),
    [
        (4, {}, DataError, "too few pictures: there are 3 to train on, and one step takes 8"),
        (1, {}, DataError, "too few pictures"),
        (12, {"size": 48}, DataError, "0.png: is 40x40, smaller than the size of 48"),
        (12, {"size": 20}, TrainingError, "--size must be a multiple of 8"),
    ],
)
def test_unusable_data_is_refused_before_training_and_leaves_nothing(options, tmp_path, count, change, error, message):
    folder = folder_of(tmp_path, count)
    with pytest.raises(error, match=message):
        train_image(dataclasses.replace(options, data=folder, **change))
    assert not options.output.exists()
    assert not options.output.with_name("model.training").exists()


def test_the_built_in_shapes_need_room(options):
    with pytest.raises(TrainingError, match="--size must be at least 24 for the built-in shapes, not 16"):
        train_image(dataclasses.replace(options, size=16))


def test_a_run_that_diverges_is_an_error_and_writes_nothing(options):
    with pytest.raises(TrainingError, match="diverged: the loss is no number at step 10: use a smaller"):
        train_image(dataclasses.replace(options, learning_rate=1e30, checkpoint_steps=None))
    assert not options.output.exists()
    assert not options.output.with_name("model.training").exists()


def test_a_resumed_run_keeps_to_its_options(options):
    with pytest.raises(Killed):
        train_image(options, killed_at(6))
    with pytest.raises(TrainingError, match=r"begun with other options \(objective was flow-x, is flow-v\)"):
        train_image(dataclasses.replace(options, resume=True, objective="flow-v"))
    from fmedge.training.text import TextTraining, train_text

    with pytest.raises(TrainingError, match="begun with other options"):
        train_text(TextTraining(output=options.output, steps=24, resume=True))
    train_image(dataclasses.replace(options, resume=True, checkpoint_steps=7))


@pytest.mark.medium
def test_an_output_is_replaced_by_force_only(options):
    train_image(options)
    before = hashlib.sha256((options.output / "training.json").read_bytes()).digest()
    with pytest.raises(TrainingError, match="exists already"):
        train_image(options)
    train_image(dataclasses.replace(options, force=True, steps=2))
    assert hashlib.sha256((options.output / "training.json").read_bytes()).digest() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "either --minutes or --steps"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"preset": "huge"}, 'there is no preset "huge": choose one of minute'),
        ({"size": 0}, "--size must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"learning_rate": math.nan}, "--learning-rate must be more than 0"),
        ({"caption_dropout": 1.0}, "--caption-dropout must be from 0 to less than 1"),
        ({"ema": 1.0}, "--ema must be from 0 to less than 1"),
        ({"sample_minutes": -1.0}, "--sample-minutes must be 0 or more"),
        ({"checkpoint_minutes": 0.0}, "--checkpoint-minutes must be more than 0"),
        ({"checkpoint_steps": 0}, "--checkpoint-steps must be at least 1"),
        ({"seed": -1}, "--seed must be from 0"),
    ],
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(TrainingError, match=message):
        ImageTraining(**{"output": Path("model"), "preset": "minute", "steps": 1, **change})


def test_a_missing_extra_is_named(options, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffusers" else name)
    with pytest.raises(TrainingError, match=r"diffusers is not installed: pip install 'fmedge\[train\]'"):
        train_image(options)


@pytest.mark.medium
def test_torchrun_trains_on_two_processes_and_one_of_them_writes(options, tmp_path):
    folder = folder_of(tmp_path, 40)
    (tmp_path / "run.py").write_text(
        "import sys\nfrom fmedge.training import image_presets\nimport test_training_image as tests\n"
        "image_presets.IMAGE_PRESETS = {'minute': tests.MINUTE}\n"
        "from fmedge.commands.train import app\napp(sys.argv[1:])\n"
    )
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(tmp_path / "run.py"), "image", str(options.output), "--data", str(folder), "--preset", "minute"),
            *("--steps", "6", "--batch", "4", "--checkpoint-steps", "2", "--json"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)  # One line: the other process prints nothing.
    assert (result["devices"], result["pictures_seen"]) == (2, 6 * 2 * 4)
    assert result["loss_after"] < result["loss_before"]
    assert (options.output / "model_index.json").is_file()
