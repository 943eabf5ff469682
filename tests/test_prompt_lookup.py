"""Drafts from a sequence's own text: they are what came before, and they never change what is generated."""

import numpy as np
import pytest
from fake_session import HYBRID, PLAIN, VOCABULARY, WINDOWED, FakeSession, logits_of, make_bundle
from fmedge_runtimes.prompt_lookup import LONGEST, LONGEST_PAUSE, SHORTEST, PromptLookup
from fmedge_runtimes.sampling import Sampling
from hypothesis import given, settings
from hypothesis import strategies as st
from one_by_one import alone, expected, facts
from test_engine import ByHand, events, play

LAYERS = {"plain": PLAIN, "windowed": WINDOWED, "hybrid": HYBRID}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    return {name: make_bundle(folder / name, layers=layers) for name, layers in LAYERS.items()}


def draft(*tokens, most=100):
    return PromptLookup().draft(np.array(tokens, np.int32), most).tolist()


def test_a_draft_is_what_followed_the_last_time():
    assert draft(1, 2, 3, 4, 5, 6, 1, 2, 3) == [4, 5, 6]
    assert draft(1, 2, 3, 9, 9, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3) == [4, 5, 6]
    assert draft(1, 2, 3, 4, 5, 6, 1, 2, 3, most=2) == [4, 5]
    assert draft(1, 2, 3, 4, 5, 6, 1, 2, 3, most=0) == []
    assert draft(1, 2, 3, 4, 5, 6, 2, 3) == []
    assert draft(1, 2, 3) == draft(1) == []


def test_a_text_that_turns_in_circles_is_drafted_as_far_as_it_goes():
    assert draft(*[7] * 10) == [7, 7, 7]
    assert draft(7, 7, 7, 7) == [7]
    assert draft(*[1, 2] * 4) == [1, 2, 1]


def test_good_drafts_grow_and_bad_ones_are_followed_by_a_pause():
    lookup = PromptLookup()
    circle = np.array([1, 2, 3, 4] * 30, np.int32)
    lengths = []
    for _ in range(6):
        drafted = lookup.draft(circle, 100)
        lengths.append(len(drafted))
        lookup.learn(len(drafted), len(drafted))
    assert lengths == [SHORTEST, 2 * SHORTEST, LONGEST, LONGEST, LONGEST, LONGEST]
    pauses = []
    for _ in range(9):
        lookup.learn(4, 0)
        pauses.append(0)
        while not len(lookup.draft(circle, 100)):
            pauses[-1] += 1
    assert pauses == [1, 2, 4, 8, 16, 32, 64, LONGEST_PAUSE, LONGEST_PAUSE]
    lookup.learn(4, 2)
    assert len(lookup.draft(circle, 100)) == SHORTEST + 2
    # No draft is neither good nor bad.
    lookup.learn(0, 0)
    assert len(lookup.draft(circle, 100)) == SHORTEST + 2


@pytest.fixture
def oracle(request, monkeypatch):
    """Drafts are what greedy decoding would choose, and are wrong now and then."""
    named = getattr(request.node, "callspec", None)
    layers = LAYERS[named.params["name"]] if named else PLAIN

    def draft(_, tokens, most):
        tokens, made = tuple(tokens.tolist()), []
        random = np.random.default_rng([len(tokens), *tokens[-3:]])
        for _ in range(min(most, int(random.integers(0, 7)))):
            best = int(logits_of((*tokens, *made), layers).argmax())
            made.append(best if random.random() < 0.9 else int(random.integers(VOCABULARY)))
        return np.array(made, np.int32)

    monkeypatch.setattr(PromptLookup, "draft", draft)
    monkeypatch.setattr("fmedge_runtimes.decoder.PREFILL_CHUNK", 16)


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("name", ["plain", "windowed"])
@settings(max_examples=20, deadline=None)
@given(events=events, max_batch=st.integers(1, 3))
def test_drafts_change_nothing(bundles, name, events, max_batch):
    layers = LAYERS[name]
    driven = ByHand(bundles[name], FakeSession(layers=layers), max_batch=max_batch)
    submitted = play(driven, events)
    driven.finish()
    for request, asked, options, _ in submitted:
        for completion, wanted in zip(request.result(), expected(asked, options, layers), strict=True):
            assert completion.finish_reason == "cancelled" or facts(completion) == wanted


@pytest.mark.usefixtures("oracle")
def test_right_drafts_spare_steps_and_are_counted(bundles):
    session = FakeSession()
    driven = ByHand(bundles["plain"], session)
    greedy, drawn = Sampling(60, ignore_eos=True), Sampling(60, temperature=1.0, seed=1, ignore_eos=True)
    for prompt, sampling, least in (([3, 1, 4], greedy, 30), ([3, 1, 5], drawn, 5)):
        before = len(session.steps)
        request = driven.model.submit([prompt], sampling)
        driven.finish()
        (done,) = request.result()
        assert facts(done) == alone(prompt, sampling)
        assert done.stats.accepted_tokens >= least
        assert done.stats.drafted_tokens > done.stats.accepted_tokens
        # Each token is the first of a step, or was accepted.
        assert len(session.steps) - before == 60 - done.stats.accepted_tokens


@pytest.mark.usefixtures("oracle")
def test_many_rows_decode_without_drafts(bundles):
    session = FakeSession()
    driven = ByHand(bundles["plain"], session, max_batch=3)
    requests = [driven.model.submit([[number, 1]], Sampling(9, ignore_eos=True)) for number in range(3)]
    driven.finish()
    assert [request.result()[0].stats.drafted_tokens for request in requests] == [0, 0, 0]
    assert (3, 1) in session.steps


@pytest.mark.usefixtures("oracle")
def test_without_lookup_there_are_no_drafts(bundles):
    driven = ByHand(bundles["plain"], FakeSession(), prompt_lookup=False)
    request = driven.model.submit([[3, 1, 4]], Sampling(60, ignore_eos=True))
    driven.finish()
    assert request.result()[0].stats.drafted_tokens == 0


@pytest.mark.usefixtures("oracle")
def test_states_cannot_be_taken_back_so_nothing_is_drafted(bundles):
    driven = ByHand(bundles["hybrid"], FakeSession(layers=HYBRID))
    request = driven.model.submit([[3, 1, 4]], Sampling(60, ignore_eos=True))
    driven.finish()
    (done,) = request.result()
    assert done.stats.drafted_tokens == 0
    assert facts(done) == alone([3, 1, 4], Sampling(60, ignore_eos=True), layers=HYBRID)


@pytest.mark.usefixtures("oracle")
def test_a_graph_that_fails_on_a_draft_ends_that_row_alone(bundles):
    session = FakeSession(fail_on=5)
    driven = ByHand(bundles["plain"], session, max_batch=2)
    sampling = Sampling(20, ignore_eos=True)
    requests = [driven.model.submit([[number, 1]], sampling) for number in range(2)]
    driven.finish()
    failed = [request._failure is not None for request in requests]
    assert sorted(failed) == [False, True]
    survivor = failed.index(False)
    assert facts(requests[survivor].result()[0]) == alone([survivor, 1], sampling)
