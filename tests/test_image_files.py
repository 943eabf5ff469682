"""PNG files of generated images: what they say, and that they are the same each time."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fmedge_runtimes.errors import RequestError
from fmedge_runtimes.generated_image import (
    GeneratedImage,
    ImageStats,
    Settings,
    parameters,
    sheet_of,
    write_aside,
)
from fmedge_runtimes.picture import image_array, mask_array, open_picture
from fmedge_runtimes.version import __version__
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

SETTINGS = Settings(
    prompt="a (red:1.3) circle",
    negative="blurry, dark",
    seed=7,
    steps=20,
    guidance=7.5,
    height=8,
    width=16,
    scheduler="euler",
    strength=None,
    inpainted=False,
    guidance_rescale=0.0,
    clip_skip=0,
    weights=True,
    max_sequence_length=None,
    tiling=None,
    tiny_vae=False,
    noise_level=None,
    model="tiny",
)


def generated(settings: Settings = SETTINGS) -> GeneratedImage:
    image = Image.fromarray(np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3))
    return GeneratedImage(image, settings, 0, 0, ImageStats(20, 1, 0.1, 0.2, 0.3), np.zeros((4, 1, 2), np.float32))


def chunks(png: bytes) -> list[tuple[str, bytes]]:
    """The chunks of a PNG, by the specification."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, place = [], 8
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        data = png[place + 8 : place + 8 + length]
        assert zlib.crc32(kind + data) == struct.unpack(">I", png[place + 8 + length : place + 12 + length])[0]
        found.append((kind.decode(), data))
        place += 12 + length
    return found


def test_the_parameters_are_those_that_viewers_know(tmp_path: Path) -> None:
    generated().save(tmp_path / "a.png")
    texts = [data for kind, data in chunks((tmp_path / "a.png").read_bytes()) if kind == "tEXt"]
    expected = (
        "a (red:1.3) circle\nNegative prompt: blurry, dark\n"
        "Steps: 20, Sampler: euler, CFG scale: 7.5, Seed: 7, Size: 16x8, Model: tiny, "
        f"Version: fmedge {__version__}"
    )
    assert texts[0] == b"parameters\0" + expected.encode("latin-1")
    record = json.loads(texts[1].removeprefix(b"fmedge\0"))
    assert record.pop("made_by") == f"fmedge {__version__}"
    assert Settings(**record) == SETTINGS
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["parameters"] == expected
        assert np.array_equal(np.asarray(image), np.asarray(generated().image))


def test_an_image_of_an_image_says_so() -> None:
    text = parameters(replace(SETTINGS, negative=None, strength=0.6, clip_skip=1, model="a, b"))
    assert text.splitlines()[1].startswith("Steps: 20")
    assert 'Model: "a, b", Denoising strength: 0.6, Clip skip: 2' in text


@given(prompt=st.text(max_size=50), negative=st.none() | st.text(max_size=20))
def test_any_prompt_can_be_written(prompt: str, negative: str | None) -> None:
    made = generated(replace(SETTINGS, prompt=prompt, negative=negative))
    names = {data.split(b"\0")[0]: kind for kind, data in chunks(made.png()) if kind in ("tEXt", "iTXt")}
    assert list(names) == [b"parameters", b"fmedge"]
    assert names[b"fmedge"] == "tEXt"
    assert made.png() == made.png()


def test_a_grid_is_about_square_and_in_order() -> None:
    images = [Image.new("RGB", (4, 2), (number, 0, 0)) for number in range(5)]
    sheet = np.asarray(sheet_of(images))
    assert sheet.shape == (4, 12, 3)
    assert sheet[::2, ::4, 0].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert sheet_of(images, columns=1).size == (4, 10)
    assert sheet_of(images[:1]).size == (4, 2)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fails(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        with pytest.raises(OSError, match="No space"):
            write_aside(path, b"new!")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.png", b"old")]
    write_aside(path, b"new!")
    assert path.read_bytes() == b"new!"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16", "CMYK", "LA"])
def test_images_of_every_mode_become_arrays(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (10, 6))
    found = image_array(image, 4, 8)
    assert found.shape == (3, 4, 8)
    assert found.dtype == np.float32
    assert set(np.unique(mask_array(image, 4, 8))) <= {0.0, 1.0}


def test_the_array_of_an_image_is_its_levels() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    found = image_array(Image.fromarray(levels), 6, 10)
    np.testing.assert_allclose(found.transpose(1, 2, 0), levels / 127.5 - 1, atol=1e-6)
    mask = np.array([[0, 127, 128, 255]], np.uint8)
    assert mask_array(Image.fromarray(mask), 1, 4).tolist() == [[[0, 0, 1, 1]]]


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (10, 6), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg", "x").size == (6, 10)


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    whole = generated().png()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) - 40])
    with pytest.raises(RequestError, match=r"x: .*cut.png cannot be read"):
        image_array(open_picture(tmp_path / "cut.png", "x"), 8, 8)
    with pytest.raises(RequestError, match=r"x: .* cannot be read"):
        open_picture(tmp_path, "x")
