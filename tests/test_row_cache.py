"""The rows' cache: it grows when it must, keeps what it holds, and fails without harm."""

import numpy as np
import pytest
from fake_session import (
    CONTEXT,
    HYBRID,
    PLAIN,
    TOKEN_BYTES,
    VOCABULARY,
    WINDOW,
    WINDOWED,
    FakeSession,
    Layers,
    cache_facts,
    logits_of,
    row_bytes,
    text_facts,
)
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.errors import CacheMemoryError, RequestError
from fmedge_runtimes.row_cache import GROWTH, STEP, RowCache, parts_of, resident
from fmedge_runtimes.session import TensorSpec
from hypothesis import given, settings
from hypothesis import strategies as st

ALL = pytest.mark.parametrize("layers", [PLAIN, WINDOWED, HYBRID], ids=["plain", "windowed", "hybrid"])


def new_cache(session, **changes):
    return RowCache(session, text_facts(session.layers, **changes))


def fill(cache, row, tokens):
    """Put a row of so many tokens into the cache, and return what a reader must find there."""
    written = {}
    generator = np.random.default_rng(1000 * row + tokens)
    for name, buffer in cache.view(row, row + 1)[0].items():
        heads, _, size = buffer.shape[1:]
        written[name] = generator.normal(size=(heads, tokens, size)).astype(np.float32)
        buffer.array[0, :, :tokens] = written[name]
    cache.lengths[row] = tokens
    cache.tokens[row, :tokens] = generator.integers(0, VOCABULARY, tokens)
    written["tokens"] = cache.tokens[row, :tokens].copy()
    return written


def held(cache, row):
    length = cache.lengths[row]
    found = {name: buffer.array[0, :, :length].copy() for name, buffer in cache.view(row, row + 1)[0].items()}
    return {**found, "tokens": cache.tokens[row, :length].copy()}


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def shapes(cache):
    return {buffer.shape[::2] for buffer in cache._buffers.values()}


def row_logits(decoder, cache, row, token):
    """The logits behind a token that is put behind a row: they tell what the row holds."""
    cache.reserve(row + 1, int(cache.lengths[row]) + 1)
    return decoder.extend(cache, row, [token])


def test_bytes_are_those_of_keys_and_values_of_all_layers():
    session = FakeSession()
    cache = new_cache(session)
    assert cache.nbytes(3, 64) == 3 * 64 * TOKEN_BYTES
    cache.reserve(3, 64)
    assert session.allocated == cache.nbytes(3, 64)
    assert new_cache(session, cache_dtype="float16").nbytes(3, 64) == 3 * 64 * TOKEN_BYTES // 2


def test_windows_and_states_take_the_same_whatever_the_length():
    session = FakeSession(layers=HYBRID)
    cache = new_cache(session)
    cache.reserve(3, 64)
    # One layer grows; a window has 64 positions of slack; the state that is not updated in place is there twice.
    fixed = 3 * 4 * (2 * (WINDOW + 64) + 3 + 2 * 4)
    assert session.allocated == cache.nbytes(3, 64) == fixed + 3 * 64 * 12
    cache.reserve(3, 128)
    assert session.allocated == cache.nbytes(3, 128) == fixed + 3 * 128 * 12


def test_nothing_is_allocated_before_it_is_needed():
    session = FakeSession()
    cache = new_cache(session)
    assert (session.allocations, cache.rows, cache.capacity) == (0, 0, 0)


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 64), (64, 64), (65, 128), (190, 192), (193, 200), (200, 200)])
def test_capacity_is_a_multiple_of_the_step_up_to_the_context(tokens, capacity):
    cache = new_cache(FakeSession())
    cache.reserve(2, tokens)
    assert (cache.rows, cache.capacity) == (2, capacity)
    assert {buffer.shape for buffer in cache.view(0, 2)[0].values()} == {
        (2, facts.kv_heads, capacity, size) for _, facts, size in PLAIN.parts
    }


def test_a_full_cache_grows_by_half():
    cache = new_cache(FakeSession(), context=100_000)
    cache.reserve(1, 10 * STEP)
    cache.reserve(1, 10 * STEP + 1)
    assert cache.capacity == int(10 * STEP * GROWTH)


