"""The files of a checkpoint: shards, pickles, damage of all kinds."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmedge_converters.checkpoint import Checkpoint, Files
from fmedge_converters.decoder import empty_model
from fmedge_converters.source import open_source
from fmedge_runtimes.errors import FmedgeError, SourceError
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

FP32 = np.dtype(np.float32)
SINGLE = "model.safetensors"
PICKLE = "pytorch_model.bin"
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "tiny", num_hidden_layers=1, vocab_size=64)


@pytest.fixture(scope="module")
def skeleton(tiny: Path) -> PreTrainedModel:
    return empty_model(open_source(str(tiny)).config, torch.float32)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def read(folder: Path, model: PreTrainedModel, *, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    with Checkpoint(Files(folder, allow_pickle=allow_pickle), FP32) as checkpoint:
        return {name: weight.array() for name, weight in checkpoint.weights(model).items()}


def pickled(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Store the weights as a pickle instead."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    torch.save(tensors, folder / PICKLE, **options)
    return tensors


def test_a_pickle_is_read_when_that_is_allowed(folder: Path, skeleton: PreTrainedModel) -> None:
    tensors = pickled(folder)
    with pytest.raises(SourceError, match=rf"pickle \({PICKLE}\).*--allow-pickle"):
        read(folder, skeleton)
    found = read(folder, skeleton, allow_pickle=True)
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in tensors.items())


def test_shards_of_pickles(folder: Path, skeleton: PreTrainedModel) -> None:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:4], "pytorch_model-00002-of-00002.bin": names[4:]}
    for file, part in parts.items():
        torch.save({name: tensors[name].to(torch.bfloat16) for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / f"{PICKLE}.index.json").write_text(json.dumps(index))
    found = read(folder, skeleton, allow_pickle=True)
    assert np.array_equal(found[NAME], tensors[NAME].to(torch.bfloat16).float().numpy())
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(SourceError, match="lacks 1 of its 2 shards, pytorch_model-00002"):
        read(folder, skeleton, allow_pickle=True)


class Evil:
    """Runs a command when it is unpickled by a loader that runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_pickle_is_refused_and_never_runs(folder: Path, skeleton: PreTrainedModel, tmp_path: Path) -> None:
    tensors = pickled(folder)
    torch.save({**tensors, "x": Evil(tmp_path / "evidence")}, folder / PICKLE)
    with pytest.raises(SourceError, match="holds more than tensors, and code in it is never run"):
        read(folder, skeleton, allow_pickle=True)
    (folder / PICKLE).write_bytes(pickle.dumps(Evil(tmp_path / "evidence")))
    with pytest.raises(SourceError, match=r"before 1\.6"):
        read(folder, skeleton, allow_pickle=True)
    assert not (tmp_path / "evidence").exists()


def test_pickles_that_cannot_be_read(folder: Path, skeleton: PreTrainedModel) -> None:
    tensors = pickled(folder, _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match=r"before 1.6.*save_pretrained"):
        read(folder, skeleton, allow_pickle=True)
    for content, words in (
        ({"state_dict": tensors, "epoch": 3}, "not a plain table of tensors: 'state_dict' is a dict"),
        ([1, 2], "holds a list instead of tensors by name"),
        ({NAME: tensors[NAME].to_sparse()}, "not a plain table of tensors"),
    ):
        torch.save(content, folder / PICKLE)
        with pytest.raises(SourceError, match=words):
            read(folder, skeleton, allow_pickle=True)
    torch.save(tensors, folder / PICKLE)
    whole = (folder / PICKLE).read_bytes()
    (folder / PICKLE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="damaged"):
        read(folder, skeleton, allow_pickle=True)
    (folder / PICKLE).rename(folder / "weights.pth")
    with pytest.raises(SourceError, match=r"under a name of its own \(weights.pth\)"):
        read(folder, skeleton, allow_pickle=True)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_of_every_width(stored: torch.dtype, folder: Path, skeleton: PreTrainedModel) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE)
    assert np.array_equal(read(folder, skeleton)[NAME], tensors[NAME].float().numpy())


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (torch.int8, "is stored as int8, which is no floating type"),
        (torch.bool, "is stored as bool"),
        (torch.uint16, "is stored as U16, which fmedge does not read"),
        (torch.complex64, "is stored as C64, which fmedge does not read"),
    ],
)
def test_numbers_that_are_no_weights(stored: torch.dtype, words: str, folder: Path, skeleton: PreTrainedModel) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, NAME: torch.zeros(tensors[NAME].shape, dtype=stored)}, folder / SINGLE)
    with pytest.raises(SourceError, match=words):
        read(folder, skeleton)
    # What the model does not know may be stored as anything.
    save_file({**tensors, "model.layers.0.masked_bias": torch.zeros(3, dtype=stored)}, folder / SINGLE)
    assert np.array_equal(read(folder, skeleton)[NAME], tensors[NAME].numpy())


