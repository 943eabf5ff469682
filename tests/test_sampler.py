"""Sampling: against transformers' processors, against the distribution it should draw from, and row by row."""

import numpy as np
import pytest
import torch
from fmedge_runtimes.errors import BackendError
from fmedge_runtimes.sampler import NO_TOKEN, Row, candidates, choose, fault, fresh_seed, uniform
from fmedge_runtimes.sampling import Sampling
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

PROMPT = [3, 5, 5, 11]
COMPLETION = [7, 5, 7, 7]

options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.5, 1.0, 1.7, 10.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 40, 1000]),
        "top_p": st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 0.95]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3]),
    }
)
# Logits on a coarse grid tie often; width 9 leaves the blocks of top_k empty, 700 fills them.
logits_rows = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([16, 100, 700]), st.sampled_from([0.0, 0.5])).map(
    lambda drawn: draw_logits(*drawn)
)


def draw_logits(seed, width, grid):
    logits = np.random.default_rng(seed).normal(0, 3, width)
    logits = np.round(logits / grid) * grid if grid else logits
    return logits.astype(np.float32)


def row(vocabulary, prompt=(), completion=(), *, seed=1, index=0, **sampling):
    made = Row(Sampling(**sampling), vocabulary=vocabulary, seed=seed, index=index, prompt=prompt)
    for token in completion:
        made.record(token)
    return made


def reference_processors(sampling):
    """What transformers' _get_logits_processor would make of the options, in its order."""
    processors = []
    if sampling["repetition_penalty"] != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(sampling["temperature"]))
    if sampling["top_k"]:
        processors.append(TopKLogitsWarper(sampling["top_k"]))
    if sampling["top_p"] < 1.0:
        processors.append(TopPLogitsWarper(sampling["top_p"]))
    if sampling["min_p"] > 0.0:
        processors.append(MinPLogitsWarper(sampling["min_p"]))
    return processors


def is_borderline(scores, processor):
    """Whether rounding alone decides what a processor removes: then either set is right."""
    values = scores[0]
    if isinstance(processor, TopPLogitsWarper):
        removed = values.sort().values.softmax(-1).cumsum(-1)
        return bool(((removed - (1 - processor.top_p)).abs() < 1e-9).any())
    if isinstance(processor, MinPLogitsWarper):
        ratios = (values - values.max()).exp()
        return bool(((ratios - processor.min_p).abs() < 1e-9).any())
    if isinstance(processor, TopKLogitsWarper):
        gaps = values.sort().values.diff()
        return bool(((gaps > 0) & (gaps < 1e-9)).any())
    return False


@settings(max_examples=150, deadline=None)
@given(logits_rows, options)
@example(
    np.zeros(100, np.float32), {"temperature": 1.0, "top_k": 5, "top_p": 0.305, "min_p": 0.0, "repetition_penalty": 1.0}
)
def test_candidates_are_those_of_transformers(logits, sampling):
    # In float64, because float32 is off by more than 1e-6 itself where logits are large and the temperature is low.
    scores = torch.from_numpy(logits)[None].double()
    seen = torch.tensor([PROMPT + COMPLETION])
    for processor in reference_processors(sampling):
        assume(not is_borderline(scores, processor))
        scores = processor(seen, scores)
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            scores = scores.float().double()  # penalised logits are float32, as logits are
    wanted = scores[0].softmax(-1).numpy()

    state = row(len(logits), PROMPT, COMPLETION, **sampling)
    penalised = state.penalised(logits)
    ids, weights = candidates(penalised, state.sampling)
    survivors = np.flatnonzero(np.isfinite(scores[0].numpy()))
    assert np.sort(penalised[ids]).tolist() == np.sort(penalised[survivors]).tolist()
    if not sampling["top_p"] < 1.0:
        assert ids.tolist() == survivors.tolist()
    else:
        # Of tokens that tie at the border, torch's sort decides which survive; all above the border must agree.
        border = penalised[ids].min()
        above = penalised > border
        assert ids[above[ids]].tolist() == survivors[above[survivors]].tolist()
    np.testing.assert_allclose(np.sort(weights / weights.sum()), np.sort(wanted[survivors]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 1, 50, 3000])
