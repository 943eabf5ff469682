"""The learning rate and the budget it follows."""

from itertools import pairwise

import pytest

from fmedge.training.schedule import WARMUP, Budget, Stopwatch, learning_rate_factor


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    factors = [learning_rate_factor(step / 1000) for step in range(1001)]
    peak = round(WARMUP * 1000)
    assert factors[0] > 0
    assert factors[peak] == pytest.approx(1.0)
    assert factors[-1] == 0
    assert all(one < two for one, two in pairwise(factors[: peak + 1]))
    assert all(one > two for one, two in pairwise(factors[peak:]))


def test_a_budget_is_used_up_by_its_own_measure():
    assert Budget(steps=10).fraction(steps=4, seconds=1e9) == 0.4
    assert Budget(minutes=2).fraction(steps=10**9, seconds=30) == 0.25
    assert Budget(steps=10).fraction(steps=11, seconds=0) == 1.0
    assert Budget(minutes=2).fraction(steps=0, seconds=121) == 1.0


def test_a_stopwatch_goes_on_from_the_time_before(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch = Stopwatch(before=7.0)
    now = 150.0
    watch.start()
    now = 153.0
    assert watch.seconds == 10.0
