"""Commands with bundles that make images: generate, plan, inspect, verify; and `load`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import fmedge_runtimes.load
import numpy as np
import pytest
from fake_session import FakeSession, make_bundle
from fmedge_runtimes.errors import FmedgeError, RequestError
from fmedge_runtimes.generated_image import ImageUpdate
from fmedge_runtimes.manifest import ImageGolden, write_manifest
from fmedge_runtimes.pipelines.latent_unet import LatentUnet
from image_models import SIDE, Opened, complete, stable_diffusion, write_folder
from PIL import Image
from typer.testing import CliRunner, Result

import fmedge
from fmedge.cli import app
from fmedge.commands.previews import Previews

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
QUICK = ("--steps", 1, "--guidance", 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    opened = write_folder(stable_diffusion(), tmp_path_factory.mktemp("images"))
    complete(opened)
    return opened


@pytest.fixture(autouse=True)
def sessions(images: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that torch plays; the decoder's is that of a fake text model."""

    def open_session(graph: Path, *_: object) -> Any:
        return FakeSession() if graph.name == "decoder.onnx" else images.open(graph.parent.name)

    monkeypatch.setattr(fmedge_runtimes.load, "open_session", open_session)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    bundle = make_bundle(tmp_path / "texts")
    write_manifest(bundle.folder, bundle.manifest)
    return bundle.folder


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


def generate(images: Opened, *arguments: object, stdin: str | None = None) -> Result:
    return run("generate", images.folder, *arguments, *QUICK, stdin=stdin)


