"""Who has which row, and what prompts find there: seen through the steps that the graph is spared."""

import pytest
from fake_session import CONTEXT, HYBRID, PLAIN, WINDOW, WINDOWED, FakeSession, make_bundle, row_bytes
from fmedge_runtimes.sampling import Sampling
from one_by_one import alone, facts
from test_engine import ByHand

LAYERS = {"plain": PLAIN, "windowed": WINDOWED, "hybrid": HYBRID}
ALL = pytest.mark.parametrize("name", LAYERS)
ROOM = row_bytes(400 * CONTEXT)
"""Memory of which a few rows are a small part, so that there are rows for what finished generations left."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    return {name: make_bundle(folder / name, layers=layers) for name, layers in LAYERS.items()}


def text(start, length):
    return [(start + 7 * number) % 20 for number in range(length)]


def greedy(tokens):
    return Sampling(tokens, ignore_eos=True)


def run(driven, prompt, tokens=1):
    """Serve a prompt; gives its tokens, how many were reused, and the steps that it took, but those for one token."""
    session = driven.model._decoder.session
    before = len(session.steps)
    request = driven.model.submit([prompt], greedy(tokens))
    driven.finish()
    (done,) = request.result()
    assert facts(done) == alone(prompt, greedy(tokens), layers=session.layers)
    return list(done.tokens), done.stats.reused_tokens, [length for _, length in session.steps[before:] if length > 1]


@ALL
def test_the_next_turn_of_a_chat_starts_where_the_last_one_ended(bundles, name):
    driven = ByHand(bundles[name], FakeSession(layers=LAYERS[name]))
    prompt = text(0, 30)
    for turn in range(4):
        tokens, reused, steps = run(driven, prompt, 10)
        # All but the last token, which was chosen and never put through the graph.
        assert reused == (len(prompt) - 6 if turn else 0)
        assert steps == [6 if turn else 30]
        prompt = [*prompt, *tokens, *text(turn, 5)]


@ALL
def test_the_same_prompt_computes_its_last_token_or_nothing(bundles, name):
    driven = ByHand(bundles[name], FakeSession(layers=LAYERS[name], room=4 * ROOM))
    prompt = text(0, 30)
    assert run(driven, prompt)[1:] == (0, [30])
    # Nothing went through behind it, and its logits are known.
    assert run(driven, prompt)[1:] == (30, [])
    assert run(driven, prompt, 9)[1:] == (30, [])
    # Now something did.
    wanted = (0, [30]) if name == "hybrid" else (30, [])
    assert run(driven, prompt)[1:] == wanted
    # The logits of another prompt are known now.
    run(driven, [1])
    wanted = (0, [30]) if name == "hybrid" else (29, [])
    assert run(driven, prompt)[1:] == wanted


@ALL
def test_what_is_reused_of_a_row_is_what_it_still_holds(bundles, name):
    driven = ByHand(bundles[name], FakeSession(layers=LAYERS[name], window_slack=False))
    run(driven, text(0, 60))
    _, reused, _ = run(driven, [*text(0, 40), 9, 9])
    # The window has moved on, and the state has seen all.
    assert reused == (40 if name == "plain" else 0)
    driven = ByHand(bundles[name], FakeSession(layers=LAYERS[name], window_slack=False))
    run(driven, text(0, WINDOW))
    _, reused, _ = run(driven, [*text(0, 20), 9, 9])
    assert reused == (0 if name == "hybrid" else 20)


def test_a_common_beginning_is_copied_from_rows_that_are_at_work(bundles):
    session = FakeSession()
    driven = ByHand(bundles["plain"], session, max_batch=4)
    system = text(0, 50)
    first = driven.model.submit([[*system, 1]], greedy(60))
    driven.step(9)
    others = [driven.model.submit([[*system, *text(number, 4)]], greedy(20)) for number in (2, 3)]
    driven.finish()
    assert [request.result()[0].stats.reused_tokens for request in (first, *others)] == [0, 50, 50]
    assert [length for _, length in session.steps if length > 1] == [51, 4, 4]
    assert facts(others[1].result()[0]) == alone([*system, *text(3, 4)], greedy(20))


def test_requests_that_come_together_share_what_the_first_computes(bundles):
    session = FakeSession()
    driven = ByHand(bundles["plain"], session, max_batch=8)
    system = text(0, 100)
    requests = [driven.model.submit([[*system, number]], greedy(3)) for number in range(6)]
    driven.finish()
    assert [request.result()[0].stats.reused_tokens for request in requests] == [0, 100, 100, 100, 100, 100]
    assert sum(length for rows, length in session.steps if rows == 1) <= 101 + 5 + 3


@ALL
def test_more_completions_than_rows_share_a_prefill_where_they_can(bundles, name):
    session = FakeSession(layers=LAYERS[name])
    driven = ByHand(bundles[name], session, max_batch=2)
    prompt, sampling = text(0, 40), Sampling(4, temperature=1.0, n=6, seed=3, ignore_eos=True)
    request = driven.model.submit([prompt], sampling)
    driven.finish()
    for index, done in enumerate(request.result()):
        assert facts(done) == alone(prompt, sampling, index, layers=LAYERS[name])
    # The state of a row that went on does not go back; two rows can be filled at a time.
    assert [length for _, length in session.steps if length > 1] == [40] * (3 if name == "hybrid" else 1)


def test_without_reuse_everything_is_computed(bundles):
    session = FakeSession()
    driven = ByHand(bundles["plain"], session, prefix_reuse=False)
    for _ in range(2):
        assert run(driven, text(0, 30))[1:] == (0, [30])


def test_a_large_row_is_not_given_up_for_a_small_common_beginning(bundles):
    session = FakeSession(room=ROOM)
    driven = ByHand(bundles["plain"], session, max_batch=3)
    long, short = text(0, 100), [*text(0, 10), 19]
    run(driven, long)
    assert run(driven, short)[1] == 10
    # The long one is still there, beside the other.
    assert run(driven, [*long, 1])[1] == 100
    assert run(driven, [*short, 1])[1] == 11


def test_what_was_left_the_longest_time_ago_goes_first(bundles):
    session = FakeSession(room=ROOM)
    driven = ByHand(bundles["plain"], session, max_batch=3)
    chats = [[number, *text(number, 20)] for number in range(5)]
    for chat in chats[:3]:
        run(driven, chat)
    assert run(driven, [*chats[0], 1])[1] == 21  # used again: the second is the oldest now
    run(driven, chats[3])
    assert [run(driven, [*chats[number], 2])[1] for number in (0, 2, 3)] == [21, 21, 21]
    assert run(driven, chats[1])[1] == 0


def test_rows_for_what_was_left_take_a_small_part_of_the_memory(bundles):
    rows = {}
    for room in (ROOM, row_bytes(64 * 4 * 3), None):
        session = FakeSession(room=room)
        driven = ByHand(bundles["plain"], session, max_batch=8)
        for number in range(8):
            run(driven, [number, *text(number, 20)])
        rows[room] = driven.engine._slots.cache.rows
    # A quarter of the memory, as many as decode at most; none where nobody can tell what memory there is.
    assert list(rows.values()) == [8, 3, 1]


def test_what_was_left_gives_way_to_those_who_wait(bundles):
    session = FakeSession(room=row_bytes(3 * 128))
    driven = ByHand(bundles["plain"], session, max_batch=4)
    run(driven, text(0, 100))
    requests = [driven.model.submit([[number, 1]], greedy(5)) for number in range(4)]
    driven.finish()
    assert max(rows for rows, _ in session.steps) == 4
    assert [facts(request.result()[0]) for request in requests] == [alone([n, 1], greedy(5)) for n in range(4)]


@ALL
def test_rows_that_decode_come_to_the_front_and_the_others_stay_whole(bundles, name):
    session = FakeSession(layers=LAYERS[name], room=4 * ROOM)
    driven = ByHand(bundles[name], session, max_batch=4)
    prompts = [[number, *text(number, 20)] for number in range(4)]
    lengths = (4, 30, 9, 40)
    requests = [driven.model.submit([prompt], greedy(tokens)) for prompt, tokens in zip(prompts, lengths, strict=True)]
    driven.finish()
    for request, prompt, tokens in zip(requests, prompts, lengths, strict=True):
        assert facts(request.result()[0]) == alone(prompt, greedy(tokens), layers=LAYERS[name])
    # Each of them can be gone on with: no row was lost when others took its place.
    for request, prompt, tokens in zip(requests, prompts, lengths, strict=True):
        turn = [*prompt, *request.result()[0].tokens, 5]
        assert run(driven, turn)[1] == len(prompt) + tokens - 1


def test_without_memory_for_an_exchange_what_finished_rows_left_is_given_up(bundles):
    session = FakeSession()
    driven = ByHand(bundles["plain"], session, max_batch=3)
    requests = [driven.model.submit([[number, *text(number, 20)]], greedy(4 + 30 * number)) for number in range(3)]
    driven.step(6)
    session.limit = session.allocated
    driven.finish()
    for number, request in enumerate(requests):
        assert facts(request.result()[0]) == alone([number, *text(number, 20)], greedy(4 + 30 * number))
    turn = [0, *text(0, 20), *requests[0].result()[0].tokens, 5]
    assert run(driven, turn)[1] == 0