def test_where_memory_is_short_it_grows_by_what_is_needed():
    session = FakeSession()
    cache = new_cache(session, context=100_000)
    cache.reserve(1, 10 * STEP)
    fill(cache, 0, 10 * STEP)
    session.room = row_bytes(14 * STEP)
    cache.reserve(1, 10 * STEP + 1)
    assert cache.capacity == 11 * STEP
    assert session.peak <= session.room


def test_memory_that_is_found_missing_late_is_no_other_matter():
    # A GPU does not say what is free: the larger size is tried, and then the smaller one.
    session = FakeSession()
    cache = new_cache(session, context=100_000)
    cache.reserve(1, 10 * STEP)
    written = fill(cache, 0, 10 * STEP)
    session.limit = row_bytes(14 * STEP)
    cache.reserve(1, 10 * STEP + 1)
    assert cache.capacity == 11 * STEP
    assert same(held(cache, 0), written)


def test_what_fits_moves_nothing():
    session = FakeSession()
    cache = new_cache(session)
    cache.reserve(4, 128)
    allocations = session.allocations
    for rows, tokens in ((4, 128), (1, 1), (4, 65), (1, 128)):
        cache.reserve(rows, tokens)
    assert session.allocations == allocations


sizes = st.tuples(st.integers(1, 4), st.integers(1, CONTEXT))


@settings(max_examples=100, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=6), st.lists(st.integers(1, CONTEXT), min_size=1, max_size=4), st.data())
def test_growth_keeps_what_is_cached_and_failure_changes_nothing(steps, lengths, data):
    room = data.draw(st.none() | st.integers(row_bytes(64), row_bytes(8 * CONTEXT)))
    deny = data.draw(st.sets(st.integers(5, 40), max_size=10))
    session = FakeSession()
    cache = new_cache(session)
    cache.reserve(len(lengths), max(lengths))
    written = [fill(cache, row, length) for row, length in enumerate(lengths)]
    session.room, session.deny = None if room is None else max(room, session.allocated), deny
    session.peak = 0
    for rows, tokens in steps:
        before = (cache.rows, cache.capacity)
        try:
            cache.reserve(rows, tokens)
        except CacheMemoryError:
            assert (cache.rows, cache.capacity) == before or deny
        else:
            assert cache.rows >= max(rows, len(lengths))
            assert cache.capacity >= max(tokens, *lengths)
            if not deny:
                assert shapes(cache) == {(cache.rows, cache.capacity)}
                assert session.allocated == cache.nbytes(cache.rows, cache.capacity)
        assert all(rows >= cache.rows and capacity >= cache.capacity for rows, capacity in shapes(cache))
        assert cache.lengths.tolist() == lengths + [0] * (cache.rows - len(lengths))
        assert cache.tokens.shape == (cache.rows, cache.capacity)
        assert all(same(held(cache, row), content) for row, content in enumerate(written))
    if session.room is not None and not deny:
        assert session.refused == 0, "what does not fit must not be tried"


@pytest.mark.parametrize("deny", [5, 6, 7, 8])
def test_an_allocation_that_fails_half_way_is_undone(deny):
    session = FakeSession()
    cache = new_cache(session)
    cache.reserve(2, 64)
    written = [fill(cache, 0, 10), fill(cache, 1, 64)]
    session.deny = {deny}
    with pytest.raises(CacheMemoryError, match=r"for 2 rows of 128 tokens \(0 MiB\) does not fit in memory") as caught:
        cache.reserve(2, 65)
    assert isinstance(caught.value, RequestError)
    assert shapes(cache) == {(2, 64)}
    assert session.allocated == cache.nbytes(2, 64)
    assert same(held(cache, 0), written[0])
    assert same(held(cache, 1), written[1])
    cache.reserve(2, 65)
    assert same(held(cache, 1), written[1])


@pytest.mark.parametrize("deny", [1, 2, 3, 4])
def test_a_first_allocation_that_fails_leaves_an_empty_cache(deny):
    session = FakeSession(deny={deny})
    cache = new_cache(session)
    with pytest.raises(CacheMemoryError):
        cache.reserve(2, 64)
    assert (cache.rows, cache.capacity, session.allocated) == (0, 0, 0)
    cache.reserve(2, 64)
    assert shapes(cache) == {(2, 64)}


LARGE = Layers((cache_facts(0, 16, 1024, 1024),))


