"""Sampling: against transformers' processors, against the distribution it should draw from, and row by row."""

import itertools

import numpy as np
import pytest
import torch
from fmedge_runtimes.best_of import BestOf
from fmedge_runtimes.candidates import candidates, draw, largest
from fmedge_runtimes.completion import Completion, Stats
from fmedge_runtimes.errors import BackendError, RequestError
from fmedge_runtimes.sampler import NO_TOKEN, Row, choose, fault, fresh_seed, logprob_of, uniforms
from fmedge_runtimes.sampling import Sampling
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

PROMPT = [3, 5, 5, 11]
COMPLETION = [7, 5, 7, 7]
EOS = 2

options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.5, 1.0, 1.7, 10.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 40, 1000]),
        "top_p": st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 0.95]),
        "typical_p": st.sampled_from([0.05, 0.5, 0.9, 1.0, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3]),
        "logit_bias": st.dictionaries(st.integers(0, 15), st.sampled_from([-100.0, -1.5, 0.25, 4.0]), max_size=3),
        "banned_tokens": st.lists(st.integers(0, 15), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 15), max_size=2),
        "min_new_tokens": st.sampled_from([0, len(COMPLETION), len(COMPLETION) + 1]),
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


def row(vocabulary, prompt=(), completion=(), *, seed=1, index=0, eos=(), **sampling):
    made = Row(Sampling(**sampling), vocabulary=vocabulary, seed=seed, index=index, prompt=prompt, eos=eos)
    for token in completion:
        made.record(token)
    return made


def reference_processors(sampling):
    """What transformers' _get_logits_processor would make of the options, in its order: processors, then warpers."""
    processors = []
    if sampling["logit_bias"]:
        processors.append(
            SequenceBiasLogitsProcessor({(token,): bias for token, bias in sampling["logit_bias"].items()})
        )
    if sampling["repetition_penalty"] != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling["repetition_penalty"]))
    if sampling["banned_tokens"]:
        processors.append(NoBadWordsLogitsProcessor([[token] for token in sampling["banned_tokens"]]))
        processors.append(SuppressTokensLogitsProcessor(sampling["banned_tokens"]))
    if sampling["min_new_tokens"]:
        ends = [EOS, *sampling["stop_token_ids"]]
        processors.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), sampling["min_new_tokens"], ends))
    warpers = [TemperatureLogitsWarper(sampling["temperature"])]
    if sampling["top_k"]:
        warpers.append(TopKLogitsWarper(sampling["top_k"]))
    if sampling["top_p"] < 1.0:
        warpers.append(TopPLogitsWarper(sampling["top_p"]))
    if sampling["min_p"] > 0.0:
        warpers.append(MinPLogitsWarper(sampling["min_p"]))
    if sampling["typical_p"] < 1.0:
        warpers.append(TypicalLogitsWarper(sampling["typical_p"]))
    return processors, warpers


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
        gaps = values[values.isfinite()].sort().values.diff()
        return bool(((gaps > 0) & (gaps < 1e-9)).any())
    if isinstance(processor, TypicalLogitsWarper):
        logs = values[values.isfinite()].log_softmax(-1)
        distance, order = (logs + (logs.exp() * -logs).sum()).abs().sort()
        gaps, held = distance.diff(), logs.exp()[order].cumsum(-1)
        return bool(((gaps > 0) & (gaps < 1e-9)).any() | ((held - processor.mass).abs() < 1e-9).any())
    return False


NEUTRAL = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "banned_tokens": [],
    "stop_token_ids": [],
    "min_new_tokens": 0,
}


