"""The text runtime over a fake graph: each request gets what it would get alone, whatever runs beside it."""

import dataclasses
import gc
import sys
import threading
import weakref

import numpy as np
import pytest
import tokenizers
from fake_session import (
    CONTEXT,
    EOS,
    LETTERS,
    VOCABULARY,
    FakeSession,
    letters_tokenizer,
    logits_of,
    make_bundle,
    row_bytes,
)
from fmedge_runtimes import generation as generation_module
from fmedge_runtimes.decoder import Decoder
from fmedge_runtimes.engine import EngineOptions
from fmedge_runtimes.errors import BackendError, BundleError, BundleFormatError, CacheMemoryError, RequestError
from fmedge_runtimes.golden import Replay, continue_greedily, replay
from fmedge_runtimes.manifest import Golden, GoldenStep, SamplingFacts
from fmedge_runtimes.sampler import logprob_of
from fmedge_runtimes.sampling import Sampling, checked
from fmedge_runtimes.text import TextModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from one_by_one import alone, encoded, expected, facts, written
from tokenizers import decoders, models, processors

CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("fake") / "bundle", chat_template=CHAT)


@pytest.fixture
def model(bundle):
    return TextModel(bundle, FakeSession(), EngineOptions(max_batch=4))


def build(**options):
    """A Sampling of drawn options, without what contradicts others."""
    options["min_new_tokens"] = min(options["min_new_tokens"], options["max_new_tokens"])
    options["forced_tokens"] = options["forced_tokens"][: options["max_new_tokens"]]
    if options["regex"] is not None:
        options |= {"stop": (), "ignore_eos": False, "forced_tokens": ()}
    return Sampling(**options)


