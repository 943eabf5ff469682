"""The engine: requests that come, share, give way, go and fail in any order get what they get alone."""

import pytest
from fake_session import (
    CONTEXT,
    HYBRID,
    PLAIN,
    VOCABULARY,
    WINDOWED,
    FakeSession,
    make_bundle,
)
from fmedge_runtimes.engine import EngineOptions
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.text import TextModel
from hypothesis import given, settings
from hypothesis import strategies as st
from one_by_one import expected, facts

LAYERS = {"plain": PLAIN, "windowed": WINDOWED, "hybrid": HYBRID}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return {
        name: make_bundle(tmp_path_factory.mktemp(name) / "bundle", layers=layers) for name, layers in LAYERS.items()
    }


@pytest.fixture
def bundle(bundles):
    return bundles["plain"]


class ByHand:
    """A model whose engine takes its steps when the test says so, instead of a thread of its own."""

    def __init__(self, bundle, session, **options):
        self.model = TextModel(bundle, session, EngineOptions(**options))
        self.engine = self.model._engine
        self.engine._thread = self

    def join(self):
        self.engine._serve()

    def step(self, times=1):
        for _ in range(times):
            if not self.busy:
                return
            assert self.engine._listen()
            self.engine._step()
            assert len(self.engine._slots) <= self.engine._options.max_batch

    @property
    def busy(self):
        engine = self.engine
        return bool(engine._arrived or engine._stopped or len(engine._waiting) or len(engine._slots))

    def finish(self):
        for _ in range(100_000):
            if not self.busy:
                break
            self.step()
        engine = self.engine
        assert (len(engine._slots), len(engine._waiting), engine._unfinished, engine._deadlines) == (0, 0, 0, {})


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr("fmedge_runtimes.decoder.PREFILL_CHUNK", 16)
    monkeypatch.setattr("fmedge_runtimes.engine.SHARED_CHUNK", 8)
    monkeypatch.setattr("fmedge_runtimes.engine.LEAST_CHUNK", 3)


def stem(start, length):
    return [(start + number * number) % VOCABULARY for number in range(length)]


samplings = st.builds(
    Sampling,
    max_new_tokens=st.sampled_from([1, 3, 20, 60]),
    temperature=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    stop=st.sampled_from([(), ("a", "bc")]),
    ignore_eos=st.booleans(),
    n=st.sampled_from([1, 1, 1, 3]),
    seed=st.integers(0, 3),
)
# Prompts that begin alike, at places that are no borders of anything.
prompts = st.builds(
    lambda stem, cut, rest: (stem[:cut] + rest) or [1],
    st.sampled_from([stem(3, 40), stem(5, 90), stem(3, 17)]),
    st.integers(0, 90),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=12),
)
events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.lists(st.tuples(prompts, samplings), min_size=1, max_size=3)),
        # The next turn of a chat: a prompt with its completion, and something new.
        st.tuples(st.just("continue"), st.integers(0, 9), st.lists(st.integers(0, 9), max_size=9), samplings),
        st.tuples(st.just("step"), st.integers(1, 80)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
    ),
    min_size=2,
    max_size=14,
)


def play(driven, events):
    """What was submitted: the request, its prompts and samplings, and whether it was cancelled."""
    submitted = []
    for kind, *what in events:
        if kind == "submit":
            asked, options = zip(*what[0], strict=True)
            submitted.append([driven.model.submit(asked, options), asked, options, False])
        elif kind == "step":
            driven.step(what[0])
        elif kind == "cancel" and submitted:
            cancelled = submitted[what[0] % len(submitted)]
            cancelled[0].cancel()
            cancelled[3] = True
        elif kind == "continue" and submitted:
            number, more, sampling = what
            before, asked, *_ = submitted[number % len(submitted)]
            driven.step(100)
            prompt = [*asked[0], *(before.result()[0].tokens if before.done else ()), *more]
            if len(prompt) < CONTEXT:
                submitted.append([driven.model.submit([prompt], sampling), [prompt], [sampling], False])
    return submitted


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=40, deadline=None)
@given(events=events, max_batch=st.integers(1, 5), reuse=st.booleans(), room=st.none() | st.integers(0, 4 * CONTEXT))
def test_any_schedule_gives_what_each_request_gets_alone(bundles, name, events, max_batch, reuse, room):
    layers = LAYERS[name]
    session = FakeSession(layers=layers)
    if room is not None:
        # Room for one row of the whole context and for its growth, at least.
        token = sum(cache.kv_heads * (cache.key_dim + cache.value_dim) for cache in layers.caches) * 4
        session.room = 3 * token * (CONTEXT + room // 2) + 4000 * len(layers.states)
    driven = ByHand(bundles[name], session, max_batch=max_batch, prefix_reuse=reuse)
    submitted = play(driven, events)
    driven.finish()
    for request, asked, options, cancelled in submitted:
        for completion, wanted in zip(request.result(), expected(asked, options, layers), strict=True):
            if completion.finish_reason == "cancelled":
                assert cancelled
                assert list(completion.tokens) == wanted[0][: len(completion.tokens)]
                assert wanted[1].startswith(completion.text)
            else:
                assert facts(completion) == wanted
            if not reuse:
                assert completion.stats.reused_tokens == 0
    driven.model.close()
    assert session.allocated == 0