@settings(max_examples=400, deadline=None)
@given(logits_rows, options)
@example(np.zeros(100, np.float32), NEUTRAL | {"top_k": 5, "top_p": 0.305})
@example(draw_logits(1, 100, 0.0), NEUTRAL | {"typical_p": 0.3})
@example(draw_logits(2, 16, 0.0), NEUTRAL | {"logit_bias": {3: 2.0}, "repetition_penalty": 2.0})
def test_candidates_are_those_of_transformers(logits, sampling):
    # In float64, because float32 is off by more than 1e-6 itself where logits are large and the temperature is low.
    scores = torch.from_numpy(logits)[None].double()
    seen = torch.tensor([PROMPT + COMPLETION])
    processors, warpers = reference_processors(sampling)
    for processor in processors:
        scores = processor(seen, scores).float().double()  # adjusted logits are float32, as logits are
    state = row(len(logits), PROMPT, COMPLETION, eos=[EOS], **sampling)
    adjusted = state.adjusted(logits)
    np.testing.assert_array_equal(adjusted, scores[0].float().numpy())
    for warper in warpers:
        assume(not is_borderline(scores, warper))
        scores = warper(seen, scores)
    wanted = scores[0].softmax(-1).numpy()

    ids, weights = candidates(adjusted, state.sampling)
    # What weighs nothing cannot be drawn, whether it survives or not.
    ids, weights = ids[weights > 0], weights[weights > 0]
    survivors = np.flatnonzero(np.exp(scores[0].numpy() - scores[0].max().item()) > 0)
    assert np.sort(adjusted[ids]).tolist() == np.sort(adjusted[survivors]).tolist()
    if not sampling["top_p"] < 1.0:
        assert ids.tolist() == survivors.tolist()
    else:
        # Of tokens that tie at the border, torch's sort decides which survive; all above the border must agree.
        border = adjusted[ids].min()
        above = adjusted > border
        assert ids[above[ids]].tolist() == survivors[above[survivors]].tolist()
    np.testing.assert_allclose(np.sort(weights / weights.sum()), np.sort(wanted[survivors]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.8, 4.0])
@pytest.mark.parametrize("typical_p", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 50, 3000])
@pytest.mark.parametrize("top_p", [0.02, 0.9, 1.0])
def test_a_large_vocabulary_is_truncated_exactly(top_k, top_p, typical_p, temperature):
    logits = np.random.default_rng(7).normal(0, 2.5, 152_064).astype(np.float32)
    sampling = NEUTRAL | {"temperature": temperature, "top_k": top_k, "top_p": top_p, "typical_p": typical_p}
    scores = torch.from_numpy(logits)[None].double()
    for warper in reference_processors(sampling)[1]:
        scores = warper(torch.tensor([[0]]), scores)
    ids, weights = candidates(logits, row(len(logits), **sampling).sampling)
    wanted = scores[0].softmax(-1).numpy()
    # Weights of many tokens are float32, which moves a border by a token or two.
    differing = np.setxor1d(ids, np.flatnonzero(wanted))
    assert len(differing) <= (2 if len(ids) > 4096 else 0)
    found = np.zeros(len(logits))
    found[ids] = weights / weights.sum()
    assert np.abs(found - wanted).sum() < 1e-4
    np.testing.assert_allclose(found[ids], wanted[ids], rtol=1e-5, atol=2e-6)


@settings(max_examples=200, deadline=None)
@given(logits_rows, st.sampled_from([1, 2, 5, 9, 11, 40, 1000]), st.sampled_from([0.0, 0.2, 0.99]))
def test_the_largest_are_all_that_reach_the_kth(logits, k, impossible):
    # As a constraint leaves them.
    logits[np.random.default_rng(0).random(len(logits)) < impossible] = -np.inf
    k = min(k, len(logits))
    kth = np.sort(logits)[-k]
    assert largest(logits, k).tolist() == np.flatnonzero((logits >= kth) & (logits > -np.inf)).tolist()


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
    assert state.adjusted(logits).tolist() == [1.0, -4.0, 2.0, -2.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 2.0, -2.0, 0.0]


def test_presence_and_frequency_penalties_count_the_completion_alone():
    logits = np.zeros(4, np.float32)
    state = row(4, [3, 3], [1, 2, 2], presence_penalty=0.5, frequency_penalty=0.25)
    assert state.adjusted(logits).tolist() == [0.0, -0.75, -1.0, 0.0]
    state.record(1)
    assert state.adjusted(logits).tolist() == [0.0, -1.0, -1.0, 0.0]