samplings = st.builds(
    build,
    max_new_tokens=st.sampled_from([1, 2, 5, 30, 70]),
    temperature=st.sampled_from([0.0, 0.5, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([0.8, 1.0]),
    typical_p=st.sampled_from([0.9, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {0: 2.0, EOS: -1.0}]),
    banned_tokens=st.sampled_from([(), (2, 21)]),
    forced_tokens=st.sampled_from([(), (), (3, 4, 5)]),
    min_new_tokens=st.sampled_from([0, 0, 20]),
    stop_token_ids=st.sampled_from([(), (), (6,)]),
    regex=st.sampled_from([None, None, None, "(ab|[d-f])*", "[a-h]{3,20}q", "d[ef]"]),
    logprobs=st.sampled_from([None, 0, 2]),
    stop=st.sampled_from([(), ("a", "bc"), ("q",)]),
    ignore_eos=st.booleans(),
    n=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
)
# Long ones cross the borders of chunks (16 in these tests) and of capacities (64).
prompts = st.one_of(
    st.text(LETTERS, min_size=1, max_size=8),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8),
    st.tuples(st.integers(0, VOCABULARY - 1), st.sampled_from([15, 16, 17, 63, 64, 65, 150, CONTEXT - 1])).map(
        lambda drawn: [(drawn[0] + number * number) % VOCABULARY for number in range(drawn[1])]
    ),
)
requests = st.lists(st.tuples(prompts, samplings), min_size=1, max_size=5)


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr("fmedge_runtimes.decoder.PREFILL_CHUNK", 16)


@pytest.mark.usefixtures("short_chunks")
@settings(max_examples=120, deadline=None)
@given(requests, st.integers(1, 6))
def test_each_request_gets_what_it_gets_alone(bundle, drawn, max_batch):
    model = TextModel(bundle, FakeSession(), EngineOptions(max_batch=max_batch))
    asked, options = zip(*drawn, strict=True)
    completions = model.generate(asked, options)
    assert [facts(completion) for completion in completions] == expected(asked, options)
    places = [(number, index) for number, sampling in enumerate(options) for index in range(sampling.n)]
    assert [(completion.prompt_index, completion.index) for completion in completions] == places
    assert max(rows for rows, _ in model._decoder.session.steps) <= max_batch


@pytest.mark.usefixtures("short_chunks")
@settings(max_examples=60, deadline=None)
@given(requests, st.integers(1, 6))
def test_deltas_make_up_the_text(bundle, drawn, max_batch):
    asked, options = zip(*drawn, strict=True)
    pieces, ended = {}, {}
    for delta in TextModel(bundle, FakeSession(), EngineOptions(max_batch=max_batch)).stream(asked, options):
        place = (delta.prompt_index, delta.index)
        assert place not in ended, "a delta after the completion"
        assert delta.text or delta.completion
        pieces[place] = pieces.get(place, "") + delta.text
        if delta.completion is not None:
            ended[place] = delta.completion
    assert pieces == {place: completion.text for place, completion in ended.items()}
    assert [facts(ended[place]) for place in sorted(ended)] == expected(asked, options)


@pytest.mark.usefixtures("short_chunks")
@settings(max_examples=100, deadline=None)
@given(requests, st.integers(1, 6), st.integers(0, 6 * CONTEXT))
# Both fit at first, one has to wait again when the other grows; then neither shares anything.
@example([("ab", Sampling(100, seed=3, ignore_eos=True)), ("cd", Sampling(90, ignore_eos=True))], 2, 270)
@example([("ab", Sampling(100, seed=3, temperature=1.0, ignore_eos=True, n=3))], 3, 400)
def test_scarce_memory_changes_no_result(bundle, drawn, max_batch, room):
    # Room for one row of the whole context and for its growth, at least: all can be served, not all at once.
    session = FakeSession(room=row_bytes(3 * CONTEXT + room) // 2)
    asked, options = zip(*drawn, strict=True)
    completions = TextModel(bundle, session, EngineOptions(max_batch=max_batch)).generate(asked, options)
    assert [facts(completion) for completion in completions] == expected(asked, options)


@pytest.mark.usefixtures("short_chunks")
@settings(max_examples=60, deadline=None)
@given(requests, st.integers(1, 5), st.integers(64, 500), st.integers(0, 400))
def test_memory_that_runs_out_fails_rows_but_never_alters_them(bundle, drawn, max_batch, room, leak):
    session = FakeSession(room=row_bytes(room), leak=leak)
    asked, options = zip(*drawn, strict=True)
    completions = TextModel(bundle, session, EngineOptions(max_batch=max_batch)).generate(asked, options)
    for completion, (tokens, text, reason) in zip(completions, expected(asked, options), strict=True):
        if completion.finish_reason == "error":
            assert isinstance(completion.error, CacheMemoryError)
            assert list(completion.tokens) == tokens[: len(completion.tokens)]
        else:
            assert facts(completion) == (tokens, text, reason)


@pytest.mark.usefixtures("short_chunks")
@settings(max_examples=30, deadline=None)
@given(requests, requests)
def test_a_cache_that_is_used_again_leaves_no_trace(bundle, first, second):
    model = TextModel(bundle, FakeSession(), EngineOptions(max_batch=3))
    for drawn in (first, second):
        asked, options = zip(*drawn, strict=True)
        assert [facts(completion) for completion in model.generate(asked, options)] == expected(asked, options)


@pytest.mark.usefixtures("short_chunks")
def test_a_prompt_is_prefilled_in_chunks(bundle):
    session = FakeSession()
    TextModel(bundle, session).generate([[1] * 50, [2] * 32], Sampling(1))
    assert session.steps == [(1, 16), (1, 16), (1, 16), (1, 2), (1, 16), (1, 16)]


def test_rows_join_as_others_leave(bundle):
    session = FakeSession()
    model = TextModel(bundle, session, EngineOptions(max_batch=2))
    lengths = (3, 9, 4, 2, 1)
    model.generate(["ab", "cd", "ef", "gh", "ij"], [Sampling(length, ignore_eos=True) for length in lengths])
    decoded = [rows for rows, step in session.steps if step == 1]
    # A prefill gives the first token of each; no step has fewer rows than could be.
    assert sum(decoded) == sum(lengths) - len(lengths)
    assert decoded == [2] * 6 + [1] * 2


def test_completions_of_a_prompt_share_its_prefill_and_differ(bundle):
    session = FakeSession()
    model = TextModel(bundle, session, EngineOptions(max_batch=8))
    sampling = Sampling(10, temperature=1.5, n=5, seed=7, ignore_eos=True)
    completions = model.generate("abcd", sampling)
    assert [step for step in session.steps if step[1] > 1] == [(1, 4)]
    assert [completion.index for completion in completions] == [0, 1, 2, 3, 4]
    assert len({completion.tokens for completion in completions}) == 5
    again = model.generate(["q", "abcd"], [Sampling(3), sampling])[1:]
    assert [completion.tokens for completion in again] == [completion.tokens for completion in completions]


def test_completions_of_one_token_share_their_prefill_too(bundle):
    session = FakeSession()
    sampling = Sampling(1, temperature=1.5, n=5, seed=7, ignore_eos=True)
    completions = TextModel(bundle, session, EngineOptions(max_batch=2)).generate(["abcd", "q"], sampling)
    assert session.steps == [(1, 4), (1, 1)]
    assert [facts(completion) for completion in completions] == expected(["abcd", "q"], [sampling] * 2)


def test_without_a_seed_the_completion_says_which_repeats_it(model):
    first, second = model.generate(["ab", "ab"], Sampling(30, temperature=2.0, ignore_eos=True))
    assert first.seed != second.seed
    assert first.tokens != second.tokens
    (again,) = model.generate("ab", Sampling(30, temperature=2.0, ignore_eos=True, seed=second.seed))
    assert again.tokens == second.tokens


def test_when_memory_is_short_as_many_rows_run_as_fit(bundle):
    session = FakeSession(room=row_bytes(3 * 64))
    model = TextModel(bundle, session, EngineOptions(max_batch=8))
    completions = model.generate(["ab", "cd", "ef", "gh", "ij", "kl"], Sampling(20, ignore_eos=True))
    assert [len(completion.tokens) for completion in completions] == [20] * 6
    assert max(rows for rows, _ in session.steps) == 3
    assert session.peak <= row_bytes(3 * 64)


def test_a_row_that_has_to_wait_again_goes_first(bundle):
    session = FakeSession(room=row_bytes(170))
    model = TextModel(bundle, session, EngineOptions(max_batch=2, prompt_lookup=False))
    prompts, sampling = ["ab", "cd", "ef"], Sampling(100, temperature=1.0, seed=1, ignore_eos=True)
    assert [facts(done) for done in model.generate(prompts, sampling)] == expected(prompts, [sampling] * 3)
    # The second gave way when the first grew, waited until that was through, and was taken up before the third.
    prefills = [(place, length) for place, (_, length) in enumerate(session.steps) if length > 1]
    assert [length for _, length in prefills] == [2, 2, 65, 2]
    again = prefills[2][0]
    assert sum(rows == 1 for rows, _ in session.steps[:again]) == 2 + 100 - 63
    assert session.steps[again + 1 : prefills[3][0]] == [(1, 1)] * 36


def test_a_row_that_fits_nowhere_fails_alone(bundle):
    session = FakeSession(room=row_bytes(64))
    asked = ["ab", [1] * 100, "cd", "ef"]
    options = [Sampling(5), Sampling(5), Sampling(100, ignore_eos=True), Sampling(5)]
    first, long, growing, last = TextModel(bundle, session, EngineOptions(max_batch=4)).generate(asked, options)
    assert facts(first) == alone("ab", Sampling(5))
    assert facts(last) == alone("ef", Sampling(5))
    assert (long.tokens, long.finish_reason) == ((), "error")
    assert isinstance(long.error, CacheMemoryError)
    assert "max_new_tokens" in str(long.error)
    # What was made until the cache was full is given back.
    assert growing.finish_reason == "error"
    tokens, text, _ = alone("cd", Sampling(63, ignore_eos=True))
    assert (list(growing.tokens), growing.text) == (tokens, text)


def test_a_prompt_that_does_not_fit_holds_nobody_up(bundle):
    session = FakeSession(room=row_bytes(3 * 64))
    model = TextModel(bundle, session, EngineOptions(max_batch=4))
    completions = model.generate([[1] * 199, "ab", "cd", "ef"], Sampling(9, ignore_eos=True))
    assert [completion.finish_reason for completion in completions] == ["error", "length", "length", "length"]
    assert session.steps == [(1, 2)] * 3 + [(3, 1)] * 8


def test_allocations_that_fail_without_warning_are_survived(bundle):
    session = FakeSession(limit=row_bytes(64) + row_bytes(16))
    completions = TextModel(bundle, session, EngineOptions(max_batch=4)).generate(
        ["ab", "cd", "ef"], Sampling(9, ignore_eos=True)
    )
    assert [facts(completion) for completion in completions] == expected(
        ["ab", "cd", "ef"], [Sampling(9, ignore_eos=True)] * 3
    )


def test_a_large_idle_cache_gives_way(bundle):
    session = FakeSession(room=row_bytes(300))
    model = TextModel(bundle, session, EngineOptions(max_batch=4))
    (completion,) = model.generate([[1] * 190], Sampling(3, ignore_eos=True))
    assert completion.finish_reason == "length"
    model.generate(["ab", "cd", "ef", "gh"], Sampling(3, ignore_eos=True))
    assert session.steps[-1] == (4, 1)


@pytest.mark.parametrize("memory", ["room", "limit"])
def test_an_error_keeps_no_cache_alive(bundle, memory):
    session = FakeSession(poison=frozenset({3}), **{memory: row_bytes(64)})
    model = TextModel(bundle, session)
    kept = model.generate([[1] * 100, [2, 3], "ab"], Sampling(90, ignore_eos=True))
    assert [completion.finish_reason for completion in kept] == ["error"] * 3
    engine = weakref.ref(model._engine)
    thread = model._engine._thread
    del model
    thread.join(5)
    gc.collect()
    assert engine() is None
    assert session.allocated == 0


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "is empty"),
        ([], "no tokens"),
        ([1] * CONTEXT, f"{CONTEXT} tokens and the context holds {CONTEXT}"),
        ([1, VOCABULARY], f"token id {VOCABULARY} is outside the vocabulary of {VOCABULARY}"),
        ([1, -1], "token id -1"),
        ([1, 2.0], "neither text nor token ids"),
        ([[1, 2]], "neither text nor token ids"),
        ("a\ud800", "valid Unicode"),
    ],
)
def test_a_prompt_that_cannot_be_served_fails_alone(model, prompt, words):
    first, refused, last = model.generate(["ab", prompt, "cd"], Sampling(4))
    assert [facts(first), facts(last)] == expected(["ab", "cd"], [Sampling(4)] * 2)
    assert (refused.prompt_index, refused.tokens, refused.text, refused.finish_reason) == (1, (), "", "error")
    assert isinstance(refused.error, RequestError)
    assert words in str(refused.error)
    assert first.error is last.error is None


