"""fmedge eval on text bundles: figures against PyTorch's, questions, records, pictures, refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmedge_converters.decoder import quiet_libraries
from fmedge_runtimes.errors import BackendError, DataError, ParityError, RequestError, SourceError
from fmedge_runtimes.likelihood import Sums
from fmedge_runtimes.manifest import read_manifest
from fmedge_runtimes.tokenizer import Tokenizer
from fmedge_runtimes.verify import verify
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TEXT
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fmedge.cli import app
from fmedge.held_out_text import Cut, TextInWindows, read_pieces, token_stream
from fmedge.multiple_choice import read_questions
from fmedge.text_quality import bucket_of, last_of


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def found(*arguments: object) -> list[dict[str, Any]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    bundles: list[dict[str, Any]] = json.loads(result.stdout)["bundles"]
    return bundles


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("Ein Zug f\u00e4hrt; \u4f60\u597d, \U0001f600!\n" + TEXT * 2, "utf-8")
    return path


@pytest.fixture(scope="module")
def original(llama: Path) -> Any:
    with quiet_libraries():
        return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(0, 90), length=st.integers(2, 20), stride=st.integers(1, 20), prefix=st.integers(0, 2))
def test_every_token_is_scored_once_behind_all_the_context_of_its_window(
    tokens: int, length: int, stride: int, prefix: int
) -> None:
    stride = min(stride, length)
    stream = ((number, number % 5) for number in range(tokens))
    scored = []
    for window in TextInWindows(stream, Cut(length, stride), [1000] * prefix).windows():
        assert len(window.ids) <= length + prefix
        assert window.ids[:prefix] == [1000] * prefix
        assert window.first >= 1
        inner = window.ids[prefix:]
        assert inner == list(range(inner[0], inner[0] + len(inner)))
        assert window.nbytes == sum(number % 5 for number in window.ids[window.first :])
        if scored and window.ids[window.first] >= length:
            assert window.first - prefix >= length - stride - (not prefix and stride == length)
        scored += window.ids[window.first :]
    # Only where nothing stands before a token it is not scored.
    alone = (
        set()
        if prefix
        else {number for number in range(tokens) if number == 0 or (stride == length and number % length == 0)}
    )
    assert scored == [number for number in range(tokens) if number not in alone]


@settings(deadline=None, max_examples=40)
@given(positions=st.integers(1, 70), known=st.integers(0, 70), seed=st.integers(0, 99))
def test_sums_are_those_of_whole_arrays(positions: int, known: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    ours, theirs = (random.standard_normal((positions, 11)).astype(np.float32) * 3 for _ in range(2))
    theirs[:, 3] = -np.inf  # a token that the other one finds impossible
    following = random.integers(0, 3, min(known, positions)).tolist()
    sums = Sums()
    sums.add(ours, following, theirs)
    p, q = (torch.from_numpy(values).double().log_softmax(-1) for values in (theirs, ours))
    assert sums.kl == pytest.approx(float((p.exp() * (p - q)).nan_to_num(0.0).sum()))
    assert sums.nats == pytest.approx(-sum(float(q[row, token]) for row, token in enumerate(following)))
    assert sums.other_nats == pytest.approx(-sum(float(p[row, token]) for row, token in enumerate(following)))
    assert sums.same_best == int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    best5 = np.argsort(-ours, -1)[:, :5]
    assert sums.other_best_among == sum(theirs[row].argmax() in best5[row] for row in range(positions))
    assert (sums.compared, sums.scored, sums.not_finite) == (positions, len(following), 0)
    ours[0, 5] = np.nan
    broken = Sums()
    broken.add(ours, following, theirs)
    assert broken.not_finite == 1


def test_buckets_cover_all_positions() -> None:
    for position in range(1, 3000):
        assert last_of(bucket_of(position) - 1) < position <= last_of(bucket_of(position))


def test_a_text_in_pieces_gives_all_of_its_bytes(bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(bundle / "tokenizer.json")
    whole = text.read_text("utf-8")
    monkeypatch.setattr("fmedge.held_out_text.PIECE", 50)
    pieces = list(read_pieces(text))
    assert "".join(pieces) == whole
    assert len(pieces) > 3
    stream = list(token_stream(pieces, tokenizer, None))
    assert tokenizer.decode([token for token, _ in stream]) == whole
    assert sum(nbytes for _, nbytes in stream) == len(whole.encode())
    assert len(list(token_stream(pieces, tokenizer, 7))) == 7


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (48, 48), (40, 13)])
def test_perplexity_is_pytorchs_on_the_same_windows(
    window: int, stride: int, bundle: Path, text: Path, original: Any
) -> None:
    (one,) = found(bundle, "--data", text, "--window", window, "--stride", stride)
    ids = Tokenizer(bundle / "tokenizer.json").encode(text.read_text("utf-8"))
    nats, scored, end = 0.0, 0, 1
    by_position: dict[int, list[float]] = {}
    for start in range(0, len(ids), stride):
        piece = ids[start : start + window]
        first = max(end - start, 1)
        if first >= len(piece):
            continue
        with torch.no_grad():
            likely = original(torch.tensor([piece])).logits[0].double().log_softmax(-1)
        for position in range(first, len(piece)):
            loss = -float(likely[position - 1, piece[position]])
            nats, scored = nats + loss, scored + 1
            by_position.setdefault(bucket_of(position), []).append(loss)
        end = start + len(piece)
    measured = one["text"]
    assert measured["tokens"] == scored
    assert measured["perplexity"] == pytest.approx(math.exp(nats / scored), rel=1e-5)
    for bucket, losses in zip(measured["by_position"], by_position.values(), strict=True):
        assert bucket["tokens"] == len(losses)
        assert bucket["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    if stride < window:  # then only the first token has no prediction
        first_bytes = Tokenizer(bundle / "tokenizer.json").encode_with_bytes(text.read_text("utf-8"))[1][0]
        size = len(text.read_bytes()) - first_bytes
        assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.fixture(scope="module")
def rounded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in int4."""
    from fmedge_converters.export import export
    from fmedge_converters.export_options import ExportOptions

    output = tmp_path_factory.mktemp("rounded") / "int4"
    return export(ExportOptions(str(llama), output, quantize="int4", block_size=32, verify="none")).folder


