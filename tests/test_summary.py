"""What is chosen from a summary of logits is what is chosen from the logits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from fmedge_runtimes.device_logits import DeviceLogits, Summariser
from fmedge_runtimes.host_memory import HostBuffer
from fmedge_runtimes.onnxruntime_session import OnnxRuntimeSession
from fmedge_runtimes.sampler import NO_TOKEN, Row, choose, logprob_of
from fmedge_runtimes.sampling import Sampling
from fmedge_runtimes.summary import logprob_from
from hypothesis import given, settings
from hypothesis import strategies as st

VOCABULARIES = (100, 128, 512, 3001)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    from fmedge_converters.candidates_graph import write_candidates

    @lru_cache
    def opened(vocabulary, dtype):
        _, path = write_candidates(tmp_path_factory.mktemp("candidates"), vocabulary, dtype)
        return OnnxRuntimeSession(path, "cpu", 1)

    return opened


class Counted:
    """A session that counts the elements that are read from its buffers."""

    def __init__(self, session):
        self.session = session
        self.elements = 0

    def read(self, buffer, start, stop):
        self.elements += stop - start
        return self.session.read(buffer, start, stop)


def on_device(sessions, logits):
    session = sessions(logits.shape[1], str(logits.dtype))
    counted = Counted(session)
    return DeviceLogits(counted, HostBuffer(logits), len(logits), Summariser(session)), counted


def compare(sessions, logits, rows):
    left, counted = on_device(sessions, logits)
    assert choose(left, rows).tolist() == choose(logits, rows).tolist()
    return counted.elements


def drawn(random, rows, vocabulary, spread, ties, dtype):
    logits = random.standard_normal((rows, vocabulary)) * spread
    if ties:
        logits = np.round(logits * 2) / 2
    return logits.astype(dtype)


OPTIONS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7, 1e-300, 1e300]),
    top_k=st.sampled_from([0, 1, 5, 50, 127, 128, 129, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    banned_tokens=st.sampled_from([(), (), (3, 4)]),
    forced_tokens=st.sampled_from([(), (), (7,)]),
)


@settings(max_examples=60)
@given(
    options=st.lists(OPTIONS, min_size=1, max_size=4),
    vocabulary=st.sampled_from(VOCABULARIES),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
    ties=st.booleans(),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 2**32),
)
def test_the_same_token_is_chosen(sessions, options, vocabulary, spread, ties, dtype, seed):
    random = np.random.default_rng(seed)
    logits = drawn(random, len(options), vocabulary, spread, ties, dtype)
    rows = [Row(option, vocabulary=vocabulary, seed=seed, prompt=[1, 2]) for option in options]
    for _ in range(6):
        compare(sessions, logits, rows)
        for row, token in zip(rows, choose(logits, rows).tolist(), strict=True):
            row.record(token)


@pytest.mark.parametrize(
    ("sampling", "most"),
    [
        (Sampling(), 0),
        (Sampling(temperature=0.8, seed=1), 256),
        (Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.9, seed=1), 0),
        (Sampling(temperature=0.8, top_p=0.9, seed=1), 0),
        (Sampling(temperature=0.8, min_p=0.05, seed=1), 0),
    ],
)
def test_rows_of_a_sure_model_are_not_fetched(sessions, sampling, most):
    random = np.random.default_rng(0)
    logits = drawn(random, 8, 3001, 2.0, ties=False, dtype="float16")
    logits[:, 17:40] += 9
    rows = [Row(sampling, vocabulary=3001, seed=number) for number in range(8)]
    fetched = 0
    for _ in range(20):
        fetched += compare(sessions, logits, rows)
        for row in rows:
            row.record(0)
    # A border near the random number sends a row to the host now and then.
    assert fetched <= 20 * 8 * most + 3 * 3001


def test_logits_that_are_no_logits_are_found(sessions):
    random = np.random.default_rng(0)
    logits = drawn(random, 5, 512, 2.0, ties=False, dtype="float32")
    logits[0, 500], logits[1, 3], logits[2], logits[3, 1:] = np.nan, np.inf, -np.inf, -np.inf
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=5)):
        rows = [Row(sampling, vocabulary=512, seed=number) for number in range(5)]
        compare(sessions, logits, rows)
        tokens = choose(on_device(sessions, logits)[0], rows).tolist()
        assert tokens[:4] == [NO_TOKEN, NO_TOKEN, NO_TOKEN, 0]


def test_a_draw_from_a_summary_has_the_distribution_of_the_logits(sessions):
    logits = np.repeat(drawn(np.random.default_rng(3), 1, 100, 1.0, ties=False, dtype="float32"), 64, axis=0)
    rows = [Row(Sampling(temperature=1.0), vocabulary=100, seed=number) for number in range(64)]
    counts = np.zeros(100)
    for _ in range(64):
        tokens = choose(on_device(sessions, logits)[0], rows)
        np.add.at(counts, tokens, 1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.record(token)
    weights = np.exp(logits[0] - logits[0].max())
    expected = weights / weights.sum() * counts.sum()
    # Chi squared of 99 degrees of freedom: above 161 once in 10 000.
    assert ((counts - expected) ** 2 / expected).sum() < 161


@settings(max_examples=40)
@given(
    vocabulary=st.sampled_from(VOCABULARIES),
    top=st.sampled_from([0, 1, 5, 128, 200]),
    ties=st.booleans(),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 2**32),
)
def test_log_probabilities_are_those_of_the_logits(sessions, vocabulary, top, ties, dtype, seed):
    random = np.random.default_rng(seed)
    logits = drawn(random, 2, vocabulary, 3.0, ties, dtype)
    left, _ = on_device(sessions, logits)
    left.summaries([0.5, 1.0])
    for number in range(2):
        order = np.argsort(-logits[number], kind="stable")
        for rank in (0, 40, 99):
            token = int(order[rank])
            found = logprob_from(left.row(number).summary, token, top)
            if found is None:
                # The token, or one of the likeliest, is not known for certain.
                border = np.sort(logits[number])[-min(128, vocabulary)]
                few = np.count_nonzero(logits[number] > border) if vocabulary > 128 else vocabulary
                assert top > few or logits[number][token] <= border
                continue
            expected = logprob_of(logits[number], token, top)
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-6)
            assert [one for one, _ in found.top] == [one for one, _ in expected.top]
            assert [value for _, value in found.top] == pytest.approx([value for _, value in expected.top], abs=1e-6)
