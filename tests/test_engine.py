"""The engine: requests that come, share, give way, go and fail in any order get what they get alone."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from fake_session import (
    CONTEXT,
    HYBRID,
    PLAIN,
    VOCABULARY,
    WINDOWED,
    FakeSession,
    make_bundle,
    row_bytes,
)
from fmedge_runtimes.engine import EngineOptions
from fmedge_runtimes.errors import BackendError, QueueFullError, RequestError
from fmedge_runtimes.request import Request
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.text import TextModel
from hypothesis import given, settings
from hypothesis import strategies as st
from one_by_one import alone, expected, facts, written

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
        assert (len(engine._slots), len(engine._waiting), engine._unfinished, engine._requests) == (0, 0, 0, {})


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
@given(
    events=events,
    max_batch=st.integers(1, 5),
    reuse=st.booleans(),
    memory=st.none() | st.tuples(st.sampled_from(["room", "limit"]), st.integers(0, 4 * CONTEXT)),
)
def test_any_schedule_gives_what_each_request_gets_alone(bundles, name, events, max_batch, reuse, memory):
    layers = LAYERS[name]
    session = FakeSession(layers=layers)
    if memory is not None:
        # Room for one row of the whole context and for its growth, at least; a GPU does not say what there is.
        token = sum(cache.kv_heads * (cache.key_dim + cache.value_dim) for cache in layers.caches) * 4
        setattr(session, memory[0], 3 * token * (CONTEXT + memory[1] // 2) + 4000 * len(layers.states))
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


class Gated(FakeSession):
    """A session whose runs wait until the test lets them through."""

    def __init__(self, **named):
        super().__init__(**named)
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def run(self, feeds, results):
        self.entered.release()
        assert self.gate.acquire(timeout=20)
        return super().run(feeds, results)


LONG = Sampling(CONTEXT, temperature=1.0, seed=3, ignore_eos=True)


def eventually(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.002)


def test_a_request_is_iterated_and_its_result_asked_for(bundle):
    model = TextModel(bundle, FakeSession(), EngineOptions(max_batch=2))
    request = model.submit(["ab", "cd", "ef"], LONG)
    pieces = {}
    for delta in request:
        pieces[delta.prompt_index] = pieces.get(delta.prompt_index, "") + delta.text
    wanted = expected(["ab", "cd", "ef"], [LONG] * 3)
    assert [facts(done) for done in request.result()] == wanted
    assert [pieces[number] for number in range(3)] == [text for _, text, _ in wanted]
    assert request.done
    assert list(request) == []
    request.cancel()
    assert request.result()[0].finish_reason == "context"


def test_text_that_nobody_fetches_is_put_together(bundle):
    model = TextModel(bundle, FakeSession())
    slow = model.submit(["ab", "cd"], LONG)
    eventually(lambda: slow.done)
    deltas = list(slow)
    assert [(delta.prompt_index, delta.text) for delta in deltas] == [
        (completion.prompt_index, completion.text) for completion in slow.result()
    ]
    assert all(delta.completion is not None for delta in deltas)


def test_a_result_can_be_waited_for_a_while(bundle):
    session = Gated()
    model = TextModel(bundle, session)
    request = model.submit("ab", Sampling(1))
    with pytest.raises(TimeoutError, match=r"not there after 0\.01 seconds"):
        request.result(timeout=0.01)
    session.gate.release(100)
    assert facts(request.result(timeout=10)[0]) == alone("ab", Sampling(1))


def test_cancelling_frees_the_row_at_the_next_step(bundle):
    session = FakeSession()
    driven = ByHand(bundle, session, max_batch=1)
    first, second = driven.model.submit("ab", LONG), driven.model.submit("cd", Sampling(2))
    driven.step(5)
    first.cancel()
    driven.step(2)
    assert facts(second.result(timeout=0)[0]) == alone("cd", Sampling(2))
    (cancelled,) = first.result()
    tokens = alone("ab", LONG)[0][:5]
    assert facts(cancelled) == (tokens, written(tokens), "cancelled")
    assert session.steps == [(1, 2), (1, 1), (1, 1), (1, 1), (1, 1), (1, 2), (1, 1)]


def test_what_waits_can_be_cancelled_too(bundle):
    driven = ByHand(bundle, FakeSession(), max_batch=1)
    running, waiting = driven.model.submit("ab", LONG), driven.model.submit(["cd"] * 50, Sampling(2, n=2))
    driven.step(3)
    waiting.cancel()
    driven.step()
    assert [(done.tokens, done.finish_reason) for done in waiting.result()] == [((), "cancelled")] * 100
    driven.finish()
    assert facts(running.result()[0]) == alone("ab", LONG)


def test_a_request_out_of_time_ends_with_what_it_has(bundle, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("fmedge_runtimes.engine.time.perf_counter", lambda: clock[0])
    driven = ByHand(bundle, FakeSession(), max_batch=1)
    timed = driven.model.submit(["ab", "cd"], LONG, timeout=5)
    other = driven.model.submit("ef", Sampling(3))
    soon = driven.model.submit("gh", Sampling(3), timeout=4000)
    driven.step(10)
    clock[0] += 5
    driven.finish()
    running, waiting = timed.result()
    assert (running.finish_reason, list(running.tokens)) == ("timeout", alone("ab", LONG)[0][:10])
    assert (waiting.finish_reason, waiting.tokens) == ("timeout", ())
    assert facts(other.result()[0]) == alone("ef", Sampling(3))
    assert facts(soon.result()[0]) == alone("gh", Sampling(3))


def test_who_comes_when_too_many_wait_is_refused(bundle):
    driven = ByHand(bundle, FakeSession(), max_batch=2, max_waiting=3)
    accepted = [driven.model.submit("ab", Sampling(2)) for _ in range(5)]
    with pytest.raises(QueueFullError, match=r"3 completions wait for one of 2 rows already; .* max_waiting") as caught:
        driven.model.submit("ab", Sampling(2))
    assert isinstance(caught.value, RequestError)
    driven.finish()
    assert all(request.done for request in accepted)
    # One call may bring as many prompts as it likes.
    many = driven.model.submit(["ab"] * 20, Sampling(2))
    with pytest.raises(QueueFullError, match="18 completions wait"):
        driven.model.generate("cd")
    many.cancel()
    driven.step()
    last = driven.model.submit("cd", Sampling(2))
    driven.finish()
    assert facts(last.result()[0]) == alone("cd", Sampling(2))


def test_a_place_is_free_as_soon_as_somebody_knows_of_the_end(bundle):
    model = TextModel(bundle, FakeSession(), EngineOptions(max_batch=1, max_waiting=0))
    for number in range(200):
        (done,) = model.generate([[number % VOCABULARY, 3]], Sampling(1))
        assert done.finish_reason in ("length", "eos")


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_waiting": -1}])
def test_an_engine_of_nothing_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(RequestError, match=f"{name} is {value}; it must be at least"):
        EngineOptions(**wrong)


@pytest.mark.usefixtures("short_chunks")
def test_a_long_prompt_keeps_others_waiting_for_a_piece_only(bundle):
    session = FakeSession()
    driven = ByHand(bundle, session, max_batch=4)
    driven.model.submit(["ab", "cd"], LONG)
    driven.step(5)
    long = driven.model.submit([[1] * 60], Sampling(1))
    before = len(session.steps)
    while not long.done:
        driven.step()
    pieces = session.steps[before:]
    # 8 tokens of the prompt, then one for each of the others.
    assert pieces[: 2 * 8] == [(1, 8), (2, 1)] * 7 + [(1, 4)] + pieces[15:16]
    # Nobody waits, and the pieces are as long as they can be.
    before = len(session.steps)
    alone_model = ByHand(bundle, other := FakeSession())
    alone_model.model.submit([[1] * 60], Sampling(1))
    alone_model.finish()
    assert other.steps == [(1, 16), (1, 16), (1, 16), (1, 12)]


@pytest.mark.usefixtures("short_chunks")
def test_prompts_of_one_request_wait_for_each_other(bundle):
    # Its caller wants all of it, and more rows in a step are cheaper.
    session = FakeSession()
    TextModel(bundle, session).generate([[1] * 20, [2] * 20, [3] * 20], Sampling(3, ignore_eos=True))
    assert session.steps == [(1, 16), (1, 4)] * 3 + [(3, 1)] * 2


@pytest.mark.usefixtures("short_chunks")
def test_a_short_prompt_does_not_wait_for_all_of_a_long_one(bundle):
    session = FakeSession()
    driven = ByHand(bundle, session, max_batch=4)
    driven.model.submit([[1] * 100], Sampling(1))
    driven.step()
    short = [driven.model.submit([[2, 3, number]], Sampling(1)) for number in range(2)]
    alike = driven.model.submit([[1] * 8], Sampling(1))
    driven.finish()
    # They take turns; the one that begins like the long one waits, and has nothing but its last token to do then.
    assert session.steps == [(1, 16), (1, 3), (1, 16), (1, 1), (1, 16), (1, 16), (1, 16), (1, 16), (1, 4), (1, 1)]
    assert [request.result()[0].stats.reused_tokens for request in (*short, alike)] == [0, 2, 7]


def test_requests_take_turns(bundle, monkeypatch):
    order = []
    put = Request.put
    monkeypatch.setattr(Request, "put", lambda request, delta: order.append(request) or put(request, delta))
    driven = ByHand(bundle, FakeSession(), max_batch=1)
    many = driven.model.submit(["ab", "bc", "cd", "de"], Sampling(1))
    few, other = (driven.model.submit(prompt, Sampling(1, n=2)) for prompt in ("ef", "gh"))
    driven.finish()
    # One prompt of each in turn, with all its completions.
    assert order == [many, few, few, other, other, many, many, many]


def test_nothing_is_done_while_there_is_nothing_to_do(bundle):
    model = TextModel(bundle, FakeSession())
    listened = []
    inner = model._engine._listen
    model._engine._listen = lambda: listened.append(1) or inner()
    model.generate("ab", Sampling(2))
    eventually(lambda: len(listened) >= 3)
    before = len(listened)
    time.sleep(0.1)
    assert len(listened) == before


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.medium)])
def test_threads_and_cancellations_leave_nothing_behind(bundle, count):
    # Requests from several threads, a third of them cancelled at some point, in bounded memory.
    session = FakeSession(room=row_bytes(8 * CONTEXT))
    model = TextModel(bundle, session, EngineOptions(max_batch=6))
    wrong = []

    def work(number):
        random = np.random.default_rng(number)
        for _ in range(count):
            prompt = random.integers(0, 4, random.integers(1, 6)).tolist()
            sampling = Sampling(int(random.integers(1, 12)), temperature=1.0, seed=int(random.integers(3)))
            request = model.submit([prompt], sampling)
            fate = random.integers(6)
            if fate == 0:
                request.cancel()
            elif fate == 1:
                next(request)
                request.cancel()
            (done,) = request.result(timeout=60)
            tokens, text, reason = alone(prompt, sampling)
            same = facts(done) == (tokens, text, reason)
            begun = fate < 2 and done.finish_reason == "cancelled" and list(done.tokens) == tokens[: len(done.tokens)]
            if not (same or begun):
                wrong.append((prompt, sampling, done))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    engine = model._engine
    eventually(lambda: not (len(engine._slots) or engine._unfinished))
    assert (len(engine._waiting), engine._requests) == (0, {})
    assert session.peak <= row_bytes(8 * CONTEXT)
    # Nobody but the engine's own thread has come up.
    assert sum(thread.name == "fmedge-engine" and thread is engine._thread for thread in threading.enumerate()) == 1


def test_coroutines_stream_and_generate(bundle):
    async def work():
        model = TextModel(bundle, FakeSession(), EngineOptions(max_batch=3))

        async def read(prompt):
            text, last = "", None
            async for delta in model.astream(prompt, LONG):
                text, last = text + delta.text, delta.completion
            return text, facts(last)

        read_ones = await asyncio.gather(*(read(prompt) for prompt in ("ab", "cd", "ef", "gh")))
        together = await model.agenerate(["ab", "cd"], LONG)
        request = model.submit("ab", LONG)
        pieces = [delta.text async for delta in request]
        model.close()
        return read_ones, together, "".join(pieces), await request.wait()

    read_ones, together, text, waited = asyncio.run(work())
    assert read_ones == [(alone(prompt, LONG)[1], alone(prompt, LONG)) for prompt in ("ab", "cd", "ef", "gh")]
    assert [facts(done) for done in together] == expected(["ab", "cd"], [LONG] * 2)
    assert text == alone("ab", LONG)[1]
    assert [facts(done) for done in waited] == [alone("ab", LONG)]


@pytest.mark.parametrize("how", ["generate", "stream", "break", "timeout"])
def test_coroutines_that_are_cancelled_cancel_their_request(bundle, how):
    session = Gated()
    model = TextModel(bundle, session, EngineOptions(max_batch=1))

    async def read():
        async for _ in model.astream("ab", LONG):
            pass

    async def work():
        session.gate.release(3)
        if how == "break":
            stream = model.astream("ab", LONG)
            await anext(stream)
            await stream.aclose()
        elif how == "timeout":
            with pytest.raises(asyncio.TimeoutError):  # which is TimeoutError only from Python 3.11 on
                await asyncio.wait_for(model.agenerate("ab", LONG), 0.05)
        else:
            task = asyncio.create_task(model.agenerate("ab", LONG) if how == "generate" else read())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        session.gate.release(100)
        return await model.agenerate("cd", Sampling(2))

    assert [facts(done) for done in asyncio.run(work())] == [alone("cd", Sampling(2))]
    # A few steps, not all that the context has room for.
    assert len(session.steps) < 10


def test_a_loop_that_is_gone_keeps_nobody_waiting(bundle):
    session = Gated()
    model = TextModel(bundle, session)
    loop = asyncio.new_event_loop()
    request = model.submit("ab", Sampling(3))
    waiting = loop.create_task(request.wait())
    loop.run_until_complete(asyncio.sleep(0.01))
    waiting.cancel()
    loop.run_until_complete(asyncio.gather(waiting, return_exceptions=True))
    stuck = loop.create_task(anext(request))
    loop.run_until_complete(asyncio.sleep(0.01))
    stuck.cancel()
    loop.run_until_complete(asyncio.gather(stuck, return_exceptions=True))
    loop.close()
    session.gate.release(100)
    assert facts(model.generate("cd", Sampling(2))[0]) == alone("cd", Sampling(2))


def test_closing_ends_everything(bundle):
    session = Gated()
    model = TextModel(bundle, session, EngineOptions(max_batch=1))
    requests = [model.submit("ab", LONG), model.submit(["cd", "ef"], LONG)]
    session.gate.release(3)
    for _ in range(4):
        assert session.entered.acquire(timeout=10)
    closing = threading.Thread(target=model.close)
    closing.start()
    session.gate.release(1)
    closing.join(10)
    assert not closing.is_alive()
    assert session.closed
    assert not model._engine._thread.is_alive()
    (running,), waiting = (request.result(timeout=0) for request in requests)
    assert (running.finish_reason, len(running.tokens)) == ("cancelled", 4)
    assert [(done.finish_reason, done.tokens) for done in waiting] == [("cancelled", ())] * 2
    assert session.allocated == 0
    with pytest.raises(RequestError, match="is closed"):
        model.submit("ab")
    model.close()


def test_a_stream_of_a_model_that_was_closed_does_not_begin(bundle):
    model = TextModel(bundle, FakeSession())
    stream = model.stream("ab")
    model.close()
    with pytest.raises(RequestError, match="is closed"):
        next(stream)


def test_a_forgotten_model_ends_its_thread_but_not_while_it_is_used(bundle):
    session = FakeSession()
    model = TextModel(bundle, session)
    thread_of, request = weakref.ref(model._engine), model.submit("ab", LONG)
    thread = model._engine._thread
    del model
    gc.collect()
    assert facts(request.result(timeout=10)[0]) == alone("ab", LONG)
    del request
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert thread_of() is None
    assert session.allocated == 0


@pytest.mark.parametrize("how", ["", "model.close()", "del model"])
def test_the_interpreter_ends_in_the_middle_of_work(how, tmp_path):
    code = f"""
