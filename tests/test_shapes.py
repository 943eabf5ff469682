"""The built-in pictures, and the rules that read them."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmedge.shapes import (
    ATTRIBUTES,
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    NOTHING,
    POSITIONS,
    SEEN,
    SHAPES,
    SIZES,
    SMALLEST_SIDE,
    Combination,
    Detection,
    combination_from_caption,
    detect,
    draw,
)

RED_CIRCLE = Combination("large", "red", "circle", "left")


def read(combination: Combination) -> Detection:
    return Detection(*(getattr(combination, attribute) for attribute in ATTRIBUTES))


def picture(combination: Combination = RED_CIRCLE, side: int = 32, seed: int = 0):
    return draw(combination, side, np.random.default_rng(seed))


def test_a_fifth_is_held_out_and_every_word_and_pair_of_words_is_seen():
    assert (len(COMBINATIONS), len(SEEN), len(HELD_OUT)) == (180, 144, 36)
    assert not set(SEEN) & set(HELD_OUT)
    tables = dict(zip(ATTRIBUTES, (SIZES, COLOURS, SHAPES, POSITIONS), strict=True))
    for first, second in itertools.combinations(ATTRIBUTES, 2):
        pairs = {(getattr(one, first), getattr(one, second)) for one in SEEN}
        assert len(pairs) == len(tables[first]) * len(tables[second])
    for attribute, table in tables.items():  # And none of them is mostly held out.
        share = Counter(getattr(one, attribute) for one in HELD_OUT)
        assert max(share.values()) - min(share.values()) <= 3, (attribute, table)


def test_a_caption_says_its_combination():
    assert RED_CIRCLE.caption == "a large red circle in the left"
    assert [combination_from_caption(one.caption) for one in COMBINATIONS] == list(COMBINATIONS)
    assert combination_from_caption("  A large RED circle\nin the left ") == RED_CIRCLE
    assert combination_from_caption("a large pink circle in the left") is None


def test_the_same_random_state_draws_the_same_picture():
    assert np.array_equal(picture(seed=3), picture(seed=3))
    assert not np.array_equal(picture(seed=3), picture(seed=4))
    assert picture().dtype == np.uint8
    assert picture(side=48).shape == (48, 48, 3)


def test_edges_are_anti_aliased():
    shades = np.unique(picture(Combination("large", "blue", "circle", "center"), 64)[..., 0])
    assert len(shades) > 20
    assert shades[-1] == 255


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(COMBINATIONS), st.integers(SMALLEST_SIDE, 128), st.integers(0, 2**32 - 1))
def test_every_drawn_picture_is_read_as_its_caption(combination, side, seed):
    assert detect(picture(combination, side, seed)) == read(combination)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda one: one.caption)
def test_each_combination_is_read_at_the_default_size(combination):
    assert all(detect(picture(combination, 32, seed)) == read(combination) for seed in range(5))


def test_noise_within_reason_changes_nothing():
    noisy = picture().astype(float) + np.random.default_rng(1).normal(0, 8, (32, 32, 3))
    assert detect(np.clip(noisy, 0, 255).astype(np.uint8)) == read(RED_CIRCLE)


def test_what_is_no_figure_has_no_attributes():
    assert detect(np.full((32, 32, 3), 255, np.uint8)) == NOTHING
    assert detect(np.full((32, 32, 3), 250, np.uint8)) == NOTHING
    static = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert detect(static).shape is None


def test_pieces_count_against_a_shape():
    broken = picture()
    broken[12:20, 8:16] = 255  # A patch of it is missing,
    broken[24:32, 24:32] = (220, 40, 40)  # and is elsewhere.
    assert detect(broken) == Detection(None, "red", None, None)
    two = np.minimum(picture(), picture(Combination("large", "red", "circle", "right")))
    assert detect(two).shape is None


def test_a_colour_that_is_none_of_the_table_has_no_name():
    grey = picture()
    grey[grey.min(axis=2) < 200] = (60, 60, 60)
    assert detect(grey).colour is None
    pink = np.where(picture() == 255, 255, np.array([255, 160, 200])).astype(np.uint8)
    assert detect(pink).colour is None


def test_between_two_positions_is_neither_and_too_large_is_no_size():
    corner = np.roll(picture(Combination("small", "red", "circle", "center")), (-8, -8), (0, 1))
    assert detect(corner).position is None
    huge = np.kron(picture(Combination("large", "red", "square", "center"))[8:24, 8:24], np.ones((2, 2, 1)))
    assert detect(huge.astype(np.uint8)).size is None
