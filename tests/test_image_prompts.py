"""Prompts of images: weights, windows, and what the text encoder makes of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fmedge_runtimes.diffusion import Diffusion
from fmedge_runtimes.pipelines.clip_text import ClipText, Windows
from fmedge_runtimes.pipelines.prompt_weights import MOST, Piece, pieces
from hypothesis import given
from hypothesis import strategies as st
from image_models import LENGTH, Opened, clip_tokenizer, stable_diffusion, write_folder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ROOM = LENGTH - 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("plain, (very) well", [("plain, ", 1), ("very", 1.1), (" well", 1)]),
        ("a (red:1.3) [old] ((car))", [("a ", 1), ("red", 1.3), (" ", 1), ("old", 1 / 1.1), (" ", 1), ("car", 1.21)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("[a (b)]", [("a ", 1 / 1.1), ("b", 1.0)]),
        (r"\(a\) \[b\] \\(c)", [("(a) [b] \\", 1), ("c", 1.1)]),
        ("a ) b ( c ] d [ e", [("a ) b ( c ] d [ e", 1)]),
        ("(a", [("(a", 1)]),
        ("((a)", [("(", 1), ("a", 1.1)]),
        ("(a]", [("(a]", 1)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:b:.5)", [("a:b", 0.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.5)", []),
        ("(a:-1)", [("a:-1", 1.1)]),
        ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
        ("12:30 (pm)", [("12:30 ", 1), ("pm", 1.1)]),
        ("a\\", [("a\\", 1)]),
        ("", []),
        ("(a:1e9)", [("a:1e9", 1.1)]),
        ("(a:999999)", [("a", MOST)]),
    ],
)
def test_weights_are_read_as_people_write_them(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = pieces(prompt)
    assert [piece.text for piece in found] == ([text for text, _ in expected] or [""])
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in expected] or [1.0])


@given(st.text(alphabet="ab ():[]\\.19", max_size=40))
def test_any_text_is_a_prompt(prompt: str) -> None:
    found = pieces(prompt)
    assert found
    assert all(0 <= piece.weight <= MOST for piece in found)
    assert all(one.weight != other.weight for one, other in pairwise(found))
    # Nothing is lost but brackets, backslashes and weights.
    assert "".join(piece.text for piece in found).count("a") == prompt.count("a")


@given(st.text(max_size=60))
def test_escaped_text_is_literal(prompt: str) -> None:
    escaped = "".join(f"\\{letter}" if letter in "\\()[]" else letter for letter in prompt)
    assert pieces(escaped) == [Piece(prompt, 1.0)]


Tree = Any


def written(tree: Tree) -> str:
    match tree:
        case str():
            return tree
        case ("(", inner, None):
            return f"({''.join(map(written, inner))})"
        case ("(", inner, weight):
            return f"({''.join(map(written, inner))}:{weight})"
        case (_, inner, _):
            return f"[{''.join(map(written, inner))}]"


def meant(tree: Tree, weight: float = 1.0) -> list[tuple[str, float]]:
    if isinstance(tree, str):
        return [(letter, weight) for letter in tree]
    kind, inner, own = tree
    factor = 1 / 1.1 if kind == "[" else 1.1 if own is None else own
    return [pair for part in inner for pair in meant(part, weight * factor)]


WORDS = st.text(alphabet="abc ", min_size=1, max_size=5)
TREES = st.recursive(
    WORDS,
    lambda inner: st.tuples(
        st.sampled_from("(["), st.lists(inner, min_size=1, max_size=3), st.none() | st.sampled_from([0.5, 1.5, 2])
    ),
    max_leaves=6,
)


@given(st.lists(TREES, max_size=3))
def test_nested_weights_multiply(trees: list[Tree]) -> None:
    # What ends a bracket with a weight is text: a bracket's own end is no place for it.
    prompt = "".join(map(written, trees))
    if "):" in prompt or "]:" in prompt:
        return
    expected = [pair for tree in trees for pair in meant(tree)]
    found = [(letter, piece.weight) for piece in pieces(prompt) for letter in piece.text]
    assert [letter for letter, _ in found] == [letter for letter, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return write_folder(stable_diffusion(), tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def text(opened: Opened) -> ClipText:
    return ClipText(opened.model()._parts)


TOKENIZER = clip_tokenizer()


@given(prompt=st.text(alphabet="abc red,.'1 \n", max_size=70), least=st.integers(1, 3))
def test_windows_hold_all_tokens_in_order(text: ClipText, prompt: str, least: int) -> None:
    found = text.windows(prompt, weighted=False, least=least)
    ids = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    count = max(-(-len(ids) // ROOM), least, 1)
    assert found.ids.shape == (count, LENGTH)
    assert found.weights is None
    back: list[int] = []
    for number, window in enumerate(found.ids):
        part = ids[number * ROOM : (number + 1) * ROOM]
        whole = [TOKENIZER.bos_token_id, *part, TOKENIZER.eos_token_id]
        assert window.tolist() == whole + [TOKENIZER.pad_token_id] * (LENGTH - len(whole))
        back += part
    assert back == ids
    # One window is what diffusers asks the tokenizer for.
    if count == 1:
        theirs = TOKENIZER(prompt, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
        assert found.ids[0].tolist() == theirs


@given(prompt=st.text(alphabet="abc red,.'1", max_size=70))
def test_a_prompt_without_brackets_has_no_weights(text: ClipText, prompt: str) -> None:
    one, other = (text.windows(prompt, weighted=weighted) for weighted in (True, False))
    assert one.weights is None
    assert np.array_equal(one.ids, other.ids)


def test_weights_stand_at_their_tokens(text: ClipText) -> None:
    found = text.windows("a (red:1.5) cat", weighted=True)
    assert found.weights is not None
    assert found.weights[0].tolist() == [1, 1, 1.5, *[1] * (LENGTH - 3)]
    across = text.windows("a " * (ROOM - 1) + "(b b:2)", weighted=True)
    assert across.weights is not None
    assert [np.flatnonzero(row != 1).tolist() for row in across.weights] == [[ROOM], [1]]
    assert text.windows("(a:1) b", weighted=True).weights is None
    assert text.windows("(a:1.5)", weighted=False).weights is None


def test_states_of_weighted_words_move_from_the_empty_prompt(opened: Opened, text: ClipText) -> None:
    def states(prompt: str | Windows) -> np.ndarray:
        windows = text.windows(prompt, weighted=True) if isinstance(prompt, str) else prompt
        with opened.model()._parts.use("text_encoder") as part:
            return text.encode(part, [windows], "last_hidden_state", None)[0].states

    plain, empty, found = states("a red cat"), states(""), states("a (red:1.5) cat")
    expected = plain.copy()
    expected[2] = empty[2] + 1.5 * (plain[2] - empty[2])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_brackets_can_be_taken_literally(opened: Opened) -> None:
    model = opened.model()

    def image(prompt: str, **options: bool) -> np.ndarray:
        return model.generate(prompt, Diffusion(steps=1, guidance=1.0, seed=1, **options))[0].latents

    weighted, literal = image("a (red) cat"), image("a (red) cat", weights=False)
    assert not np.allclose(weighted, literal)
    np.testing.assert_allclose(literal, image(r"a \(red\) cat"), atol=1e-5)
    assert np.array_equal(image("a red cat"), image("a red cat", weights=False))


def test_a_long_prompt_is_longer_for_the_denoiser(opened: Opened) -> None:
    model = opened.model()
    model._parts.load()
    lengths = []
    forward = opened.sessions["unet"].forward

    def watched(**feeds: Any) -> Any:
        lengths.append(feeds["encoder_hidden_states"].shape[:2])
        return forward(**feeds)

    opened.sessions["unet"].forward = watched
    prompts = ["a", "b " * ROOM, "c " * (ROOM + 1), "d " * 3 * ROOM]
    model.generate(prompts, Diffusion(steps=1, guidance=4.0, seed=1, negative=("", "", "", "e " * 4 * ROOM)))
    assert lengths == [(4, LENGTH), (2, 2 * LENGTH), (2, 4 * LENGTH)]