import sys, pathlib
sys.path[:0] = {[path for path in sys.path if path]!r}
from fake_session import FakeSession, make_bundle
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.text import TextModel
model = TextModel(make_bundle(pathlib.Path({str(tmp_path / "bundle")!r})), FakeSession())
requests = [model.submit(["ab", "cd"], Sampling(190, ignore_eos=True)) for _ in range(20)]
next(requests[0])
{how}
print("end")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("failing", [1, 2, 3, 6])
def test_a_graph_that_fails_ends_those_of_the_step_alone(bundles, layers, failing):
    session = FakeSession(layers=LAYERS[layers], fail_on=failing)
    driven = ByHand(bundles[layers], session, max_batch=2)
    sampling = Sampling(6, temperature=1.0, seed=2, ignore_eos=True)
    one, both, late = (driven.model.submit(asked, sampling) for asked in ("ab", ["cd", "de"], "ef"))
    driven.finish()
    requests = {"ab": one, "cd": both, "ef": late}
    failed = {name for name, request in requests.items() if request._failure is not None}
    # Two prompts, then steps of two rows; the third request waits for a row.
    assert failed == {1: {"ab"}, 2: {"cd"}, 3: {"ab", "cd"}, 6: {"ab", "cd"}}[failing]
    for name in failed:
        with pytest.raises(BackendError, match="the graph failed"):
            requests[name].result()
        with pytest.raises(BackendError, match="the graph failed"):
            list(requests[name])
    for name in requests.keys() - failed:
        prompts = [name] if name != "cd" else ["cd", "de"]
        wanted = expected(prompts, [sampling] * len(prompts), LAYERS[layers])
        assert [facts(done) for done in requests[name].result()] == wanted
    again = driven.model.submit(["ab", "cd"], sampling)
    driven.finish()
    assert [facts(done) for done in again.result()] == expected(["ab", "cd"], [sampling] * 2, LAYERS[layers])