def test_the_benchmark_counts_every_matrix_of_a_bundle_once(
    bundle: Path, rounded: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from matrices import onnx_matrix_bytes, parameters_of_matrices

    numbers, table = parameters_of_matrices(llama), 320 * 64
    config = json.loads((llama / "config.json").read_text("utf-8"))
    aside = table * (1 if config["tie_word_embeddings"] else 2)
    assert onnx_matrix_bytes(bundle) == numbers * 4
    # Layers: 4 bits and a scale of 16 for 32 weights; head and embedding: 8 bits and a scale.
    assert onnx_matrix_bytes(rounded) == (numbers - aside) * 9 // 16 + aside * 17 // 16


def test_bundles_are_compared_with_another_and_with_pytorch(
    bundle: Path, rounded: Path, llama: Path, text: Path
) -> None:
    same, int4 = found(bundle, rounded, "--data", text, "--against", bundle)
    assert same["text"]["difference"]["mean_kl"] == 0
    assert same["text"]["difference"]["top1_agreement"] == same["text"]["difference"]["top5_agreement"] == 1
    assert same["text"]["difference"]["perplexity"] == same["text"]["perplexity"]
    assert same["nbytes"] > int4["nbytes"]
    assert same["bits_per_weight"] > 32 > int4["bits_per_weight"] > 4
    (pytorch,) = found(rounded, "--data", text, "--against", llama)
    for name, value in pytorch["text"]["difference"].items():
        if name == "against":
            assert value == "PyTorch in fp32"
        else:
            assert value == pytest.approx(int4["text"]["difference"][name], rel=1e-3, abs=1e-6)
    assert 0.01 < pytorch["text"]["difference"]["mean_kl"] < 0.35
    assert pytorch["text"]["difference"]["top1_agreement"] < pytorch["text"]["difference"]["top5_agreement"]
    table = run(bundle, rounded, "--data", text, "--tokens", 50).stdout
    assert "int4" in table
    assert "49 tokens scored" in table


def test_an_original_that_is_not_loaded_whole_gives_the_same(
    rounded: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = (rounded, "--data", text, "--tokens", 200, "--window", 32, "--stride", 8, "--against", llama)
    (whole,) = found(*call)
    monkeypatch.setattr("fmedge_converters.reference.RESIDENT_BYTES", 0)
    (streamed,) = found(*call)
    assert "layer by layer" in streamed["text"]["difference"].pop("against")
    del whole["text"]["difference"]["against"]
    assert streamed["text"]["difference"] == pytest.approx(whole["text"]["difference"], rel=1e-4)
    assert streamed["text"]["tokens"] == 199


def test_a_text_comes_from_standard_input(bundle: Path) -> None:
    words = "The list type is a mutable sequence.\n"
    result = CliRunner().invoke(app, ["eval", str(bundle), "--data", "-", "--json"], input=words)
    assert result.exit_code == 0, result.output
    tokens = Tokenizer(bundle / "tokenizer.json").encode(words)
    assert json.loads(result.stdout)["bundles"][0]["text"]["tokens"] == len(tokens) - 1


@pytest.mark.parametrize("bos", [False, True])
def test_what_a_tokenizer_puts_before_a_text_stands_before_every_window(bos: bool, tmp_path: Path) -> None:
    from models import add_tokenizer

    tokenizer = Tokenizer(add_tokenizer(tmp_path, bos=bos) / "tokenizer.json")
    assert tokenizer.prefix() == ([tokenizer.token_id("<|begin|>")] if bos else [])
    ids, sizes = tokenizer.encode_with_bytes(TEXT)
    assert tokenizer.prefix() + ids == tokenizer.encode(TEXT)
    assert sum(sizes) == len(TEXT.encode())


def test_a_model_answers_as_pytorch_finds_it_likeliest(
    bundle: Path, llama: Path, original: Any, tmp_path: Path
) -> None:
    """The planted answers are those that PyTorch prefers: all right; and those that it prefers least: all wrong."""
    tokenizer = Tokenizer(bundle / "tokenizer.json")
    asked = [("What is a list?", ["mutable", "a small device", "x"]), ("A tuple is", ["immutable", "happy and small"])]

    def likelihood(before: str, choice: str) -> float:
        ids, given = tokenizer.encode(before + choice), tokenizer.encode(before)
        with torch.no_grad():
            likely = original(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(likely[place - 1, ids[place]]) for place in range(len(given), len(ids)))

    def lines(pick: Any, per_byte: bool, chat: bool) -> Path:
        path = tmp_path / "questions.jsonl"
        records = []
        for number, (question, choices) in enumerate(asked):
            before = (
                f"<|begin|>user: {question}<|end|>\n<|begin|>assistant: "
                if chat
                else question
                if number
                else f"Question: {question}\nAnswer:"
            )
            space = "" if chat else " "
            scores = [likelihood(before, space + one) / (len(one) if per_byte else 1) for one in choices]
            answer = int(pick(scores))
            if number:
                records.append({"ctx": question, "endings": choices, "label": str(answer)})
            else:
                records.append({"question": question, "choices": choices, "answer": "ABC"[answer]})
        path.write_text("\n".join(map(json.dumps, records)) + "\n")
        return path

    for chat in ((), ("--chat",)):
        for per_byte, name in ((False, "accuracy"), (True, "accuracy_per_byte")):
            for pick, right in ((np.argmax, 1.0), (np.argmin, 0.0)):
                (one,) = found(bundle, "--choices", lines(pick, per_byte, bool(chat)), *chat)
                assert one["choices"][name] == right
                assert one["choices"]["questions"] == 2
                assert one["choices"]["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
                assert one["text"] is None


GOOD = (
    '{"question": "q", "choices": ["x", "y"], "answer": 1}',
    '{"question": "q", "choices": ["x", "y"], "answer": "b", "subject": "s"}',
    '{"id": "i", "question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}',
    '{"ctx": "q", "endings": ["x", "y"], "label": "1"}',
    '{"ctx": "q", "endings": ["x", "y"], "label": 1}',
)


def test_the_questions_among_the_examples_are_read() -> None:
    questions = read_questions(Path(__file__).parent.parent / "examples" / "questions.jsonl")
    assert len(questions) == len({question.text for question in questions}) == 12
    # No letter wins by being chosen always.
    answers = [question.answer for question in questions]
    assert all(answers.count(letter) == 3 for letter in range(4))


def test_the_common_formats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n".join(GOOD))
    questions = read_questions(path)
    assert [(one.text, one.choices, one.answer) for one in questions] == [("q", ("x", "y"), 1)] * len(GOOD)
    assert [one.continues for one in questions] == [False, False, False, True, True]
    assert [one.line for one in questions] == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "it is not JSON"),
        ("[1]", "a JSON object is needed, not list"),
        ('{"question": "q"}', r"its fields \(question\) are no question"),
        ('{"question": "q", "choices": ["x", "y"], "answer": 0, "answerKey": "A"}', "those of several formats"),
        ('{"question": "q", "choices": ["x", "y"], "answer": "1"}', "answer '1' is none of its 2 choices"),
        ('{"question": "q", "choices": ["x", "y"], "answer": 2}', "answer 2 is none"),
        ('{"question": "q", "choices": ["x", "y"], "answer": true}', "answer True is none"),
        ('{"question": "q", "choices": ["x"], "answer": 0}', '"choices" must be two texts or more'),
        ('{"question": " ", "choices": ["x", "y"], "answer": 0}', '"question" must be a text'),
        ('{"question": "q", "choices": {"text": ["x", "y"], "label": ["A"]}, "answerKey": "A"}', "of one length"),
        ('{"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "C"}', "'C' is none"),
    ],
)
def test_other_questions_are_refused_by_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{GOOD[0]}\n{line}\n")
    with pytest.raises(DataError, match=rf"q\.jsonl:2: .*{words}"):
        read_questions(path)