def test_a_pointer_of_git_lfs(folder: Path, skeleton: PreTrainedModel) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (folder / SINGLE).write_bytes(pointer)
    with pytest.raises(SourceError, match="pointer of Git LFS, not the weights; run `git lfs pull`"):
        read(folder, skeleton)
    (folder / SINGLE).rename(folder / PICKLE)
    with pytest.raises(SourceError, match="git lfs pull"):
        read(folder, skeleton, allow_pickle=True)


def sharded(folder: Path) -> tuple[dict[str, torch.Tensor], list[Path]]:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    files = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, part in zip(files, (names[:4], names[4:]), strict=True):
        save_file({name: tensors[name] for name in part}, file)
    index = {"weight_map": {name: files[place >= 4].name for place, name in enumerate(names)}}
    (folder / f"{SINGLE}.index.json").write_text(json.dumps(index))
    return tensors, files


def test_shards_that_overlap(folder: Path, skeleton: PreTrainedModel) -> None:
    tensors, files = sharded(folder)
    extra = {**load_file(files[1]), "lm_head.weight": tensors["lm_head.weight"].clone()}
    save_file(extra, files[1])
    assert np.array_equal(read(folder, skeleton)["lm_head.weight"], tensors["lm_head.weight"].numpy())
    extra["lm_head.weight"][0, 0] += 1
    save_file(extra, files[1])
    with pytest.raises(SourceError, match=r"both hold lm_head\.weight, with different values"):
        read(folder, skeleton)


