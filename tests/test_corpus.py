"""Reading documents: what is read, in what order, and what is refused with which words."""

import io
import json
import random
import sys
from types import SimpleNamespace

import pytest
from fmedge_runtimes.errors import DataError

from fmedge.training import python_text
from fmedge.training.corpus import END_OF_TEXT, documents_from_sources, split_documents
from fmedge.training.python_text import python_documents


def read(*sources, field="text"):
    return documents_from_sources(tuple(map(str, sources)), field=field)


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.rst").write_bytes("\ufeffOne\r\ntwo é\n".encode())
    assert read(tmp_path / "a.rst") == ["One\ntwo é\n"]


def test_the_end_token_separates_documents(tmp_path):
    (tmp_path / "a.txt").write_text(f"One\n{END_OF_TEXT}\n  two\n{END_OF_TEXT}\n")
    assert read(tmp_path / "a.txt") == ["One", "  two"]


def test_jsonl_gives_a_field_of_each_line(tmp_path):
    lines = [json.dumps({"text": "no", "body": body}) for body in ("one", "two\u2028lines", "three")]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    assert read(tmp_path / "a.jsonl", field="body") == ["one", "two\u2028lines", "three"]


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    for name in ("b/z.txt", "b/a.md", "c.jsonl", "a.txt", ".hidden/a.txt", "b/.a.txt", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name == "c.jsonl" else name)
    (tmp_path / "empty.txt").touch()
    assert read(tmp_path) == ["a.txt", "c.jsonl", "b/a.md", "b/z.txt"]


def test_sources_come_in_the_order_given_and_may_be_standard_input(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("file")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("stdin é".encode())))
    assert read("-", tmp_path / "a.txt") == ["stdin é", "file"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: is empty"),
        ("a.txt", b" \n ", "a.txt: holds no text"),
        ("a.txt", b"text\0text", "a.txt: is binary (a zero byte at offset 4)"),
        ("a.txt", b"caf\xe9 au lait", "a.txt: is not UTF-8 (byte 0xe9 at offset 3)"),
        ("a.txt", b"cut \xe2\x82", "a.txt: is not UTF-8 (byte 0xe2 at offset 4)"),
        ("a.jsonl", b"\n\n", "a.jsonl: the file holds no text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', "a.jsonl, line 2: a JSON object is needed, not list"),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}',
            'a.jsonl, line 1: no field "text": name the field with --field',
        ),
        ("a.jsonl", b'{"text": 1}', 'a.jsonl, line 1: the field "text" must be a string, not int'),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_an_unusable_file_of_a_folder_is_named(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    with pytest.raises(DataError, match=r"bad\.txt: is binary \(a zero byte at offset 8\)"):
        read(tmp_path)


def test_missing_files_and_folders_without_text_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.txt: there is no such file or folder"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"holds no \.jsonl, \.md, \.txt file"):
        read(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="every file of the folder is empty"):
        read(tmp_path)


def test_empty_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(DataError, match="standard input: is empty"):
        read("-")


def test_the_split_holds_whole_documents_out_whatever_their_order():
    documents = [f"document {number} " + "x" * (number % 50) for number in range(500)]
    corpus = split_documents(documents)
    assert sorted(corpus.train + corpus.validation) == sorted(documents)
    assert 0.045 < corpus.validation_bytes / sum(map(len, documents)) <= 0.05
    random.Random(0).shuffle(documents)
    assert sorted(split_documents(documents).validation) == sorted(corpus.validation)


def test_the_end_of_a_long_document_is_held_out_where_no_document_fits():
    book = "\n\n".join(f"Paragraph {number} of the book." for number in range(1000))
    corpus = split_documents(["A short note.", book])
    assert corpus.train[-1] + corpus.validation[-1] == book
    assert corpus.train[-1].endswith("\n\n")
    assert 0.04 < corpus.validation_bytes / len(book) < 0.06


def test_the_fingerprint_tells_texts_and_splits_apart():
    one, two = split_documents(["a b c d e f g"] * 30), split_documents(["a b c d e f g"] * 31)
    assert one.sha256 != two.sha256
    assert one.sha256 == split_documents(["a b c d e f g"] * 30).sha256


@pytest.mark.medium
def test_the_built_in_text_is_pythons_documentation():
    documents = python_documents()
    assert len(documents) == len(set(documents))
    assert sum(map(len, documents)) > 1_000_000
    assert any(document.startswith('The "with" statement') for document in documents)
    assert json.__doc__.strip() in documents


def test_the_built_in_text_comes_from_sources_that_are_parsed_and_not_imported(tmp_path, monkeypatch):
    sources = {
        "b.py": '"""B."""\nif True:\n    def f():\n        """F \\d."""\n    try: pass\n    except E:\n'
        '        class C:\n            async def m():\n                """M."""\n',
        "a/z.py": '"""Z."""\ndef g():\n    """B."""\nraise SystemExit\n',
        "broken.py": '"""Broken."""\nprint "2"\n',
        "test/t.py": '"""A test."""',
        "site-packages/p.py": '"""A package."""',
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(python_text, "ENOUGH_BYTES", 1)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", SimpleNamespace(topics={"b": "Topic b\n", "a": "Topic a\n"}))
    assert python_documents() == ["Topic a", "Topic b", "Z.", "B.", "F \\d.", "M."]


def test_an_interpreter_without_its_library_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text('"""Only this."""')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"the built-in text is not there.*--data"):
        python_documents()