def test_figures_are_recorded_as_evidence(rounded: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(rounded, tmp_path / "other"))
    before = read_manifest(other)
    call = (other, "--data", text, "--tokens", 60, "--record")
    (one,) = found(*call)
    found(*call)  # replaces what it recorded
    found(*call, "--against", llama)
    (tmp_path / "q.jsonl").write_text(GOOD[0])
    found(other, "--choices", tmp_path / "q.jsonl", "--record")
    manifest = read_manifest(other)
    plain, compared, choices = manifest.evidence
    assert manifest.model_copy(update={"evidence": ()}) == before
    assert plain.name == compared.name == choices.name == "eval"
    assert plain.figures["perplexity"] == one["text"]["perplexity"]
    assert plain.what == "the text of held-out.txt in windows of 256 tokens, one every 128"
    assert compared.what == f"{plain.what}, against PyTorch in fp32"
    assert float(compared.figures["mean_kl"]) > 0
    assert choices.figures["questions"] == 1
    assert str(tmp_path) not in (other / "fmedge.json").read_text("utf-8")
    assert [path.name for path in other.iterdir() if path.name.startswith(".")] == []
    verify(other)


def test_pictures_of_the_figures(bundle: Path, rounded: Path, text: Path, tmp_path: Path) -> None:
    few = ("--data", text, "--tokens", 40)
    found(bundle, rounded, *few, "--plot", tmp_path / "size.png")
    assert (tmp_path / "size.png").read_bytes().startswith(b"\x89PNG")
    found(rounded, *few, "--against", bundle, "--plot", tmp_path / "kl.svg")
    assert "KL divergence" not in (tmp_path / "size.png").read_bytes().decode("latin1")
    assert "<svg" in (tmp_path / "kl.svg").read_text("utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl.svg", "size.png"]