def opened_png(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def error_of(result: Result) -> str:
    assert isinstance(result.exception, FmedgeError), (result.output, result.exception)
    return str(result.exception)


def usage_of(result: Result) -> str:
    assert result.exit_code == 2
    # The box that usage errors come in breaks lines.
    return " ".join(result.stderr.replace("│", " ").split())


def test_images_in_a_folder_with_a_grid(images: Opened, tmp_path: Path) -> None:
    folder, grid = tmp_path / "made" / "here", tmp_path / "grid.png"
    done = generate(images, "a cat", "a dog", "-n", 2, "--seed", 7, "-o", folder, "--grid", grid)
    assert (done.exit_code, done.stderr) == (0, "")
    names = [f"{number:05}.png" for number in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(done.stdout.split()) == [str(folder / name) for name in names]
    facts = [json.loads(opened_png(folder / name).text["fmedge"]) for name in names]
    assert [(one["prompt"], one["seed"]) for one in facts] == [("a cat", 7), ("a cat", 8), ("a dog", 7), ("a dog", 8)]
    sheet = np.asarray(opened_png(grid))
    assert sheet.shape == (2 * SIDE, 2 * SIDE, 3)
    assert np.array_equal(sheet[SIDE:, :SIDE], np.asarray(opened_png(folder / names[2])))
    assert json.loads(opened_png(grid).text["fmedge"]) == facts


def test_the_same_call_gives_the_same_bytes(images: Opened, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert generate(images, "a cat", "--seed", 7, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # The library makes the same file, from a plain load.
    with fmedge.load(images.folder) as model:
        assert isinstance(model, fmedge.ImageModel)
        made = model.generate("a cat", fmedge.Diffusion(steps=1, guidance=1.0, seed=7))[0]
    assert made.png() == (tmp_path / "a.png").read_bytes()


def test_every_option_arrives(images: Opened, tmp_path: Path) -> None:
    Image.new("RGB", (40, 50), "red").save(tmp_path / "in.png")
    Image.new("L", (40, 50), 255).save(tmp_path / "mask.png")
    options = (
        "--negative", "bad", "--size", "24x40", "--scheduler", "euler", "--image", tmp_path / "in.png", "--strength",
        0.5, "--mask", tmp_path / "mask.png", "--guidance-rescale", 0.3, "--clip-skip", 1, "--literal", "--tiling",
        "--memory-mode", "sequential", "--max-batch", 1, "--threads", 1, "--memory", "1GiB", "--seed", 3,
    )  # fmt: skip
    done = run(
        "generate", images.folder, "a (cat)", "--steps", 4, "--guidance", 3, *options, "--json", "--grid",
        tmp_path / "grid.png",
    )  # fmt: skip
    assert (done.exit_code, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    expected = {
        "file": None, "prompt": "a (cat)", "negative": "bad", "seed": 3, "steps": 4, "guidance": 3.0, "height": 40,
        "width": 24, "scheduler": "euler", "strength": 0.5, "inpainted": True, "guidance_rescale": 0.3, "clip_skip": 1,
        "weights": False, "tiling": True, "tiny_vae": False, "model": "tiny", "prompt_index": 0, "index": 0,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record["stats"]["evaluations"] == 2
    assert record["stats"]["seconds"] > 0
    assert all(session.closed for session in images.sessions.values())
    assert opened_png(tmp_path / "grid.png").size == (24, 40)


def test_previews_come_as_files(images: Opened, tmp_path: Path) -> None:
    arguments = ("generate", images.folder, "a cat", "a dog", "--seed", 7, "--guidance", 1, "--steps", 5)
    assert run(*arguments, "-o", tmp_path / "plain").exit_code == 0
    done = run(*arguments, "-o", tmp_path / "made", "--preview-every", 2, "--max-batch", 1)
    assert (done.exit_code, done.stderr) == (0, "")
    previews = sorted((tmp_path / "made" / "previews").iterdir())
    names = ["00000-0002.png", "00000-0004.png", "00001-0002.png", "00001-0004.png"]
    assert [path.name for path in previews] == names
    assert {opened_png(path).size for path in previews} == {(SIDE // 2, SIDE // 2)}
    shown = [np.asarray(opened_png(path)) for path in previews]
    assert not any(np.array_equal(shown[0], other) for other in shown[1:])
    facts = [json.loads(opened_png(path).text["fmedge"]) for path in previews]
    assert facts[3] == {"preview_of": 1, "step": 4, "steps": 5}
    # The images are those that come without previews, and stdout names them alone.
    assert [Path(line).name for line in done.stdout.split()] == ["00000.png", "00001.png"]
    for name in ("00000.png", "00001.png"):
        ours, others = (np.asarray(opened_png(tmp_path / folder / name), int) for folder in ("made", "plain"))
        assert np.abs(ours - others).max() <= 1
    words = f"{previews[0]} exists; replace previews with --force"
    again = (*arguments, "-o", tmp_path / "again", "--preview", previews[0].parent, "--preview-every", 2)
    assert words in error_of(run(*again))
    assert run(*again, "--force").exit_code == 0


def test_one_file_shows_the_newest_preview(images: Opened, tmp_path: Path) -> None:
    newest = tmp_path / "now.png"
    arguments = ("generate", images.folder, "a cat", "--guidance", 1, "--steps", 4, "--seed", 7, "--preview", newest)
    done = run(*arguments, "--preview-every", 3, "-o", "-")
    assert Image.open(io.BytesIO(done.stdout_bytes)).size == (SIDE, SIDE)
    assert json.loads(opened_png(newest).text["fmedge"]) == {"preview_of": 0, "step": 3, "steps": 4}
    assert f"{newest} exists" in error_of(run(*arguments, "--preview-every", 3, "-o", tmp_path / "a.png"))
    assert run(*arguments, "--preview-every", 3, "-o", tmp_path / "a.png", "--force").exit_code == 0
    beside = run(*arguments[:-2], "--preview-every", 4, "-o", tmp_path / "b.png")
    assert beside.exit_code == 0
    assert [path.name for path in (tmp_path / "b-previews").iterdir()] == ["00000-0004.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b-previews", "b.png", "now.png"]


def test_steps_of_a_cascade_count_on_in_the_names_of_previews(tmp_path: Path) -> None:
    previews = Previews(tmp_path, force=False)
    pictures = (Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2)))
    for total in (2, 3):
        for done in range(1, total + 1):
            previews.write(ImageUpdate("denoise", done, total, (4, 5), pictures))
    previews.write(ImageUpdate("decode", 1, 1, (4,), pictures[:1]))
    names = [f"{image:05}-{step:04}.png" for image in (4, 5) for step in range(1, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_prompts_from_lines(images: Opened, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a cat", "id": "x", "negative": "bad", "seed": 5}\n"a dog"\n')
    done = generate(images, "first", "-i", lines, "--seed", 1, "--json", "-o", tmp_path / "made")
    records = sorted(map(json.loads, done.stdout.splitlines()), key=lambda record: record["prompt_index"])
    assert [(one.get("id"), one["prompt"], one["negative"], one["seed"]) for one in records] == [
        (None, "first", None, 1),
        ("x", "a cat", "bad", 5),
        (None, "a dog", None, 1),
    ]
    assert Path(records[1]["file"]).name == "00001.png"
    piped = generate(images, "-i", "-", "-o", tmp_path / "piped", stdin="one\ntwo\n")
    assert len(piped.stdout.split()) == 2
    lines.write_text('{"prompt": "a", "temperature": 1}')
    words = r"prompts.jsonl:1 has the unknown key 'temperature'; known are id, prompt, negative, seed."
    assert words in error_of(generate(images, "-i", lines, "-o", tmp_path / "x"))
    lines.write_text('{"prompt": "a", "seed": -1}')
    assert "prompts.jsonl:1: Diffusion.seed is -1" in error_of(generate(images, "-i", lines, "-o", tmp_path / "x"))
    lines.write_text('{"messages": []}')
    assert 'prompts.jsonl:1 needs "prompt"' in error_of(generate(images, "-i", lines, "-o", tmp_path / "x"))
    lines.write_text('{"prompt": [1, 2]}')
    assert "images are made of texts" in error_of(generate(images, "-i", lines, "-o", tmp_path / "x"))


def test_pipelines_without_negative_prompts_are_not_given_any(
    images: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentUnet, "takes", LatentUnet.takes - {"negative"})
    assert generate(images, "a", "b", "-o", tmp_path / "made").exit_code == 0
    words = "Diffusion.negative is nothing that a StableDiffusionPipeline knows"
    assert words in error_of(generate(images, "a", "-o", tmp_path / "x", "--negative", "bad"))


def test_one_image_on_stdout(images: Opened) -> None:
    done = generate(images, "a", "-o", "-")
    assert Image.open(io.BytesIO(done.stdout_bytes)).size == (SIDE, SIDE)


def test_files_are_kept(images: Opened, tmp_path: Path) -> None:
    kept = tmp_path / "00001.png"
    kept.write_bytes(b"kept")
    images.sessions.clear()
    words = f"{kept} exists; replace it with --force"
    assert words in error_of(generate(images, "a", "b", "-o", tmp_path))
    assert words in error_of(generate(images, "a", "--grid", kept))
    assert words in error_of(generate(images, "a", "-o", kept))
    assert not images.sessions
    assert kept.read_bytes() == b"kept"
    assert generate(images, "a", "b", "-o", tmp_path, "--force").exit_code == 0
    assert opened_png(kept).size == (SIDE, SIDE)
    assert "is not a folder" in error_of(generate(images, "a", "-o", tmp_path / "00001.png" / "made"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a",), "images need a place: --output FILE.png or FOLDER, or --grid FILE.png"),
        (("a", "b", "-o", "one.png"), "--output one.png is one file for 2 images"),
        (("a", "b", "-o", "-"), "--output - is for a single image"),
        (("a", "--json", "-o", "-"), "--output - is for a single image"),
        (("a", "--grid", "grid.jpg"), "--grid is grid.jpg; it must be a .png file"),
        (("a", "-o", "x.jpg"), "--output is 'x.jpg'; images are written to a .png file or a folder"),
        (("a", "-o", ""), "--output is ''; images are written"),
        (("a", "-o", "x.png", "--grid", "./x.png"), "--output and --grid are both x.png"),
        (("a", "-o", "x", "--size", "512"), "--size is '512'; write WIDTHxHEIGHT"),
        (("a", "-o", "x", "--size", "0x8"), "--size is '0x8'"),
        (("a", "-o", "x", "--memory-mode", "fast"), "--memory-mode is 'fast'; it must be one of keep, sequential"),
        (("a", "-o", "x", "--preview", "p"), "say how often with --preview-every"),
        (("a", "-o", "-", "--preview-every", 1), "--preview-every needs a place"),
        (("a", "b", "-o", "x", "--preview-every", 1, "--preview", "p.png"), "--preview p.png is one file for 2 images"),
        (("a", "-o", "x", "--preview-every", 1, "--preview", "p.jpg"), "--preview is p.jpg; previews are written to"),
        (("a", "-o", "p.png", "--preview-every", 1, "--preview", "p.png"), "--preview is p.png, where images go"),
        (("a", "-o", "x", "--temperature", 1), "--temperature is for bundles that write text;"),
        (("a", "-o", "x", "--resume"), "--resume is for bundles that write text;"),
        (("a", "-o", "x", "--chat"), "--chat is for bundles that write text;"),
    ],
)
def test_usage_errors_of_images(
    images: Opened, arguments: tuple[object, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in usage_of(generate(images, *arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option",
    ["--steps=1", "--guidance=2", "--size=8x8", "--grid=g.png", "--preview-every=1", "--noise-level=1", "--literal"],
)
def test_texts_take_no_options_of_images(texts: Path, option: str) -> None:
    name = option.partition("=")[0]
    assert f"{name} is for bundles that make images;" in usage_of(run("generate", texts, "abc", option))


def test_requests_that_cannot_be_are_one_error(images: Opened, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    words = "max_sequence_length is nothing that a StableDiffusionPipeline knows"
    assert words in error_of(generate(images, "a", "-o", folder, "--max-sequence-length", 99))
    assert "has no tiny_vae_decoder" in error_of(generate(images, "a", "-o", folder, "--tiny-vae"))
    words = "noise_level is nothing that a StableDiffusionPipeline knows"
    assert words in error_of(generate(images, "a", "-o", folder, "--noise-level", 20))
    assert "is no size for" in error_of(generate(images, "a", "-o", folder, "--size", "33x32"))
    assert "known are" in error_of(generate(images, "a", "-o", folder, "--scheduler", "magic"))
    assert "there is no file" in error_of(generate(images, "a", "-o", folder, "--image", tmp_path / "in.png"))
    assert "without image" in error_of(generate(images, "a", "-o", folder, "--strength", 0.5))
    assert "there is no prompt" in error_of(generate(images, "-o", folder))
    assert "memory allows" in error_of(generate(images, "a", "-o", folder, "--memory", "1K"))
    assert not folder.exists()


def test_places_that_cannot_be_are_found_out_before(images: Opened, tmp_path: Path) -> None:
    images.sessions.clear()
    (tmp_path / "00000.png").mkdir()
    words = "is a folder; give another place"
    assert words in error_of(generate(images, "a", "-o", tmp_path, "--force"))
    assert words in error_of(generate(images, "a", "--grid", tmp_path / "00000.png", "--force"))
    assert "File name too long" in error_of(generate(images, "a", "-o", tmp_path / f"{'n' * 300}.png"))
    assert "File name too long" in error_of(generate(images, "a", "-o", tmp_path / ("n" * 300)))
    assert not images.sessions


def test_commands_for_texts_say_that_it_makes_images(images: Opened) -> None:
    assert "makes images; bench measures how fast text is written" in error_of(run("bench", images.folder))
    assert "makes images, not text" in error_of(run("chat", images.folder, stdin="hi\n"))


def test_load_gives_what_the_bundle_makes(images: Opened, texts: Path) -> None:
    with fmedge.load(texts) as writer, fmedge.load_image(images.folder) as painter:
        assert isinstance(writer, fmedge.TextModel)
        assert isinstance(painter, fmedge.ImageModel)
    with pytest.raises(RequestError, match="prefix_reuse is an option of models that write text"):
        fmedge.load(images.folder, prefix_reuse=False)
    with pytest.raises(RequestError, match="memory_mode is an option of models that make images"):
        fmedge.load(texts, memory_mode="sequential")
    with pytest.raises(fmedge.BundleError, match="writes text, it makes no images"):
        fmedge.load_image(texts)
    with pytest.raises(fmedge.BundleError, match="makes images, not text"):
        fmedge.load_text(images.folder)
    with pytest.raises(RequestError, match="max_batch is 0"):
        fmedge.load_image(images.folder, max_batch=0)


def test_inspect_shows_an_image_bundle(images: Opened) -> None:
    done = run("inspect", images.folder)
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert done.exit_code == 0
    assert rows["pipeline"] == "StableDiffusionPipeline"
    assert rows["makes"] == f"{SIDE}x{SIDE} in 4 steps with guidance 7.5, unless told otherwise"
    assert "unet 0.0 MB" in rows["parts"]
    assert json.loads(run("inspect", images.folder, "--json").stdout)["kind"] == "image"


def test_the_plan_names_parts_and_modes(images: Opened, texts: Path) -> None:
    found = json.loads(run("plan", images.folder, "--size", "64x32", "--batch", 2, "--memory", "1GiB", "--json").stdout)
    assert (found["width"], found["height"], found["batch"], found["guided"]) == (64, 32, 2, True)
    assert {part["name"] for part in found["parts"]} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert found["modes"]["sequential"]["total"] < found["modes"]["keep"]["total"]
    plain = run("plan", images.folder, "--memory", "1GiB", "--guidance", 1)
    assert plain.stdout.splitlines()[0].split(maxsplit=1) == ["images", f"1 of {SIDE}x{SIDE}"]
    assert "total (keep)" in plain.stdout
    assert "it fits" in plain.stdout
    short = run("plan", images.folder, "--memory", "1K")
    assert short.exit_code == 1
    assert "does NOT fit" in short.stdout
    assert "--slots is for bundles that write text" in usage_of(run("plan", images.folder, "--slots", 2))
    assert "--size is for bundles that make images" in usage_of(run("plan", texts, "--size", "8x8"))
    assert "a batch of 0 images" in error_of(run("plan", images.folder, "--batch", 0))


def test_verify_makes_the_golden_images_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = write_folder(stable_diffusion(), tmp_path / "bundle")
    monkeypatch.setattr(fmedge_runtimes.load, "open_session", lambda graph, *_: opened.open(graph.parent.name))
    options = fmedge.Diffusion(steps=2, guidance=4.0, seed=9, height=16, width=24)
    made = opened.model().generate("a cat", options)[0]
    (opened.folder / "golden").mkdir()
    golden = ImageGolden(
        prompt="a cat", seed=9, steps=2, guidance=4.0, height=16, width=24, file="golden/0.png", tolerance=0.5
    )
    made.save(opened.folder / golden.file)
    complete(opened, (golden,))
    done = run("verify", opened.folder)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "1 golden images reproduced on cpu" in done.stdout
    assert json.loads(run("verify", opened.folder, "--json").stdout)["golden_images"] == 1
    levels = np.asarray(made.image, int)
    Image.fromarray(np.clip(levels + 2, 0, 255).astype(np.uint8)).save(opened.folder / golden.file)
    complete(opened, (golden,))
    words = "golden image 0 differs from golden/0.png by 2 levels in the mean, more than 0.5"
    assert words in error_of(run("verify", opened.folder)).replace("1.99", "2").replace("1.98", "2")
    Image.new("RGB", (8, 8)).save(opened.folder / golden.file)
    complete(opened, (golden,))
    assert "is 8x8 and not 24x16" in error_of(run("verify", opened.folder))
    (opened.folder / golden.file).write_bytes(b"?")
    complete(opened, (golden,))
    assert "is no image that can be read" in error_of(run("verify", opened.folder))