def test_repetition_penalty_goes_before_the_others():
    logits = np.array([4.0, 0.0], np.float32)
    state = row(2, [], [0], repetition_penalty=2.0, presence_penalty=1.0)
    assert state.adjusted(logits).tolist() == [1.0, 0.0]


def test_prompt_tokens_beyond_the_logits_are_ignored():
    assert row(4, [1, 4, 9000], repetition_penalty=2.0).adjusted(np.ones(4, np.float32)).tolist() == [1, 0.5, 1, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie(dtype):
    logits = np.array([[0, 3, 1, 3], [5, 0, 5, 5], [-9, -8, -7, -6]], dtype)
    assert choose(logits, [row(4), row(4), row(4)]).tolist() == [1, 0, 3]


def test_greedy_obeys_penalties():
    logits = np.array([[5.0, 4.0, 0.0]], np.float32)
    assert choose(logits, [row(3, [0], repetition_penalty=1.5)]).tolist() == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.9},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 1.0, "typical_p": 0.7},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.0, "logit_bias": {0: -2.0, 7: 4.0}, "banned_tokens": [2]},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(changes):
    logits = np.array([2.0, 0.0, 1.0, -1.0, 1.5, -np.inf, 0.5, -3.0], np.float32)
    sampling = NEUTRAL | changes
    scores = torch.from_numpy(logits)[None]
    for processor in itertools.chain(*reference_processors(sampling)):
        scores = processor(torch.tensor([[0, 3]]), scores)
    state = row(8, [0, 3], **sampling, seed=20)
    draws = 10_000
    counts = np.zeros(8, np.int64)
    for position in range(draws):
        state.position = position
        counts[choose(logits[None], [state])[0]] += 1
    expected = draws * scores[0].softmax(-1).numpy()
    live = expected > 0
    assert counts[~live].sum() == 0
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum()
    # The 99 % points of chi-squared with 1 to 6 degrees of freedom; the seed is fixed.
    assert statistic < (6.63, 9.21, 11.34, 13.28, 15.09, 16.81)[live.sum() - 2]


def test_draws_from_a_vocabulary_follow_the_distribution():
    # Long enough to be searched in runs; the last run is short.
    logits = np.random.default_rng(3).normal(0, 1.5, 5000).astype(np.float32)
    sampling = Sampling(temperature=1.3)
    shares = torch.from_numpy(logits / 1.3).double().softmax(-1).numpy()
    held = np.cumsum(shares)
    for at in np.random.default_rng(4).random(3000):
        assert draw(logits, sampling, at) == np.searchsorted(held, at, side="right")
    # All tokens of a run but one are impossible.
    logits[256:512] = -np.inf
    logits[400] = 30.0
    assert {draw(logits, sampling, at) for at in (0.1, 0.5, 0.999)} == {400}


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
    assert len({uniforms(*key)[0] for key in keys}) == len(keys)


def test_the_generator_never_changes():
    # A completion must be repeatable from its seed by every later version, of numpy as well.
    for key in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (2**64 - 1, 3, 10_000)):
        state = row(8, seed=key[0], index=key[1])
        state.position = key[2]
        assert state.uniform() == philox(*key)


def test_numbers_taken_ahead_are_those_of_their_positions():
    state = row(8, seed=5, index=1)
    for position in [*range(200), 3, 150, 149, 10_000, 64, 0]:
        state.position = position
        assert state.uniform() == philox(5, 1, position)


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


@pytest.mark.parametrize("width", [1000, 5000])
@pytest.mark.parametrize("top_k", [0, 900])
def test_the_largest_uniform_still_falls_on_a_token(width, top_k):
    sampling = Sampling(temperature=1.0, top_k=top_k)
    logits = np.full(width, -2.0, np.float32)
    logits[-100:] = -np.inf
    logits[3] = 0.3
    assert draw(logits, sampling, 1 - 2**-53) == width - 101
    logits[:2] = -np.inf
    assert draw(logits, sampling, 0.0) == 2


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


