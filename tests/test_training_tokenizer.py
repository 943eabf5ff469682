"""The tokenizer: exact round trips, the same ids for every loader, refusals."""

import json

import pytest
from fmedge_runtimes.errors import DataError
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fmedge.training.corpus import END_OF_TEXT
from fmedge.training.tokenizer import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    read_tokenizer,
    tokens_from_documents,
    train_tokenizer,
)

DOCUMENTS = tuple(f"    def number_{number}(self):\n        return {number * 37}  # é\n" for number in range(60))
TRAINED = train_tokenizer(DOCUMENTS, 400)


def write(files, folder):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: END_OF_TEXT not in text))
def test_decoding_gives_back_the_text(text):
    ids = TRAINED.tokenizer.encode(text).ids
    assert TRAINED.tokenizer.decode(ids) == text
    assert TRAINED.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_training_is_deterministic_and_keeps_to_its_size():
    assert TRAINED.vocabulary == 400
    assert train_tokenizer(DOCUMENTS, 400).files == TRAINED.files
    assert train_tokenizer(("ab",), 400).vocabulary == 258  # There is one pair to merge.
    with pytest.raises(DataError, match="a vocabulary of 256 is too small"):
        train_tokenizer(DOCUMENTS, 256)


def test_every_document_ends_in_the_end_token():
    tokens = tokens_from_documents(TRAINED, ["one", " two"])
    assert TRAINED.tokenizer.decode(list(tokens), skip_special_tokens=False) == f"one{END_OF_TEXT} two{END_OF_TEXT}"
    assert tokens[-1] == TRAINED.eos
    many = ["x"] * 2500
    assert len(tokens_from_documents(TRAINED, many)) == 5000


def test_every_loader_gives_the_same_ids(tmp_path):
    from transformers import AutoTokenizer

    folder = write(TRAINED.files, tmp_path / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    plain, auto = Tokenizer.from_file(str(folder / TOKENIZER_FILE)), AutoTokenizer.from_pretrained(folder)
    for text in (*DOCUMENTS[:3], " leading", "trailing ", "a\n\n\tb", "日本 \u0007", f"a{END_OF_TEXT}b", ""):
        assert plain.encode(text).ids == auto.encode(text) == TRAINED.tokenizer.encode(text).ids
        assert auto.decode(auto.encode(text)) == text
    assert (auto.eos_token_id, auto.bos_token_id, auto.pad_token_id) == (
        TRAINED.eos,
        TRAINED.bos,
        TRAINED.pad,
    )


def test_a_folder_is_copied_as_it_is(tmp_path):
    config = {"eos_token": {"content": "9"}, "bos_token": "8", "pad_token": None, "extra": 1}
    files = {
        **TRAINED.files,
        CONFIG_FILE: json.dumps(config).encode(),
        "chat_template.jinja": b"{{ messages }}",
    }
    found = read_tokenizer(write(files, tmp_path / "tokenizer"))
    assert found.files == files
    ids = [TRAINED.tokenizer.token_to_id(token) for token in "98"]
    assert (found.eos, found.bos, found.pad) == (ids[0], ids[1], ids[0])


def test_a_file_alone_gets_a_config(tmp_path):
    folder = write(TRAINED.files, tmp_path / "tokenizer")
    (folder / CONFIG_FILE).unlink()
    assert read_tokenizer(folder / TOKENIZER_FILE).files == TRAINED.files


def test_a_tokenizer_that_begins_every_prompt_begins_every_document(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "words.json"))
    assert list(tokens_from_documents(read_tokenizer(tmp_path / "words.json"), ["a a a", "a"])) == [
        *(0, 2, 2, 2, 1),
        *(0, 2, 1),
    ]


def test_unusable_tokenizers_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none/tokenizer\.json|none: No such file.*--tokenizer takes"):
        read_tokenizer(tmp_path / "none")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: is not a tokenizer\.json"):
        read_tokenizer(tmp_path / "bad.json")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match=r"words\.json: has no known end token"):
        read_tokenizer(tmp_path / "words.json")
    for config, message in (
        ({"eos_token": "<end>"}, 'its eos_token "<end>" is not in tokenizer.json'),
        ({}, 'names no "eos_token"'),
        ([], "a JSON object is needed"),
    ):
        folder = write({**TRAINED.files, CONFIG_FILE: json.dumps(config).encode()}, tmp_path / "tokenizer")
        with pytest.raises(DataError) as error:
            read_tokenizer(folder)
        assert message in str(error.value)