@pytest.mark.parametrize("top_p", [0.02, 0.9, 1.0])
def test_a_large_vocabulary_is_truncated_exactly(top_k, top_p):
    logits = np.random.default_rng(7).normal(0, 2.5, 152_064).astype(np.float32)
    sampling = {"temperature": 0.8, "top_k": top_k, "top_p": top_p, "min_p": 0.0, "repetition_penalty": 1.0}
    scores = torch.from_numpy(logits)[None].double()
    for processor in reference_processors(sampling):
        scores = processor(torch.tensor([[0]]), scores)
    ids, _ = candidates(logits, row(len(logits), **sampling).sampling)
    assert ids.tolist() == np.flatnonzero(np.isfinite(scores[0].numpy())).tolist()


def test_ties_all_survive_top_k_and_from_the_lowest_id_on_top_p():
    logits = np.array([1, 0, 1, 2, 1, 1], np.float32)
    ids, _ = candidates(logits, Sampling(temperature=1.0, top_k=2))
    assert ids.tolist() == [0, 2, 3, 4, 5]
    # The 2 holds 0.38 of the whole, each 1 holds 0.14: it takes two of them.
    ids, weights = candidates(logits, Sampling(temperature=1.0, top_p=0.6))
    assert ids.tolist() == [0, 2, 3]
    np.testing.assert_allclose(weights, np.exp([-1, -1, 0]))


def test_repetition_penalty_counts_prompt_and_completion():
    logits = np.array([2.0, -2.0, 2.0, -2.0, 0.0], np.float32)
    state = row(5, [0, 0], [1], repetition_penalty=2.0)
    assert state.penalised(logits).tolist() == [1.0, -4.0, 2.0, -2.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 2.0, -2.0, 0.0]


def test_presence_and_frequency_penalties_count_the_completion_alone():
    logits = np.zeros(4, np.float32)
    state = row(4, [3, 3], [1, 2, 2], presence_penalty=0.5, frequency_penalty=0.25)
    assert state.penalised(logits).tolist() == [0.0, -0.75, -1.0, 0.0]
    state.record(1)
    assert state.penalised(logits).tolist() == [0.0, -1.0, -1.0, 0.0]


def test_repetition_penalty_goes_before_the_others():
    logits = np.array([4.0, 0.0], np.float32)
    state = row(2, [], [0], repetition_penalty=2.0, presence_penalty=1.0)
    assert state.penalised(logits).tolist() == [1.0, 0.0]


def test_prompt_tokens_beyond_the_logits_are_ignored():
    assert row(4, [1, 4, 9000], repetition_penalty=2.0).penalised(np.ones(4, np.float32)).tolist() == [1, 0.5, 1, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie(dtype):
    logits = np.array([[0, 3, 1, 3], [5, 0, 5, 5], [-9, -8, -7, -6]], dtype)
    assert choose(logits, [row(4), row(4), row(4)]).tolist() == [1, 0, 3]


def test_greedy_obeys_penalties():
    logits = np.array([[5.0, 4.0, 0.0]], np.float32)
    assert choose(logits, [row(3, [0], repetition_penalty=1.5)]).tolist() == [1]


def test_draws_follow_the_distribution():
    logits = np.array([2.0, 0.0, 1.0, -1.0, 1.5, -np.inf, 0.5, -3.0], np.float32)
    state = row(8, temperature=0.9, seed=20)
    draws = 20_000
    counts = np.zeros(8, np.int64)
    for position in range(draws):
        state.position = position
        counts[choose(logits[None], [state])[0]] += 1
    weights = np.exp(logits.astype(np.float64) / 0.9)
    expected = draws * weights / weights.sum()
    live = expected > 0
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum()
    assert counts[5] == 0
    assert statistic < 16.81  # the 99 % point of chi-squared with 6 degrees of freedom; the seed is fixed


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_draws_the_same_alone_and_in_any_batch(data):
    width = 300
    rows, logits = [], []
    for number in range(data.draw(st.integers(2, 6))):
        sampling = data.draw(options)
        sampling["temperature"] = data.draw(st.sampled_from([0.0, sampling["temperature"]]))
        rows.append(row(width, PROMPT, COMPLETION[:number], seed=data.draw(st.integers(0, 2**64 - 1)), **sampling))
        logits.append(draw_logits(number, width, 0.0))
    batch = np.stack(logits)
    alone = [int(choose(batch[number : number + 1], [rows[number]])[0]) for number in range(len(rows))]
    order = data.draw(st.permutations(range(len(rows))))
    together = choose(batch[list(order)], [rows[number] for number in order])
    assert together.tolist() == [alone[number] for number in order]


def test_choose_changes_no_row():
    logits = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32)
    before = logits.copy()
    state = row(50, PROMPT, COMPLETION, temperature=5.0, repetition_penalty=1.2, frequency_penalty=0.3)
    assert len({int(choose(logits, [state])[0]) for _ in range(5)}) == 1
    assert state.position == len(COMPLETION)
    assert (logits == before).all()