def test_memory_that_does_not_suffice_is_named_before_it_is_taken():
    session = FakeSession(room=row_bytes(64), layers=LARGE)
    cache = new_cache(session, context=1000)
    with pytest.raises(CacheMemoryError) as caught:
        cache.reserve(2, 129)
    # 2 rows, 192 tokens, 2 * 16 * 1024 values of 4 bytes; 64 MiB stay free for the graph.
    assert "2 rows of 192 tokens needs 112 MiB more and 64 MiB are free" in str(caught.value)
    assert session.allocations == 0


def test_a_budget_bounds_the_cache_at_every_moment():
    session = FakeSession(layers=LARGE)
    cache = RowCache(session, text_facts(LARGE, context=1000), budget=50 << 20)
    with pytest.raises(CacheMemoryError, match="3 rows of 192 tokens needs 72 MiB and the memory budget leaves 50"):
        cache.reserve(3, 129)
    assert session.allocations == 0
    cache.reserve(2, 129)
    fill(cache, 0, 129)
    # 2 rows of 256 tokens would fit, but not beside the old form of one of their two buffers.
    with pytest.raises(CacheMemoryError, match="budget"):
        cache.reserve(2, 200)
    assert session.peak <= 50 << 20
    cache.reserve(1, 200)
    assert (cache.rows, cache.capacity) == (1, 256)


def test_rows_that_are_not_in_use_give_way():
    session = FakeSession()
    cache = new_cache(session)
    cache.reserve(4, 64)
    written = fill(cache, 0, 64)
    session.room = row_bytes(5 * 64)
    cache.reserve(1, 65)
    assert (cache.rows, cache.capacity) == (1, 128)
    assert same(held(cache, 0), written)


def test_length_that_no_row_uses_gives_way():
    session = FakeSession()
    cache = new_cache(session)
    cache.reserve(1, 190)
    written = fill(cache, 0, 60)
    session.room = row_bytes(192 + 128)
    cache.reserve(2, 64)
    assert (cache.rows, cache.capacity) == (2, 64)
    assert same(held(cache, 0), written)


@pytest.mark.parametrize(("rows", "least"), [(1, 128 + 32), (4, 4 * 64 + 32)])
def test_the_old_and_the_new_form_of_a_buffer_need_room_at_once(rows, least):
    # From rows of 64 tokens to one of 128: a buffer of keys or values is a quarter of the whole.
    for room in (least - 1, least):
        session = FakeSession()
        cache = new_cache(session)
        cache.reserve(rows, 64)
        written = fill(cache, 0, 64)
        session.room = row_bytes(room)
        if room < least:
            with pytest.raises(CacheMemoryError):
                cache.reserve(1, 65)
        else:
            cache.reserve(1, 65)
        assert session.refused == 0, "what does not fit must not be tried"
        assert cache.capacity == (128 if room == least else 64)
        assert same(held(cache, 0), written)


def test_a_resize_that_cannot_even_be_undone_loses_nothing():
    session = FakeSession()
    cache = new_cache(session)
    cache.reserve(4, 64)
    written = fill(cache, 0, 64)
    # The larger size fails at once; the smaller one after a buffer, which cannot have its rows back.
    session.deny = {5, 7, 8}
    with pytest.raises(CacheMemoryError):
        cache.reserve(1, 65)
    assert (cache.rows, cache.capacity) == (1, 64)
    assert (len(cache.lengths), cache.tokens.shape) == (1, (1, 64))
    cache.reserve(4, 65)
    assert shapes(cache) == {(4, 128)}
    assert same(held(cache, 0), written)


def test_an_empty_cache_gives_up_its_length():
    session = FakeSession(room=row_bytes(200))
    cache = new_cache(session)
    cache.reserve(1, 190)
    fill(cache, 0, 190)
    with pytest.raises(CacheMemoryError):
        cache.reserve(2, 64)
    cache.clear()
    cache.reserve(3, 64)
    assert (cache.rows, cache.capacity) == (3, 64)


def test_views_are_inputs_and_outputs_at_once():
    cache = new_cache(FakeSession())
    cache.reserve(3, 64)
    feeds, results = cache.view(1, 3)
    names = [name for name, _, _ in PLAIN.parts]
    assert list(feeds) == [f"past_key_values.{name}" for name in names]
    assert list(results) == [f"present.{name}" for name in names]
    for name in names:
        given, bound = feeds[f"past_key_values.{name}"], results[f"present.{name}"]
        assert given.shape[0] == 2
        assert given.array.ctypes.data == bound.array.ctypes.data
        bound.array[0] = 7
        whole = cache.view(0, 3)[0][f"past_key_values.{name}"].array
        assert (whole[1] == 7).all()
        assert (whole[[0, 2]] == 0).all()