@pytest.mark.usefixtures("short_chunks")
def test_a_guest_does_not_take_the_room_that_a_long_prompt_needs(bundle):
    # Three rows of that length do not fit, three short ones would.
    driven = ByHand(bundle, FakeSession(room=row_bytes(2 * 192 + 150)), max_batch=3)
    first = driven.model.submit("ab", LONG)
    driven.step(2)
    long = driven.model.submit([[1] * 150], Sampling(9))
    driven.step(6)
    short = driven.model.submit("cd", Sampling(9))
    driven.finish()
    assert facts(long.result()[0]) == alone([1] * 150, Sampling(9))
    assert facts(short.result()[0]) == alone("cd", Sampling(9))
    assert facts(first.result()[0]) == alone("ab", LONG)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_a_step_that_failed_are_not_used_again(bundles, name):
    session = FakeSession(layers=LAYERS[name], fail_on=6)
    driven = ByHand(bundles[name], session, max_batch=2)
    failed = driven.model.submit([[1, 2, 3, 4], [5, 6, 7, 8]], LONG)
    driven.finish()
    with pytest.raises(BackendError):
        failed.result()
    again = driven.model.submit([[1, 2, 3, 4, 9], [5, 6, 7, 8, 9]], LONG)
    driven.finish()
    wanted = expected([[1, 2, 3, 4, 9], [5, 6, 7, 8, 9]], [LONG] * 2, LAYERS[name])
    assert [facts(done) for done in again.result()] == wanted