def test_seed_index_and_position_all_matter():
    keys = [(seed, index, position) for seed in (0, 1, 2**64 - 1) for index in (0, 1) for position in (0, 1, 2)]
    assert len({uniform(*key) for key in keys}) == len(keys)


def test_the_generator_never_changes():
    # A completion must be repeatable from its seed by every later version, of numpy as well.
    for key in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (2**64 - 1, 3, 10_000)):
        assert uniform(*key) == philox(*key)


def philox(seed, index, position):
    """Philox4x64-10 from its paper, counter and key in whole numbers; numpy counts up before it draws."""
    mask = 2**64 - 1
    counter, key = [position + 1, 0, 0, 0], [seed, index]
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return (counter[0] >> 11) / 2**53


def test_the_largest_uniform_still_falls_on_a_token(monkeypatch):
    monkeypatch.setattr("fmedge_runtimes.sampler.uniform", lambda *_: 1 - 2**-53)
    logits = np.full((1, 1000), -2.0, np.float32)
    logits[0, -100:] = -np.inf
    logits[0, 3] = 0.3
    assert choose(logits, [row(1000, temperature=1.0)]).tolist() == [899]
    monkeypatch.setattr("fmedge_runtimes.sampler.uniform", lambda *_: 0.0)
    logits[0, :2] = -np.inf
    assert choose(logits, [row(1000, temperature=1.0)]).tolist() == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0.0, np.nan, 1.0], "1 are NaN"),
        ([0.0, np.inf, 1.0], "1 are infinite"),
        ([-np.inf, -np.inf, -np.inf], "-inf"),
    ],
)
def test_unusable_logits_fail_their_own_row_only(temperature, bad, words):
    logits = np.array([[0, 0, 50], bad, [50, 0, 0]], np.float32)
    rows = [row(3, temperature=temperature) for _ in range(3)]
    assert choose(logits, rows).tolist() == [2, NO_TOKEN, 0]
    error = fault(logits[1], rows[1])
    assert isinstance(error, BackendError)
    assert words in str(error)


def test_penalties_that_overflow_are_named():
    logits = np.array([[1.0, 2.0]], np.float32)
    state = row(2, [0], repetition_penalty=1e-300)
    assert choose(logits, [state]).tolist() == [NO_TOKEN]
    assert "repetition_penalty 1e-300" in str(fault(logits[0], state))


@pytest.mark.parametrize(("temperature", "tokens"), [(1e-300, {1}), (1e300, {0, 1, 2})])
def test_extreme_temperatures_are_the_limits(temperature, tokens):
    logits = np.array([[1.0, 1.5, -1.0, -np.inf]], np.float32)
    found = set()
    for seed in range(40):
        found.add(int(choose(logits, [row(4, temperature=temperature, seed=seed)])[0]))
    assert found == tokens


def test_float16_logits_are_drawn_from_as_their_float32_values():
    logits = np.random.default_rng(3).normal(0, 2, (4, 200)).astype(np.float16)
    rows = [row(200, temperature=1.0, top_k=20, top_p=0.9, seed=seed) for seed in range(4)]
    assert choose(logits, rows).tolist() == choose(logits.astype(np.float32), rows).tolist()


def test_rows_and_logits_must_match():
    with pytest.raises(ValueError, match="2 rows of logits for 1 rows"):
        choose(np.zeros((2, 4), np.float32), [row(4)])


def test_fresh_seeds_are_valid_and_differ():
    seeds = {fresh_seed() for _ in range(50)}
    assert len(seeds) == 50
    assert all(Sampling(seed=seed).seed == seed and float(seed) == seed for seed in seeds)