def test_ranges_of_rows_are_bound_once_and_again_when_the_buffers_change(monkeypatch):
    session = FakeSession()
    cache = new_cache(session)
    cache.reserve(3, 64)
    bound = cache.bound(0, 2)
    assert cache.bound(0, 2) is bound
    assert cache.bound(0, 3) is not bound
    cache.reserve(3, 65)
    assert cache.bound(0, 2) is not bound
    monkeypatch.setattr("fmedge_runtimes.row_cache.BINDINGS", 2)
    ranges = [(0, 1), (1, 2), (0, 1), (2, 3), (0, 1)]
    first, *_, last = [cache.bound(*each) for each in ranges]
    assert last is first
    assert len(cache._bound) == 2


@ALL
def test_a_copied_row_is_the_same_and_independent(layers):
    session = FakeSession(layers=layers)
    decoder = Decoder(session, text_facts(layers))
    cache = decoder.new_cache()
    tokens = [1, 2, 3] * 13
    decoder.prefill(cache, 0, tokens)
    cache.reserve(2, 64)
    cache.copy(0, 1, len(tokens))
    for row, token in enumerate((4, 5)):
        assert (row_logits(decoder, cache, row, token) == logits_of((*tokens, token), layers)).all()
    assert cache.lengths.tolist() == [40, 40]
    assert cache.tokens[:, :40].tolist() == [[*tokens, 4], [*tokens, 5]]


@ALL
@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 120), min_size=2, max_size=4), data=st.data())
def test_rows_change_places(layers, lengths, data):
    session = FakeSession(layers=layers)
    decoder = Decoder(session, text_facts(layers))
    cache = decoder.new_cache()
    cache.reserve(len(lengths), 130)
    rows = []
    for row, length in enumerate(lengths):
        rows.append([(7 * row + number) % VOCABULARY for number in range(length)])
        cache.start(row)
        if length:
            decoder.prefill(cache, row, rows[row])
    for _ in range(3):
        first, second = data.draw(st.tuples(*2 * [st.integers(0, len(rows) - 1)]).filter(lambda pair: len({*pair}) > 1))
        cache.swap(first, second)
        rows[first], rows[second] = rows[second], rows[first]
    assert cache.lengths.tolist() == list(map(len, rows))
    for row, tokens in enumerate(rows):
        assert (row_logits(decoder, cache, row, 1) == logits_of((*tokens, 1), layers)).all()


def test_an_exchange_without_room_moves_nothing():
    session = FakeSession()
    cache = new_cache(session)
    cache.reserve(2, 64)
    written = [fill(cache, 0, 10), fill(cache, 1, 64)]
    session.limit = session.allocated
    with pytest.raises(CacheMemoryError):
        cache.swap(0, 1)
    assert [same(held(cache, row), written[row]) for row in (0, 1)] == [True, True]


@ALL
def test_a_row_starts_without_a_trace_of_the_one_before(layers):
    session = FakeSession(layers=layers)
    decoder = Decoder(session, text_facts(layers))
    cache = decoder.new_cache()
    for tokens in ((3,) * 70, (1, 2), (5,) * 40):
        assert (decoder.prefill(cache, 0, tokens) == logits_of(tokens, layers)).all()
        assert (decoder.decode(cache, [9]) == logits_of((*tokens, 9), layers)).all()


@ALL
@pytest.mark.parametrize("slack", [True, False])
@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 180), kept=st.integers(1, 180))
def test_a_row_is_cut_only_where_it_is_as_if_it_had_never_been_longer(layers, slack, length, kept):
    kept = min(kept, length)
    session = FakeSession(layers=layers, window_slack=slack)
    decoder = Decoder(session, text_facts(layers))
    cache = decoder.new_cache()
    tokens = [number * number % VOCABULARY for number in range(length)]
    decoder.prefill(cache, 0, tokens)
    if layers is HYBRID:
        assert cache.reusable(0, kept) == (kept == length)
    if layers is PLAIN:
        assert cache.reusable(0, kept)
    if layers is WINDOWED and not slack:
        assert cache.reusable(0, kept) == (kept == length or length <= WINDOW)
    if not cache.reusable(0, kept):
        return
    cache.cut(0, kept)
    assert (row_logits(decoder, cache, 0, 5) == logits_of((*tokens[:kept], 5), layers)).all()