def test_indexes_that_lie(folder: Path, skeleton: PreTrainedModel) -> None:
    tensors, files = sharded(folder)
    index = folder / f"{SINGLE}.index.json"
    right = json.loads(index.read_text())
    # A name in the wrong shard does no harm: every shard is looked through, as transformers does.
    index.write_text(json.dumps({"weight_map": {**right["weight_map"], NAME: files[0].name}}))
    assert np.array_equal(read(folder, skeleton)[NAME], tensors[NAME].numpy())
    for content, words in (
        ({"weight_map": {NAME: "elsewhere.safetensors"}}, "lacks 1 of its 1 shards, elsewhere.safetensors"),
        ({"weight_map": {NAME: files[0].name}}, "lacks .* of the model's 12 tensors"),
        ({"weight_map": {}}, "names no shards"),
        ({"weight_map": {NAME: 3}}, "not an index of shards"),
        ([], "not an index of shards"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(SourceError, match=words):
            read(folder, skeleton)


def damaged(folder: Path, skeleton: PreTrainedModel, content: bytes) -> None:
    """Whatever the file is: a clear error, or the numbers that the safetensors library finds in it."""
    (folder / SINGLE).write_bytes(content)
    try:
        found = read(folder, skeleton)
    except FmedgeError as error:
        assert len(str(error).splitlines()) == 1
        return
    tensors = load_file(folder / SINGLE)
    for name, array in found.items():
        np.testing.assert_array_equal(array, tensors[name].float().numpy(), err_msg=name)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_random_damage_is_an_error_or_a_correct_read(
    data: st.DataObject, tiny: Path, skeleton: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        shutil.copytree(tiny, folder)
    content = bytearray((tiny / SINGLE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["header", "anywhere", "swap", "cut", "insert"]))
        limit = min(header, len(content)) if kind in ("header", "swap") else len(content)
        if limit < 2:
            break
        place = data.draw(st.integers(0, limit - 1))
        if kind == "swap":
            other = data.draw(st.integers(0, limit - 1))
            content[place], content[other] = content[other], content[place]
        elif kind == "cut":
            del content[place : place + data.draw(st.sampled_from([1, 4, 1 << 20]))]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            content[place] = data.draw(st.integers(0, 255))
    damaged(folder, skeleton, bytes(content))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_headers_that_contradict_their_data(
    data: st.DataObject, tiny: Path, skeleton: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Headers that are well formed, but say something else of one tensor than was written."""
    folder = tmp_path_factory.getbasetemp() / "contradicting"
    if not folder.exists():
        shutil.copytree(tiny, folder)
    content = (tiny / SINGLE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    field, value = data.draw(
        st.one_of(
            st.tuples(st.just("dtype"), st.sampled_from(["F16", "I32", "U8", "F8_E4M3", "F4", "C64", "X", 3, None])),
            st.tuples(st.just("shape"), st.lists(st.integers(-1, 70), max_size=4)),
            st.tuples(st.just("data_offsets"), st.lists(st.integers(-4, len(content)), min_size=1, max_size=3)),
            st.tuples(st.just("name"), st.sampled_from(["", "model.norm.weight", "x" * 300, NAME.upper()])),
        )
    )
    if field == "name":
        header[value] = header.pop(name)
    else:
        header[name][field] = value
    text = json.dumps(header).encode()
    damaged(folder, skeleton, len(text).to_bytes(8, "little") + text + content[end:])


def test_values_that_fp16_cannot_hold(folder: Path, skeleton: PreTrainedModel) -> None:
    tensors = load_file(folder / SINGLE)
    for value in (1e5, float("nan"), float("inf")):
        tensors[NAME][3, 4] = value
        save_file(tensors, folder / SINGLE)
        with Checkpoint(Files(folder), np.dtype(np.float16)) as checkpoint:
            weight = checkpoint.weights(skeleton)[NAME]
            weight.read(0, 3)
            with pytest.raises(SourceError, match=rf"{NAME} has values that are not finite.*export it for a target"):
                weight.array()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(value: float, folder: Path, skeleton: PreTrainedModel) -> None:
    tensors = load_file(folder / SINGLE)
    tensors[NAME][3, 4] = value
    save_file(tensors, folder / SINGLE)
    with (
        Checkpoint(Files(folder), np.dtype(np.float32)) as checkpoint,
        pytest.raises(SourceError, match=rf"{NAME} has values that are not finite.*damaged"),
    ):
        checkpoint.weights(skeleton)[NAME].array()


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickles_of_a_hub_are_fetched_only_when_allowed(
    allow_pickle: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(_name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    pickled(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    source = open_source("owner/name", allow_pickle=allow_pickle)
    assert source.id == "owner/name"
    assert "*.safetensors" in asked
    assert any(pattern.endswith(".bin") for pattern in asked) == allow_pickle


def test_a_hub_id_of_an_adapter_brings_its_base(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "owner/base", "revision": "v2"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": torch.zeros(2, 64), "B": torch.zeros(64, 2)}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({key.format(part): value for part, value in factors.items()}, adapter / "adapter_model.safetensors")
    folders = {"owner/lora": adapter, "owner/base": tiny}
    revisions: set[tuple[str, object]] = set()

    def fetch(name: str, *, revision: str | None, **_: Any) -> str:
        revisions.add((name, revision))
        return str(folders[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    source = open_source("owner/lora")
    assert (source.id, source.adapter, source.folder) == ("owner/base", "owner/lora", tiny)
    assert ("owner/base", "v2") in revisions
