"""fmedge eval of what makes images, on painters that are known to be right or wrong."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from fmedge_runtimes.errors import BackendError, DataError, RequestError, SourceError
from PIL import Image
from typer.testing import CliRunner

import fmedge
from fmedge.caption_accuracy import accuracy_of_painter
from fmedge.cli import app
from fmedge.shapes import COMBINATIONS, HELD_OUT, SEEN, Combination, combination_from_caption, draw


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def painter(change=lambda combination: combination):
    """Draws captions, after a change."""

    def paint(captions, seeds):
        pictures = []
        for caption, seed in zip(captions, seeds, strict=True):
            combination = combination_from_caption(caption)
            pictures.append(draw(change(combination), 32, np.random.default_rng(seed)))
        return pictures

    return paint


def accuracy(paint, *, per_combination=1, batch=50):
    return accuracy_of_painter(paint, per_combination=per_combination, seed=3, batch=batch, report=lambda *_: None)


def test_a_painter_that_draws_what_it_is_told_is_always_right():
    result = accuracy(painter(), per_combination=2)
    assert (result.seen.pictures, result.held_out.pictures) == (288, 72)
    assert result.seen.all == result.held_out.all == 1.0


def test_every_attribute_is_counted_for_itself():
    circles = accuracy(painter(lambda one: Combination(one.size, one.colour, "circle", one.position)))
    assert circles.seen.shape == circles.seen.all == pytest.approx(1 / 3)
    assert (circles.seen.size, circles.seen.colour, circles.seen.position) == (1, 1, 1)
    large = accuracy(painter(lambda one: Combination("large", "red", one.shape, one.position)))
    assert large.held_out.size == pytest.approx(1 / 2)
    assert large.held_out.colour == pytest.approx(1 / 6)
    assert large.held_out.all == pytest.approx(1 / 12)
    assert large.held_out.shape == 1


def test_held_out_combinations_are_counted_apart():
    wrong = accuracy(painter(lambda one: SEEN[0] if one in HELD_OUT else one))
    assert wrong.seen.all == 1.0
    assert wrong.held_out.all < 0.1


def test_every_picture_has_a_seed_of_its_own_whatever_the_batch():
    def watch(batch):
        seen = []

        def paint(captions, seeds):
            seen.extend(zip(captions, seeds, strict=True))
            return painter()(captions, seeds)

        accuracy(paint, batch=batch)
        return seen

    assert watch(7) == watch(180)
    assert len({seed for _, seed in watch(180)}) == 180


def pictures(tmp_path, combinations, side=32):
    lines = []
    for number, one in enumerate(combinations):
        Image.fromarray(draw(one, side, np.random.default_rng(number))).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": one.caption}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_folder_of_pictures_is_judged(tmp_path):
    pictures(tmp_path, SEEN[:7])
    result = run(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert line["seen"] == {"pictures": 7, "size": 1, "colour": 1, "shape": 1, "position": 1, "all": 1}
    assert line["held_out"] is None
    table = run(tmp_path).stdout
    assert "seen in training" in table
    assert "100.0%" in table
    assert "held out" not in table


def test_pictures_that_cannot_be_judged_are_refused(tmp_path):
    pictures(tmp_path, SEEN[:2])
    with pytest.raises(RequestError, match="--steps is for models"):
        raise run(tmp_path, "--steps", 4).exception
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "a cat"}\n{"file_name": "1.png", "text": "a dog"}'
    )
    with pytest.raises(DataError, match=r"2 captions are none of the built-in ones, such as that of 0\.png"):
        raise run(tmp_path).exception
    pictures(tmp_path, SEEN[:2], side=16)
    with pytest.raises(DataError, match="its pictures are 16 pixels wide; the rules need at least 24"):
        raise run(tmp_path).exception
    with pytest.raises(SourceError, match="there is no such folder"):
        raise run(tmp_path / "nowhere").exception
    for arguments, words in (
        ((tmp_path, "--against", tmp_path), "--against is for bundles that write text"),
        ((tmp_path, tmp_path), "what makes images is evaluated alone"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert words in " ".join(result.output.replace("\u2502", " ").split())


def test_a_bundle_is_asked_with_the_options_given(tmp_path, monkeypatch):
    (tmp_path / "fmedge.json").write_text("{}")
    monkeypatch.setattr("fmedge_runtimes.load.kind_of", lambda _: "image")
    asked = []

    def generate(prompts, options):
        asked.append(options)
        made = painter()(prompts, options.seed)
        return [SimpleNamespace(image=Image.fromarray(one)) for one in made]

    monkeypatch.setattr(fmedge, "load_image", lambda path: SimpleNamespace(generate=generate), raising=False)
    monkeypatch.setattr(fmedge, "Diffusion", SimpleNamespace, raising=False)
    result = run(tmp_path, "--steps", 4, "--guidance", 1.5, "--seed", 9, "--per-combination", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["held_out"]["all"] == 1
    assert [options.seed[0] for options in asked] == [9, 69, 129]
    assert {(options.steps, options.guidance) for options in asked} == {(4, 1.5)}


def test_a_folder_that_diffusers_cannot_load_is_named(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(SourceError, match="diffusers cannot load it"):
        raise run(tmp_path).exception
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffusers" else name)
    with pytest.raises(BackendError, match=r"needs diffusers: pip install 'fmedge\[export\]'"):
        raise run(tmp_path).exception


def test_a_trained_folder_is_painted_with_torch(tmp_path, monkeypatch):
    """A model that was hardly trained gets almost everything wrong, and the figures say so."""
    from fmedge.training import image_preparation, image_presets
    from fmedge.training.image import ImageTraining, train_image

    minute = image_presets.ImagePreset(32, 1, 2, 2.5, 8, 16, 1, 2, batch=8, learning_rate=4e-3)
    monkeypatch.setattr(image_presets, "IMAGE_PRESETS", {"minute": minute})
    monkeypatch.setattr(image_preparation, "VARIANTS", 1)
    train_image(ImageTraining(output=tmp_path / "model", preset="minute", size=24, steps=2, sample_minutes=0))
    arguments = (tmp_path / "model", "--per-combination", 1, "--steps", 2, "--json")
    first, again = run(*arguments), run(*arguments, "--batch", 17)
    assert first.exit_code == 0, first.output
    line = json.loads(first.stdout)
    assert line["seen"]["pictures"] + line["held_out"]["pictures"] == len(COMBINATIONS)
    assert line["seen"]["all"] < 0.2
    assert json.loads(again.stdout) == line