@settings(max_examples=100, deadline=None)
@given(window=st.integers(1, 40), slack=st.integers(0, 40), tokens=st.integers(0, 300))
def test_resident_positions_are_those_that_one_after_the_other_leaves(window, slack, tokens):
    length, held = window + slack, 0
    for _ in range(tokens):
        held = window if held == length else held + 1
    assert resident(tokens, length, window) == held


def test_rolling_buffers_have_slack_only_where_the_operator_takes_it():
    facts = text_facts(Layers((cache_facts(0, 1, 2, 2, 4096), cache_facts(1, 1, 2, 2, 16))))
    assert [part.length for part in parts_of(facts, slack=True)] == [4608, 4608, 80, 80]
    assert [part.length for part in parts_of(facts, slack=False)] == [4096, 4096, 16, 16]


def test_common_beginnings_are_found_in_all_rows():
    session = FakeSession()
    decoder = Decoder(session, text_facts())
    cache = decoder.new_cache()
    for row, tokens in enumerate([[1, 2, 3], [1, 2, 4, 5], [7]]):
        decoder.prefill(cache, row, tokens)
    cache.reserve(4, 64)

    def common(*tokens):
        return cache.common(np.array(tokens, np.int32)).tolist()

    assert common(1, 2, 3, 9) == [3, 2, 0, 0]
    assert common(1, 2) == [2, 2, 0, 0]
    assert common(0, 0) == [0, 0, 0, 0]
    assert common(*[7] * 150) == [0, 0, 1, 0]
    cache.cut(0, 1)
    assert common(1, 2, 3) == [1, 2, 0, 0]


def test_a_cleared_cache_keeps_its_memory():
    session = FakeSession()
    cache = new_cache(session)
    cache.reserve(2, 64)
    fill(cache, 0, 3)
    cache.clear()
    assert cache.lengths.tolist() == [0, 0]
    cache.reserve(2, 64)
    assert session.allocations == len(PLAIN.parts)


class OneTokenSession(FakeSession):
    """A graph that takes one token of each row."""

    @property
    def inputs(self):
        ids, *others = super().inputs
        return TensorSpec("input_ids", ids.dtype, ("batch", 1)), *others

    def run(self, feeds, results):
        assert feeds["input_ids"].shape[1] == 1
        return super().run(feeds, results)


@ALL
def test_a_graph_of_one_token_takes_a_prompt_token_by_token(layers):
    tokens = [5, 1, 4, 2, 2, 7]
    found = []
    for kind in (FakeSession, OneTokenSession):
        session = kind(layers=layers)
        decoder = Decoder(session, text_facts(layers))
        cache = decoder.new_cache()
        scored = decoder.score(cache, tokens)
        first = decoder.prefill(cache, 1, tokens[:4])
        found.append((scored, first, decoder.verify(cache, 1, tokens[4:])))
        assert cache.lengths[1] == len(tokens)
    for any_number, one in zip(*found, strict=True):
        np.testing.assert_array_equal(any_number, one)
    assert session.runs == 2 * len(tokens)


@pytest.mark.parametrize(("layers", "repeatable"), [(PLAIN, True), (WINDOWED, False), (HYBRID, False)])
def test_only_steps_that_may_run_twice_are_recorded(layers, repeatable):
    assert RowCache(FakeSession(layers=layers), text_facts(layers)).repeatable is repeatable


def test_recorded_steps_have_the_same_scalars_until_the_cache_grows():
    asked = []

    class Noted(FakeSession):
        def _check(self, feeds, results):
            asked.append((feeds["input_ids"].shape[1], int(feeds["total_sequence_length"])))
            super()._check(feeds, results)

    session = Noted(captures=True)
    decoder = Decoder(session, text_facts())
    cache = decoder.new_cache()
    logits = decoder.prefill(cache, 0, [1, 2, 3])
    tokens = [1, 2, 3]
    for _ in range(70):
        assert (logits == logits_of(tuple(tokens))).all()
        tokens.append(int(logits.argmax()))
        (logits,) = decoder.decode(cache, tokens[-1:])
    totals = [total for length, total in asked if length == 1]
    assert totals == [64] * 61 + [cache.capacity] * 9