def test_forced_tokens_come_first_and_take_no_draw():
    logits = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32)
    logits[0, 9] = -np.inf
    forced, free = (row(50, temperature=1.0, forced_tokens=tokens) for tokens in ([9, 4], []))
    assert [step(logits, forced) for _ in range(2)] == [9, 4]
    assert [step(logits, free) for _ in range(2)] != [9, 4]
    assert [step(logits, forced) for _ in range(9)] == [step(logits, free) for _ in range(9)]


def step(logits, state):
    (token,) = choose(logits, [state])
    state.record(int(token))
    return int(token)


def test_banned_tokens_and_early_ends_never_come():
    logits = np.array([[9.0, 8.0, 7.0, 6.0]], np.float32)
    state = row(4, eos=[1], banned_tokens=[0], stop_token_ids=[2], min_new_tokens=2)
    assert [step(logits, state) for _ in range(3)] == [3, 3, 1]
    assert [state.ends(token) for token in range(4)] == [None, "eos", "stop", None]
    ignoring = row(4, eos=[0], ignore_eos=True, min_new_tokens=2)
    assert step(logits, ignoring) == 0
    assert ignoring.ends(0) is None


def test_a_row_with_all_tokens_banned_says_so():
    logits = np.zeros((2, 3), np.float32)
    rows = [row(3, banned_tokens=[0, 1], eos=[2], min_new_tokens=1, temperature=1.0), row(3)]
    assert choose(logits, rows).tolist() == [NO_TOKEN, 0]
    error = fault(logits[0], rows[0])
    assert isinstance(error, RequestError)
    assert "no token is left at position 0" in str(error)


def test_seen_tokens_are_kept_in_arrays_that_grow():
    logits = np.full(1000, 2.0, np.float32)
    state = row(1000, [1, 2, 3, 1], range(100, 500), repetition_penalty=2.0, frequency_penalty=0.25)
    state.record(100)
    adjusted = state.adjusted(logits)
    assert adjusted[[0, 1, 3, 100, 101, 499, 500]].tolist() == [2.0, 1.0, 1.0, 0.5, 0.75, 0.75, 2.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@settings(max_examples=60, deadline=None)
@given(logits_rows, st.integers(0, 15), st.sampled_from([0, 1, 5, 1000]))
def test_logprobs_are_those_of_the_model(dtype, logits, token, top):
    logits = logits.astype(dtype)
    wanted = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    found = logprob_of(logits, token, top)
    assert found.token == token
    assert abs(found.logprob - wanted[token]) < 1e-5
    order = sorted(range(len(logits)), key=lambda one: (-logits[one], one))[:top]
    assert [one for one, _ in found.top] == order
    np.testing.assert_allclose([logprob for _, logprob in found.top], wanted[order], rtol=0, atol=1e-5)


def completion(index, logprob, tokens, error=None):
    return Completion(
        0, index, "", (1,) * tokens, "length", 7, Stats(1, tokens, 0, 0, 0), error, cumulative_logprob=logprob
    )


@pytest.mark.parametrize(
    ("length_penalty", "order"), [(1.0, [(3, -4.0), (1, -3.0), (2, -3.5)]), (0.0, [(1, -3.0), (2, -3.5), (3, -4.0)])]
)
def test_the_best_are_those_of_highest_logprob(length_penalty, order):
    best = BestOf(Sampling(temperature=1.0, n=3, best_of=5, length_penalty=length_penalty))
    for one in (completion(3, -4.0, 4), completion(0, None, 0, RequestError("no")), completion(1, -3.0, 2)):
        assert best.add(one) == []
    assert best.add(completion(4, -9.0, 2)) == []
    found = best.add(completion(2, -3.5, 2))
    assert [one.index for one in found] == [0, 1, 2]
    assert [one.cumulative_logprob for one in found] == [logprob for _, logprob in order]


def test_a_failed_completion_is_better_than_none():
    best = BestOf(Sampling(temperature=1.0, n=2, best_of=2))
    best.add(completion(0, None, 0, RequestError("no")))
    assert [one.error is None for one in best.add(completion(1, -3.0, 2))] == [True, False]
