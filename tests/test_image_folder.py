"""Folders of pictures with captions: what is read, and what is refused."""

import json

import numpy as np
import pytest
from fmedge_runtimes.errors import DataError
from PIL import Image

from fmedge.training.image_folder import read_image_folder


def save(folder, name, *, size=(40, 40), colour=(200, 0, 0), mode="RGB", caption=None):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption)
    return file


def index(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_metadata_gives_captions_as_hugging_face_folders_do(tmp_path):
    save(tmp_path, "b.png")
    save(tmp_path, "train/a.jpg", colour=(0, 0, 250))
    index(tmp_path, {"file_name": "b.png", "text": " red ", "id": 7}, "", {"file_name": "train/a.jpg", "text": "blue"})
    found = read_image_folder(tmp_path, 32)
    assert (found.files, found.captions) == (("b.png", "train/a.jpg"), ("red", "blue"))
    assert found.pictures.shape == (2, 32, 32, 3)
    assert found.pictures.dtype == np.uint8
    assert found.pictures[0, 0, 0].tolist() == [200, 0, 0]
    assert found.pictures[1, 0, 0, 2] > 240


def test_captions_may_stand_beside_the_pictures(tmp_path):
    save(tmp_path, "one.PNG", caption="first\n picture")
    save(tmp_path, "more/two.webp", caption="second")
    save(tmp_path, ".hidden/three.png")
    (tmp_path / "README.txt").write_text("not a caption")
    found = read_image_folder(tmp_path, 40)
    assert dict(zip(found.files, found.captions, strict=True)) == {
        "one.PNG": "first picture",
        "more/two.webp": "second",
    }


def test_pictures_are_scaled_and_cropped_around_their_middle(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("white in the middle")
    assert read_image_folder(tmp_path, 40).pictures.min() > 250
    assert read_image_folder(tmp_path, 16).pictures.shape == (1, 16, 16, 3)


def test_other_modes_and_transparency_become_colours_on_white(tmp_path):
    save(tmp_path, "clear.png", mode="RGBA", colour=(10, 20, 30, 0), caption="white")
    save(tmp_path, "grey.png", mode="L", colour=100, caption="grey")
    found = read_image_folder(tmp_path, 32)
    assert found.pictures[0].min() == 255
    assert set(found.pictures[1].flatten().tolist()) == {100}


def test_the_rotation_that_a_camera_noted_is_applied(tmp_path):
    tall = Image.new("RGB", (40, 60), "white")
    tall.paste("black", (0, 0, 40, 30))
    exif = Image.Exif()
    exif[0x0112] = 3  # Upside down.
    tall.save(tmp_path / "photo.png", exif=exif)
    (tmp_path / "photo.txt").write_text("black below")
    picture = read_image_folder(tmp_path, 40).pictures[0]
    assert picture[0, 20, 0] == 255
    assert picture[-1, 20, 0] == 0


def test_everything_that_cannot_be_used_is_counted_and_the_first_five_are_named(tmp_path):
    save(tmp_path, "good.png", caption="good")
    save(tmp_path, "small.png", size=(31, 500), caption="small")
    save(tmp_path, "silent.png")
    save(tmp_path, "blank.png", caption="  ")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "torn.txt").write_text("torn")
    for number in range(3):
        (tmp_path / f"text{number}.jpg").write_text("no picture")
        (tmp_path / f"text{number}.txt").write_text("none")
    with pytest.raises(DataError) as raised:
        read_image_folder(tmp_path, 32)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}: 7 of its pictures and captions cannot be used:")
    assert "blank.png: its caption blank.txt is empty, and there is no metadata.jsonl" in message
    assert "silent.png: its caption silent.txt is missing" in message
    assert "small.png: is 31x500, smaller than the size of 32 to train at" in message
    assert message.endswith("and 2 more")
    assert message.count("\n") == 6


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: is not JSON"),
        ("[]", "line 2: is no JSON object"),
        ({"text": "a"}, 'line 2: has no "file_name"'),
        ({"file_name": "a.png"}, 'line 2: has no "text" for a.png'),
        ({"file_name": "b.png", "text": "b"}, "line 2: there is no file b.png"),
        ({"file_name": "../a.png", "text": "a"}, "line 2: names a file outside of the folder"),
        ({"file_name": "good.png", "text": "a"}, "line 2: good.png has a caption already"),
    ],
)
def test_a_wrong_line_of_the_metadata_is_named(tmp_path, line, problem):
    save(tmp_path, "good.png")
    index(tmp_path, {"file_name": "good.png", "text": "good"}, line)
    with pytest.raises(DataError, match=problem):
        read_image_folder(tmp_path, 32)


def test_a_picture_without_a_line_is_named_and_a_torn_one_is_read_to_its_end(tmp_path):
    save(tmp_path, "good.png")
    save(tmp_path, "forgotten.png")
    index(tmp_path, {"file_name": "good.png", "text": "good"})
    with pytest.raises(DataError, match=r"forgotten.png: metadata.jsonl has no caption for it"):
        read_image_folder(tmp_path, 32)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "forgotten.png")
    data = (tmp_path / "forgotten.png").read_bytes()
    (tmp_path / "forgotten.png").write_bytes(data[: len(data) // 2])  # Its header is whole.
    index(tmp_path, {"file_name": "good.png", "text": "good"}, {"file_name": "forgotten.png", "text": "noise"})
    with pytest.raises(DataError, match=r"forgotten.png: cannot be read as a picture"):
        read_image_folder(tmp_path, 32)


def test_a_folder_without_pictures_and_one_that_is_missing(tmp_path):
    with pytest.raises(DataError, match="the folder holds no picture"):
        read_image_folder(tmp_path, 32)
    with pytest.raises(DataError, match="there is no such folder"):
        read_image_folder(tmp_path / "nowhere", 32)


def test_without_a_size_all_pictures_must_have_one(tmp_path):
    save(tmp_path, "a.png", caption="a")
    assert read_image_folder(tmp_path, None).pictures.shape == (1, 40, 40, 3)
    save(tmp_path, "b.png", size=(48, 48), caption="b")
    with pytest.raises(DataError, match="several sizes: 40x40, 48x48"):
        read_image_folder(tmp_path, None)
    save(tmp_path, "b.png", size=(48, 40), caption="b")
    with pytest.raises(DataError, match=r"b\.png: is 48x40 and not square"):
        read_image_folder(tmp_path, None)


def test_a_caption_that_no_tokenizer_holds_is_named(tmp_path):
    save(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "half a pair: \\ud83d"}')
    with pytest.raises(DataError, match=r'line 1: has a "text" for a\.png that is no valid Unicode'):
        read_image_folder(tmp_path, 32)