def test_unusable_logits_fail_their_row_alone(bundle):
    prompts = [[1, 5], [1, 2], [7, 1]]
    sampling = Sampling(40, temperature=1.0, seed=11, ignore_eos=True)
    poison = alone([1, 2], sampling)[0][3]
    session = FakeSession(poison=frozenset({poison}))
    completions = TextModel(bundle, session).generate([*prompts, [1, poison]], sampling)
    reasons = set()
    for completion, prompt in zip(completions, [*prompts, [1, poison]], strict=True):
        tokens = alone(prompt, sampling)[0]
        until = 0 if prompt[-1] == poison else tokens.index(poison) + 1 if poison in tokens else len(tokens)
        assert list(completion.tokens) == tokens[:until]
        if until < len(tokens):
            assert completion.finish_reason == "error"
            assert isinstance(completion.error, BackendError)
            assert "24 are NaN" in str(completion.error)
            assert completion.text == written(tokens[:until])
        reasons.add(completion.finish_reason)
    assert "error" in reasons
    assert completions[3].tokens == ()


@pytest.mark.parametrize("room", [1, 2, 64])
def test_the_context_is_filled_to_its_last_token(model, room):
    prompt = [3] * (CONTEXT - room)
    full, less = model.generate([prompt, prompt], [Sampling(500, ignore_eos=True), Sampling(room, ignore_eos=True)])
    assert (len(full.tokens), full.finish_reason) == (room, "context")
    assert (len(less.tokens), less.finish_reason) == (room, "length")
    assert list(full.tokens) == alone(prompt, Sampling(500, ignore_eos=True))[0]


