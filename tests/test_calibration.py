"""Calibration text, statistics that are kept, and the options for both."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrated_graphs import calibration
from fmedge_converters.calibration import model as model_module
from fmedge_converters.calibration.statistics import read_statistics
from fmedge_converters.calibration.text import ROW, calibration_text, documents_of_python
from fmedge_converters.export import export
from fmedge_converters.export_options import ExportOptions
from fmedge_runtimes.chat import ChatTemplate
from fmedge_runtimes.errors import ExportError, SourceError
from fmedge_runtimes.tokenizer import Tokenizer
from models import add_tokenizer, make_model
from typer.testing import CliRunner

from fmedge.cli import app

OPTIONS = ExportOptions("source", Path("output"), quantize="int4-gptq")
COMPARED = "This is the text that the bundle is compared on. " * 20
TEMPLATE = ChatTemplate("{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    add_tokenizer(folder)
    return Tokenizer(folder / "tokenizer.json")


def text_of(tokenizer: Tokenizer, template: ChatTemplate | None = None, context: int = 4096, **changes: object) -> str:
    options = replace(OPTIONS, **changes)
    compared = tokenizer.encode(COMPARED)
    found = calibration_text(options, tokenizer, template, context, compared, COMPARED)
    assert found.tokens <= options.calibrate_tokens
    return tokenizer.decode([token for row in found.rows for token in row])


def test_the_built_in_text_is_not_that_of_the_evidence(tokenizer: Tokenizer) -> None:
    from pydoc_data.topics import topics

    compared = topics["typesseq"]
    ids = tokenizer.encode(compared)[:1024]
    options = replace(OPTIONS, calibrate_tokens=20_000)
    found = calibration_text(options, tokenizer, None, 4096, ids, compared)
    assert found.tokens == 20_000
    assert {len(row) for row in found.rows[:-1]} == {ROW}
    # A part of that topic is a topic of its own.
    assert topics["typesseq-mutable"].split("\n\n")[1] in compared
    names = {document.where for document in documents_of_python(compared)}
    assert not names & {"typesseq", "typesseq-mutable"}
    assert len(names) > 50
    again = calibration_text(options, tokenizer, None, 4096, ids, compared)
    assert again.sha256 == found.sha256
    assert calibration_text(options, tokenizer, None, 100, ids, compared).sha256 != found.sha256


def test_text_of_files_and_folders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("first words " * 30)
    (folder / "b.jsonl").write_text('{"text": "of a line "}\n\n{"text": "and another "}\n' * 30)
    (folder / "c.bin").write_bytes(b"\xff\xfe")
    alone = tmp_path / "alone.md"
    alone.write_text("a file by itself " * 30)
    found = text_of(tokenizer, calibrate=(str(folder), str(alone)))
    # A document of each file in turn, so that a short calibration sees all of them.
    assert found.startswith("first words " * 30 + "of a line " + "a file by itself ")
    short = text_of(tokenizer, calibrate=(str(folder),), calibrate_tokens=100)
    assert found.startswith(short)
    assert len(tokenizer.encode(short)) == 100


def test_messages_go_through_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A mutable sequence."}]
    path.write_text((json.dumps({"messages": chat}) + "\n") * 20)
    found = text_of(tokenizer, TEMPLATE, calibrate=(str(path),), calibrate_chat=True)
    assert found.startswith("<user>What is a list?<assistant>A mutable sequence.<user>")


def wrong(tmp_path: Path, content: str, name: str = "text.jsonl") -> dict[str, object]:
    path = tmp_path / name
    path.write_text(content)
    return {"calibrate": (str(path),)}


CHAT_LINE = '{"messages": [{"role": "user", "content": "word word word"}]}\n' * 40


@pytest.mark.parametrize(
    ("content", "name", "changes", "message"),
    [
        ("not json\n", "a.jsonl", {}, r"a\.jsonl:1 is not JSON"),
        ('{"text": "a"}\n{"prompt": "b"}\n', "a.jsonl", {}, r'a\.jsonl:2 must be an object with "text"'),
        ('["a"]\n', "a.jsonl", {}, r"a\.jsonl:1 must be an object"),
        (CHAT_LINE, "a.jsonl", {}, r"a\.jsonl:1 holds messages; --calibrate-chat"),
        (CHAT_LINE, "a.jsonl", {"calibrate_chat": True}, "this model has none"),
        ('{"text": "a"}\n', "a.jsonl", {"calibrate_chat": True}, "--calibrate names none"),
        ("few words", "a.txt", {}, "gives [0-9]+ tokens; at least 64"),
        ("", "a.txt", {}, "gives 0 tokens"),
        (COMPARED, "a.txt", {}, "holds the text that the export is compared on"),
    ],
)
def test_wrong_text(
    content: str, name: str, changes: dict[str, object], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        text_of(tokenizer, **wrong(tmp_path, content, name), **changes)


def test_text_that_is_not_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot read the calibration text .*none\.txt"):
        text_of(tokenizer, calibrate=(str(tmp_path / "none.txt"),))
    with pytest.raises(ExportError, match=r"holds no \.jsonl, \.md, \.txt file"):
        text_of(tokenizer, calibrate=(str(tmp_path),))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExportError, match="cannot read the calibration text"):
        text_of(tokenizer, calibrate=(str(tmp_path / "binary.txt"),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "none", "calibrate": ("a.txt",)}, "--calibrate means nothing to --quantize none"),
        ({"quantize": "bf16", "statistics": Path("a.safetensors")}, "--statistics means nothing to --quantize bf16"),
        ({"quantize": "int4", "calibrate_tokens": 100}, "only if --calibrate or --statistics is given"),
        ({"quantize": "int4-gptq", "statistics": Path("a.safetensors")}, "int4-gptq needs products of all pairs"),
    ],
)
def test_options_that_would_be_ignored(
    changes: dict[str, object], message: str, llama: Path, tmp_path: Path, traced_once: None
) -> None:
    options = replace(ExportOptions(str(llama), tmp_path / "bundle", verify="none"), **changes)
    with pytest.raises(ExportError, match=message):
        export(options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibrate_tokens": 10}, "--calibrate-tokens is 10; it must be at least 64"),
        ({"calibrate_chat": True}, "name them with --calibrate"),
    ],
)
def test_options_that_are_wrong(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        replace(OPTIONS, **changes)


def test_the_command_hands_on_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmedge_converters import export as module

    given: list[ExportOptions] = []

    def stop(options: ExportOptions, _progress: object) -> None:
        given.append(options)
        raise ExportError("far enough")

    monkeypatch.setattr(module, "export", stop)
    call = [
        "export",
        "a",
        "b",
        "--quantize",
        "int4-gptq",
        "--calibrate",
        "x.txt",
        "--calibrate",
        "y",
        "--calibrate-chat",
    ]
    done = CliRunner().invoke(app, [*call, "--calibrate-tokens", "99", "--statistics", "s.safetensors"])
    assert isinstance(done.exception, ExportError)
    assert given == [
        ExportOptions(
            "a",
            Path("b"),
            quantize="int4-gptq",
            calibrate=("x.txt", "y"),
            calibrate_tokens=99,
            calibrate_chat=True,
            statistics=Path("s.safetensors"),
        )
    ]
    CliRunner().invoke(app, ["export", "a", "b"])
    assert given[1] == ExportOptions("a", Path("b"))


def test_a_model_without_a_tokenizer_cannot_be_calibrated(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(ExportError, match="has no tokenizer"):
        export(ExportOptions(str(folder), tmp_path / "bundle", quantize="int4-awq", verify="none"))
    assert not (tmp_path / "bundle").exists()


def test_statistics_are_used_again(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    path = tmp_path / "kept" / "statistics.safetensors"
    first = calibration(folder, tmp_path / "scratch", path).statistics(lambda *_: None)
    kept = calibration(folder, tmp_path / "scratch", path)
    found = replace_model(kept).statistics(lambda *_: None)  # the model does not run
    assert found.keys() == first.keys()
    for place, one in first.items():
        assert found[place].tokens == one.tokens
        assert torch.equal(found[place].mean_square, one.mean_square)
        assert torch.equal(found[place].largest, one.largest)
    assert [item.name for item in path.parent.iterdir()] == [path.name]

    other = make_model(tmp_path / "other", num_hidden_layers=1, dtype=torch.bfloat16)
    with pytest.raises(ExportError, match=r"another export: architecture and weights differ"):
        calibration(other, tmp_path / "scratch", path).statistics(lambda *_: None)
    changed = calibration(folder, tmp_path / "scratch", path)
    changed.text = replace(changed.text, rows=changed.text.rows[:-1])
    with pytest.raises(ExportError, match=r"another export: text and tokens differ"):
        changed.statistics(lambda *_: None)
    adapted = calibration(folder, tmp_path / "scratch", path)
    adapted.model = replace(adapted.model, files=replace(adapted.model.files, adapter=other))
    with pytest.raises(ExportError, match=r"another export: adapter differ"):
        adapted.statistics(lambda *_: None)


def test_too_little_memory(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = calibration(llama, tmp_path)
    monkeypatch.setattr(model_module, "available_bytes", lambda: 500_000)
    with pytest.raises(SourceError, match=r"calibrating needs about 0\.0 GB .* states of 768 tokens"):
        given.statistics(lambda *_: None)
    monkeypatch.setattr(model_module, "available_bytes", lambda: 10_000_000)
    assert given.statistics(lambda *_: None)


def replace_model(kept: object) -> object:
    """A calibration whose model cannot run."""
    from fmedge_converters.calibration.calibration import Calibration

    assert isinstance(kept, Calibration)
    kept.model = replace(kept.model, rows=())
    return kept


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_what_is_no_file_of_statistics(content: bytes | None, tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    if content is None:
        shutil.copy(llama / "model.safetensors", path)
    else:
        path.write_bytes(content)
    given = calibration(llama, tmp_path / "scratch", path)
    with pytest.raises(ExportError, match="is no file of statistics that fmedge wrote"):
        read_statistics(path, given._key())


def test_an_export_with_kept_statistics(llama: Path, tmp_path: Path, traced_once: None) -> None:
    """From the command's options to the evidence; the second export is the first to the byte."""
    options = ExportOptions(
        str(llama), tmp_path / "first", quantize="int4", block_size=32, verify="none", calibrate_tokens=256,
        statistics=tmp_path / "statistics.safetensors",
    )  # fmt: skip
    first = export(options)
    second = export(replace(options, output=tmp_path / "second"))
    for bundle in (first, second):
        (evidence,) = bundle.manifest.evidence
        assert evidence.name == "calibration"
        assert evidence.what.endswith("on 256 tokens of Python's documentation")
        assert evidence.figures == {"calibration_tokens": 256, "matrices": 14}
    assert first.manifest.files == second.manifest.files
    plain = export(replace(options, output=tmp_path / "plain", statistics=None, calibrate_tokens=16384))
    name = "decoder.onnx.data"
    assert plain.manifest.files[name].sha256 != first.manifest.files[name].sha256
    assert sorted(path.name for path in first.folder.iterdir()) == sorted(path.name for path in plain.folder.iterdir())
    assert np.isclose(first.nbytes, plain.nbytes, rtol=1e-3)