def test_an_error_where_a_request_ends_keeps_nobody_waiting(bundle, monkeypatch):
    model = TextModel(bundle, Gated(), EngineOptions(max_batch=1))
    requests = [model.submit(["ab", "cd", "ef"], LONG), model.submit("gh", LONG)]
    monkeypatch.setattr("fmedge_runtimes.generation.TextStream.flush", lambda _: 1 / 0)
    requests[0].cancel()
    model._decoder.session.gate.release(1000)
    for request in requests:
        with pytest.raises(BackendError, match="ZeroDivisionError"):
            request.result(timeout=10)


def test_an_error_that_should_not_be_ends_all_and_the_engine_goes_on(bundle, monkeypatch):
    session = FakeSession()
    driven = ByHand(bundle, session, max_batch=2)
    requests = [driven.model.submit(prompt, LONG, timeout=60) for prompt in ("ab", "cd", "ef")]
    driven.step(3)
    engine = driven.engine
    with monkeypatch.context() as patched:
        patched.setattr("fmedge_runtimes.engine.choose", lambda *_: 1 / 0)
        thread = threading.Thread(target=engine._serve)
        thread.start()
        eventually(lambda: all(request.done for request in requests))
    for request in requests:
        with pytest.raises(BackendError, match=r"the engine failed \(ZeroDivisionError: division by zero\)") as caught:
            request.result()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert engine._unfinished == 0
    engine._thread = thread
    assert facts(driven.model.generate("gh", LONG)[0]) == alone("gh", LONG)
    driven.model.close()
    assert not thread.is_alive()