def test_pictures_that_cannot_be_drawn(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"must end in \.png"):
        raise run(bundle, "--plot", tmp_path / "x.gif").exception
    with pytest.raises(RequestError, match="is not a folder"):
        raise run(bundle, "--plot", tmp_path / "no" / "x.png").exception
    monkeypatch.setattr("fmedge.quality_plot.find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"pip install 'fmedge\[eval\]'"):
        raise run(bundle, "--plot", tmp_path / "x.png").exception


@pytest.fixture
def other_words(bundle: Path, tmp_path: Path) -> Iterator[Path]:
    """The bundle with another tokenizer."""
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["T"], vocabulary["h"] = vocabulary["h"], vocabulary["T"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    manifest = json.loads((other / "fmedge.json").read_text("utf-8"))
    from fmedge_runtimes.bundle import sha256_of

    path = other / "tokenizer.json"
    manifest["files"]["tokenizer.json"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (other / "fmedge.json").write_text(json.dumps(manifest))
    return other


def test_what_cannot_be_evaluated_is_refused(
    bundle: Path, llama: Path, other_words: Path, text: Path, tmp_path: Path
) -> None:
    empty, binary, single = (tmp_path / name for name in ("empty.txt", "binary.txt", "single.txt"))
    empty.write_text("")
    binary.write_bytes(b"a\0b")
    single.write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"f\xe4hrt")
    (tmp_path / "q.jsonl").write_text("\n")
    cases: list[tuple[tuple[object, ...], type[Exception], str]] = [
        ((bundle, "--data", empty), DataError, "no token to score"),
        ((bundle, "--data", single), DataError, "no token to score"),
        ((bundle, "--data", binary), DataError, "is binary"),
        ((bundle, "--data", tmp_path / "latin.txt"), DataError, "is not UTF-8"),
        ((bundle, "--data", tmp_path / "nothing"), DataError, "cannot read the text"),
        ((bundle, "--data", text, "--window", 257), RequestError, "--window 257 is more than the context"),
        ((bundle, "--data", text, "--window", 8, "--stride", 9), RequestError, "leaves out tokens"),
        ((bundle, "--data", text, "--against", other_words), DataError, "different vocabularies"),
        ((bundle, "--data", text, "--against", tmp_path / "nothing"), SourceError, "neither a folder|not a folder"),
        ((bundle, "--choices", tmp_path / "q.jsonl"), DataError, "holds no questions"),
        ((llama,), SourceError, "model of transformers and no bundle"),
        ((tmp_path / "nothing", "--data", text), SourceError, "nothing: there is no such folder"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words):
            raise run(*arguments).exception
    for arguments, words in (
        ((bundle, "--steps", 4), "is for bundles that make images"),
        ((bundle, "--chat"), "--chat is for the questions"),
        ((bundle, "--choices", "q.jsonl", "--window", 8), "--window is for a text"),
        ((bundle, other_words, "--data", "-"), "standard input can be read once"),
        ((bundle, bundle), "given twice"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert words in " ".join(result.output.replace("\u2502", " ").split())


def test_another_vocabulary_of_the_source_is_refused(bundle: Path, text: Path, tmp_path: Path) -> None:
    from models import make_model

    with pytest.raises(DataError, match="a vocabulary of 320 tokens, what it is compared with 384"):
        raise run(bundle, "--data", text, "--against", make_model(tmp_path / "model", vocab_size=384)).exception


def test_logits_that_are_not_finite_are_an_error(bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmedge_runtimes.decoder import Decoder

    predict = Decoder.predict

    def broken(*arguments: Any) -> Iterator[Any]:
        for logits in predict(*arguments):
            logits[0] = np.nan
            yield logits

    monkeypatch.setattr(Decoder, "predict", broken)
    with pytest.raises(ParityError, match="1 of 19 positions have logits that are not finite"):
        raise run(bundle, "--data", text, "--tokens", 20).exception