def test_eos_ends_a_completion_unless_it_is_ignored(model):
    sampling = Sampling(CONTEXT, temperature=1.0, seed=5)
    free = dataclasses.replace(sampling, ignore_eos=True)
    ended, ignored = model.generate(["ab", "ab"], [sampling, free])
    assert ended.finish_reason == "eos"
    assert ended.tokens[-1] == EOS
    assert EOS not in ended.tokens[:-1]
    assert ignored.tokens[: len(ended.tokens)] == ended.tokens
    assert ignored.finish_reason == "context"
    assert ended.text == written(ended.tokens)


def test_a_stop_string_ends_the_completion_and_is_not_in_its_text(model):
    (whole,) = model.generate("ab", Sampling(30, temperature=1.0, seed=4, ignore_eos=True))
    stop = whole.text[5:8]
    (stopped,) = model.generate("ab", Sampling(30, temperature=1.0, seed=4, ignore_eos=True, stop=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert whole.tokens[: len(stopped.tokens)] == stopped.tokens
    assert written(stopped.tokens).endswith(stop)


def test_a_stop_string_that_is_found_at_the_end_is_the_reason(model):
    (whole,) = model.generate("ab", Sampling(8, temperature=1.0, seed=4, ignore_eos=True))
    # The longer one could still come, so the shorter one within it is not certain before the last token.
    stop = (whole.text[-3:] + "a", whole.text[-2:-1])
    assert whole.text.count(stop[1]) == 1
    (stopped,) = model.generate("ab", Sampling(8, temperature=1.0, seed=4, ignore_eos=True, stop=stop))
    assert (stopped.text, stopped.finish_reason) == (whole.text[:-2], "stop")


def test_a_stop_token_ends_the_completion_and_is_not_in_its_text(model):
    (whole,) = model.generate("ab", Sampling(30, temperature=1.0, seed=4, ignore_eos=True))
    stop = whole.tokens[7]
    sampling = Sampling(30, temperature=1.0, seed=4, ignore_eos=True, stop_token_ids=[stop])
    deltas = list(model.stream("ab", sampling))
    first = whole.tokens.index(stop)
    assert deltas[-1].completion.tokens == whole.tokens[: first + 1]
    assert deltas[-1].completion.finish_reason == "stop"
    assert deltas[-1].completion.text == "".join(delta.text for delta in deltas) == written(whole.tokens[:first])


def test_logprobs_are_those_of_the_unmodified_distribution(model):
    changed = {"banned_tokens": [3], "logit_bias": {5: 4.0}, "temperature": 2.0, "top_k": 3, "seed": 1}
    for prompt, top in (("ab", 0), ("cd", 2), ("e", VOCABULARY + 3)):
        (completion,) = model.generate(prompt, Sampling(9, ignore_eos=True, logprobs=top, **changed))
        wanted = [
            logprob_of(logits_of((*encoded(prompt), *completion.tokens[:place])), token, top)
            for place, token in enumerate(completion.tokens)
        ]
        assert list(completion.logprobs) == wanted
        assert len(wanted[0].top) == min(top, VOCABULARY)
        assert completion.cumulative_logprob == pytest.approx(sum(one.logprob for one in wanted))
    (plain,) = model.generate("e", Sampling(9, ignore_eos=True, **changed))
    assert plain.tokens == completion.tokens
    assert plain.logprobs is plain.cumulative_logprob is None


@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_the_best_completions_come_at_the_end_of_all(bundle, length_penalty):
    sampling = Sampling(30, temperature=1.5, n=2, best_of=6, seed=3, length_penalty=length_penalty)
    free = dataclasses.replace(sampling, n=6, best_of=None, length_penalty=1.0, logprobs=0)
    model = TextModel(bundle, FakeSession(), EngineOptions(max_batch=4))
    deltas = list(model.stream(["ab", "cd", "ef"], [sampling, Sampling(5), sampling]))
    for number, prompt in ((0, "ab"), (2, "ef")):
        everyone = model.generate(prompt, free)
        scores = [one.cumulative_logprob / len(one.tokens) ** length_penalty for one in everyone]
        order = sorted(range(6), key=lambda place: -scores[place])[:2]
        best = [delta.completion for delta in deltas if delta.prompt_index == number]
        assert [one.index for one in best] == [0, 1]
        assert [one.tokens for one in best] == [everyone[place].tokens for place in order]
        assert [one.logprobs for one in best] == [None, None]
        assert [delta.text for delta in deltas if delta.prompt_index == number] == [one.text for one in best]
    assert len({len(one.tokens) for one in everyone}) > 1


def test_a_constraint_that_cannot_be_fails_its_request_alone(bundle):
    session = FakeSession()
    wrong = [Sampling(5, regex="(a"), Sampling(5, banned_tokens=[VOCABULARY]), Sampling(5, json_schema={"not": {}})]
    completions = TextModel(bundle, session).generate(["ab", "cd", "ef", "gh"], [*wrong, Sampling(5, regex="[a-d]*")])
    assert [one.finish_reason for one in completions[:3]] == ["error"] * 3
    for one, words in zip(completions, ("unclosed group", f"has token id {VOCABULARY}", "Unimplemented"), strict=False):
        assert isinstance(one.error, RequestError)
        assert words in str(one.error)
    assert facts(completions[3]) == alone("gh", Sampling(5, regex="[a-d]*"))
    # Refused before anything ran for them.
    assert session.steps[0] == (1, 2)
    assert all(rows == 1 for rows, _ in session.steps)


def test_a_constraint_that_leads_nowhere_ends_its_row_alone(model):
    constrained, other = model.generate(["ab", "cd"], [Sampling(9, regex="abc-"), Sampling(9, ignore_eos=True)])
    assert (constrained.text, constrained.finish_reason) == ("abc", "error")
    assert "has no token for what has to come next" in str(constrained.error)
    assert facts(other) == alone("cd", Sampling(9, ignore_eos=True))


def test_a_constraint_cut_short_says_so(model):
    cut, whole = model.generate(["ab", "ab"], [Sampling(4, regex="[a-d]{6}"), Sampling(6, regex="[a-d]{6}")])
    assert (len(cut.text), cut.finish_reason) == (4, "length")
    assert (len(whole.text), whole.finish_reason) == (6, "stop")


def test_a_complete_text_takes_no_further_step(bundle):
    session = FakeSession()
    (done,) = TextModel(bundle, session, EngineOptions(prompt_lookup=False)).generate("ab", Sampling(50, regex="q{5}"))
    assert (done.text, done.finish_reason) == ("qqqqq", "stop")
    assert session.steps == [(1, 2)] + [(1, 1)] * 4


def test_without_llguidance_only_constrained_requests_fail(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    free, constrained = TextModel(bundle, FakeSession()).generate(["ab", "ab"], [Sampling(5), Sampling(5, regex="a")])
    assert facts(free) == alone("ab", Sampling(5))
    assert "pip install 'fmedge[constraints]'" in str(constrained.error)


def test_stats_count_tokens(model):
    done, refused = model.generate([[1, 2, 3], []], Sampling(6, ignore_eos=True))
    assert (done.stats.prompt_tokens, done.stats.new_tokens) == (3, 6)
    assert 0 < done.stats.first_token_seconds < done.stats.seconds
    assert done.stats.decode_tokens_per_second > 0
    assert (refused.stats.prompt_tokens, refused.stats.new_tokens, refused.stats.decode_tokens_per_second) == (0, 0, 0)


def test_an_abandoned_stream_leaves_the_model_usable(bundle):
    session = FakeSession()
    model = TextModel(bundle, session, EngineOptions(max_batch=2))
    stream = model.stream(["ab", "cd", "ef"], Sampling(30, ignore_eos=True))
    next(stream)
    stream.close()
    allocations = session.allocations
    assert facts(model.generate("qrs", Sampling(30))[0]) == alone("qrs", Sampling(30))
    assert session.allocations == allocations, "the cache is not used again"


def test_a_failing_graph_leaves_the_model_usable(bundle):
    for run in (1, 2, 5):
        session = FakeSession(fail_on=run)
        model = TextModel(bundle, session, EngineOptions(max_batch=2))
        with pytest.raises(BackendError, match="the graph failed"):
            model.generate(["ab", "cd", "ef"], Sampling(9, ignore_eos=True))
        assert facts(model.generate("qrs", Sampling(30))[0]) == alone("qrs", Sampling(30))


def test_streams_nest(model):
    outer = Sampling(12, temperature=1.0, seed=1, ignore_eos=True)
    inner = Sampling(12, temperature=1.0, seed=2, ignore_eos=True)
    text = ""
    model.generate("ab", outer)  # leaves a cache, which one of the streams takes
    for number, delta in enumerate(model.stream("ab", outer)):
        text += delta.text
        (completion,) = model.generate([[number, 3]], inner)
        assert facts(completion) == alone([number, 3], inner)
    assert text == alone("ab", outer)[1]


def test_threads_do_not_mix(model):
    results = {}

    def work(number):
        asked = [[number, other] for other in range(5)]
        sampling = Sampling(40, temperature=1.0, seed=number)
        results[number] = ([facts(done) for done in model.generate(asked, sampling)], expected(asked, [sampling] * 5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(found == wanted for found, wanted in results.values())


def test_a_closed_model_says_so(bundle):
    session = FakeSession()
    with TextModel(bundle, session) as model:
        abandoned = model.stream(["ab", "cd"], Sampling(9, ignore_eos=True))
        next(abandoned)
    assert session.closed
    abandoned.close()
    del abandoned
    gc.collect()
    assert session.allocated == 0
    for call in (model.generate, model.stream, model.logits):
        with pytest.raises(RequestError, match="is closed"):
            call([1, 2])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_samplings_and_prompts_must_match(model, count):
    # Before the first delta is asked for.
    with pytest.raises(RequestError, match=f"2 prompts with {count} Samplings"):
        model.stream(["ab", "cd"], [Sampling()] * count)


@pytest.mark.parametrize(
    "prompt",
    [
        "abc",
        [0, 1, 2],
        (0, 1, 2),
        [np.int64(0), np.int64(1), np.int64(2)],
        np.array([0, 1, 2], np.int32),
        ["abc"],
        [[0, 1, 2]],
        [np.array([0, 1, 2], np.uint16)],
        np.array([[0, 1, 2]]),
    ],
)
def test_a_prompt_is_text_or_ids_alone_or_in_a_list(model, prompt):
    (completion,) = model.generate(prompt, Sampling(5))
    assert facts(completion) == alone("abc", Sampling(5))
    assert all(type(token) is int for token in completion.tokens)


def test_no_prompts_give_no_completions(model):
    assert model.generate([], []) == []
    assert model.generate([]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("-inf")},
        {"stop": "text"},
        {"stop": ("",)},
        {"stop": (1,)},
        {"n": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": True},
        {"max_new_tokens": 1.5},
        {"temperature": "hot"},
        {"typical_p": 0.0},
        {"typical_p": 1.1},
        {"logit_bias": {"a": 1}},
        {"logit_bias": ((1, 2.0), (1, 3.0))},
        {"logit_bias": ((1, float("nan")),)},
        {"logit_bias": ((-1, 2.0),)},
        {"logit_bias": 5},
        {"banned_tokens": (-1,)},
        {"banned_tokens": (1.5,)},
        {"banned_tokens": "12"},
        {"forced_tokens": 5},
        {"stop_token_ids": (True,)},
        {"min_new_tokens": -1},
        {"ignore_eos": 1},
        {"json": "yes"},
        {"json_schema": "{"},
        {"json_schema": 5},
        {"regex": 5},
        {"grammar": ("start: a",)},
        {"best_of": 0},
        {"length_penalty": float("inf")},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    for call in (Sampling, lambda **values: checked(values)):
        with pytest.raises(RequestError) as caught:
            call(**wrong)
        assert f"Sampling.{name} is {value!r}; it must be " in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"json": True, "regex": "a"}, "json and regex"),
        ({"json_schema": {}, "grammar": "start: a"}, "json_schema and grammar"),
        ({"regex": "a", "stop": ["b"]}, "regex and stop"),
        ({"json": True, "ignore_eos": True}, "json and ignore_eos"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, above max_new_tokens, which is 8"),
        ({"forced_tokens": [1, 2], "max_new_tokens": 1}, "forced_tokens has 2 ids, more than max_new_tokens"),
        ({"forced_tokens": [1, 2], "banned_tokens": [2]}, "forced_tokens and banned_tokens both have token id 2"),
        ({"forced_tokens": [1], "stop_token_ids": [1], "regex": "a"}, "forced_tokens has token id 1, which ends the"),
        ({"length_penalty": 0.0}, "length_penalty is 0.0, which only best_of uses"),
        ({"n": 3, "best_of": 2, "temperature": 1.0}, "n is 3, above best_of, which is 2"),
        ({"best_of": 2}, "best_of is 2 and temperature 0"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(wrong, words):
    # One by one they are right, so that only what they come to together is refused.
    assert checked(wrong)
    with pytest.raises(RequestError) as caught:
        Sampling(**wrong)
    assert words in str(caught.value)


def test_options_come_in_the_forms_that_json_and_numpy_give():
    given = {
        "logit_bias": {"7": 1, 3: -2},
        "stop": ["a"],
        "banned_tokens": np.array([4, 5]),
        "forced_tokens": [np.int64(1)],
        "json_schema": {"type": "object", "properties": {"b": {}, "a": {}}},
    }
    kept = checked(given)
    assert kept == {
        "logit_bias": ((3, -2.0), (7, 1.0)),
        "stop": ("a",),
        "banned_tokens": (4, 5),
        "forced_tokens": (1,),
        "json_schema": '{"type": "object", "properties": {"b": {}, "a": {}}}',
    }
    assert checked(kept) == kept
    del given["json_schema"]
    sampling = Sampling(**given)
    assert sampling == dataclasses.replace(sampling)
    assert hash(sampling) == hash(dataclasses.replace(sampling))


def test_the_recommended_sampling_is_the_default(tmp_path):
    recommended = SamplingFacts(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    model = TextModel(make_bundle(tmp_path / "bundle", sampling=recommended), FakeSession())
    assert model.default_sampling == Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    (completion,) = model.generate("ab")
    assert facts(completion) == alone("ab", model.default_sampling, seed=completion.seed)


def test_a_recommended_sampling_that_cannot_be_is_the_bundles_fault(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", sampling=SamplingFacts(top_p=2.0))
    with pytest.raises(BundleFormatError, match=r"bundle: text.sampling: Sampling.top_p is 2.0"):
        TextModel(bundle, FakeSession())


def test_without_a_tokenizer_prompts_are_ids(tmp_path):
    model = TextModel(make_bundle(tmp_path / "bundle", tokenizer=False), FakeSession())
    ids, text, stop, regex = model.generate(
        [[1, 2], "ab", [1, 2], [1, 2]], [Sampling(5), Sampling(5), Sampling(5, stop=("a",)), Sampling(5, regex="a")]
    )
    assert list(ids.tokens) == alone([1, 2], Sampling(5))[0]
    assert ids.text == ""
    assert "has no tokenizer; give prompts as token ids" in str(text.error)
    assert "stop strings cannot be found" in str(stop.error)
    assert "its text cannot be constrained" in str(regex.error)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"the tokenizer has 2\d tokens, the model 1\d"):
        TextModel(make_bundle(tmp_path / "bundle", vocabulary=10), FakeSession())


def test_a_batch_of_none_is_refused(bundle):
    with pytest.raises(RequestError, match="max_batch is 0"):
        TextModel(bundle, FakeSession(), EngineOptions(max_batch=0))


def test_a_chat_is_tokenized_without_further_special_tokens(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", chat_template=CHAT)
    tokenizer = letters_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    tokenizer.save(str(bundle.file("tokenizer.json")))
    model = TextModel(bundle, FakeSession())
    assert model.tokenizer.encode("ab") == [EOS, 0, 1]
    assert model.chat_prompt([{"role": "user", "content": "ab"}, {"role": "user", "content": "<eos>c"}]) == [
        0,
        1,
        EOS,
        2,
    ]


def test_a_completion_keeps_the_space_that_sets_it_apart_from_its_prompt(tmp_path):
    # As SentencePiece: a word begins with a mark, and the decoder takes the first space of a text away.
    bundle = make_bundle(tmp_path / "bundle")
    words = {f"\u2581{letter}": number for number, letter in enumerate(LETTERS)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="\u2581a"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(bundle.file("tokenizer.json")))
    model = TextModel(bundle, FakeSession())
    sampling = Sampling(3, forced_tokens=[2, 3, 4], regex=" c( d e)?")
    (completion,) = model.generate([[0, 1]], sampling)
    assert model.tokenizer.decode([0, 1]) + completion.text == model.tokenizer.decode([0, 1, 2, 3, 4]) == "a b c d e"
    assert completion.finish_reason == "stop"


def test_a_faulty_template_stops_chats_alone(tmp_path):
    model = TextModel(make_bundle(tmp_path / "bundle", chat_template="{% for %}"), FakeSession())
    assert facts(model.generate("ab", Sampling(5))[0]) == alone("ab", Sampling(5))
    with pytest.raises(RequestError, match="syntax error in line 1"):
        model.chat_prompt([{"role": "user", "content": "ab"}])


def test_without_a_template_there_is_no_chat(tmp_path):
    model = TextModel(make_bundle(tmp_path / "bundle"), FakeSession())
    with pytest.raises(RequestError, match="has no chat template"):
        model.chat_prompt([{"role": "user", "content": "ab"}])


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("length", [1, 16, 17, CONTEXT])
def test_logits_are_those_behind_every_token(model, length):
    tokens = np.arange(length) % VOCABULARY
    wanted = [logits_of(tuple(tokens[: end + 1].tolist())) for end in range(length)]
    assert (model.logits(tokens) == np.stack(wanted)).all()
    with pytest.raises(RequestError, match="leaves no room"):
        model.logits([1] * (CONTEXT + 1))


def test_waiting_rows_hold_no_array_as_large_as_the_vocabulary(bundle, monkeypatch):
    made, alive = generation_module.sampler.Row, weakref.WeakSet()
    most = []

    class WatchedRow(made):
        __slots__ = ("__weakref__",)

        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(generation_module.sampler, "Row", WatchedRow)
    stream = TextModel(bundle, FakeSession(), EngineOptions(max_batch=2)).stream(["ab"] * 20, Sampling(9))
    assert sum(delta.completion is not None for delta in stream) == 20
    assert len(most) == 20
    assert max(most) <= 3, "those of the rows, and of one that has just finished"


def test_a_decoder_makes_its_own_room(bundle):
    decoder = Decoder(FakeSession(), bundle.manifest.text)
    cache = decoder.new_cache()
    first, second = tuple([1] * 65), tuple([2] * 128)
    assert (decoder.prefill(cache, 0, first) == logits_of(first)).all()
    assert (decoder.prefill(cache, 1, second) == logits_of(second)).all()
    assert (decoder.decode(cache, [3, 4]) == [logits_of((*first, 3)), logits_of((*second, 4))]).all()


@pytest.mark.usefixtures("short_chunks")
def test_a_failing_graph_leaves_the_rows_before_it(bundle):
    decoder = Decoder(FakeSession(fail_on=3), bundle.manifest.text)
    cache = decoder.new_cache()
    decoder.prefill(cache, 0, [1, 2])
    with pytest.raises(BackendError):
        decoder.prefill(cache, 1, [3] * 40)
    assert cache.lengths.tolist() == [2, 0]
    assert (decoder.decode(cache, [3]) == logits_of((1, 2, 3))).all()
    empty = decoder.new_cache()
    decoder.session.fail_on = decoder.session.runs + 2
    with pytest.raises(BackendError):
        decoder.score(empty, [3] * 40)
    assert not empty.lengths.any()


GOLDEN_PROMPTS = ([1, 2, 3], [4], [5] * 80, [6] * (CONTEXT - 4))
GOLDEN_LENGTHS = (9, 40, 1, 4)


def test_goldens_are_greedy_continuations_and_replay(bundle):
    session = FakeSession()
    decoder = Decoder(session, bundle.manifest.text)
    found = continue_greedily(decoder, GOLDEN_PROMPTS, GOLDEN_LENGTHS)
    for prompt, length, steps in zip(GOLDEN_PROMPTS, GOLDEN_LENGTHS, found, strict=True):
        tokens = list(prompt)
        for step in steps:
            best, second = sorted(logits_of(tuple(tokens)).tolist())[:-3:-1]
            assert step == GoldenStep(token=int(logits_of(tuple(tokens)).argmax()), margin=best - second)
            tokens.append(step.token)
        assert len(tokens) == len(prompt) + length
    goldens = [
        Golden(prompt=tuple(prompt), steps=tuple(steps), near_tie=1e-3)
        for prompt, steps in zip(GOLDEN_PROMPTS, found, strict=True)
    ]
    # The last row fills its context while others go on.
    assert replay(decoder, goldens) == [Replay(length, None, 0, None) for length in GOLDEN_LENGTHS]


def test_a_golden_that_differs_is_named_unless_it_was_a_near_tie(bundle):
    decoder = Decoder(FakeSession(), bundle.manifest.text)
    (steps,) = continue_greedily(decoder, [[1, 2, 3]], [6])
    other = (steps[-1].token + 1) % VOCABULARY
    wrong = (*steps[:-1], GoldenStep(token=other, margin=0.5))
    clear = Golden(prompt=(1, 2, 3), steps=wrong, near_tie=0.5)
    level = Golden(prompt=(1, 2, 3), steps=wrong, near_tie=0.6)
    assert replay(decoder, [clear, level]) == [Replay(6, 5, 0, steps[-1].token), Replay(6, None, 1, None)]
