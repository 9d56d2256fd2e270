"""Intervals and chances: known values, and what must hold of all of them."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetuned.intervals import Interval, mean_loss, perplexity, share, sign_test


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (31, 40, 0.6250, 0.8768), (81, 263, 0.2553, 0.3662)],
)
def test_a_share_has_wilson_s_interval(count, of, low, high):
    """The last is Newcombe's example (Statistics in Medicine 17, 1998, table I)."""
    found = share(count, of)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 10**6).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_a_share_lies_in_its_interval_and_that_between_0_and_1(case):
    found = share(*case)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_a_loss_has_an_interval_that_holds_the_true_one_nineteen_times_of_twenty():
    draws = random.Random(3)
    held = 0
    for _ in range(400):
        rows = []
        for _ in range(60):
            tokens = draws.randint(1, 40)
            rows.append((tokens * (2.0 + draws.gauss(0, 0.8)), tokens))  # rows differ, tokens of one are alike
        found = mean_loss(rows)
        held += found.low <= 2.0 <= found.high
    assert 0.91 <= held / 400 <= 0.98


def test_a_loss_counts_tokens_and_one_row_has_no_interval():
    assert mean_loss([(2.0, 1), (1.0, 2)]).value == 1.0
    assert mean_loss([(3.0, 2)]) == Interval(1.5, None, None)
    assert perplexity(Interval(0.0, None, 1.0)) == Interval(1.0, None, math.e)


@pytest.mark.parametrize(
    ("wins", "losses", "chance"), [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 64), (8, 2, 112 / 1024), (5, 5, 1.0)]
)
def test_the_sign_test_is_exact_and_two_sided(wins, losses, chance):
    assert sign_test(wins, losses) == pytest.approx(chance)
    assert sign_test(losses, wins) == sign_test(wins, losses)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
@example(1001, 999)
@example(0, 1000)
def test_the_sign_test_is_that_of_whole_numbers(wins, losses):
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    assert sign_test(wins, losses) == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2**n))), rel=1e-10)


@pytest.mark.parametrize("wins", [50_000, 50_100, 50_500, 51_000])
def test_the_sign_test_of_a_hundred_thousand_rows_is_that_of_the_normal_distribution(wins):
    """Which whole numbers would take minutes to tell."""
    n = 100_000
    normal = math.erfc((wins - n / 2 - 0.5) / math.sqrt(n / 2)) if wins > n / 2 else 1.0
    assert sign_test(wins, n - wins) == pytest.approx(normal, rel=2e-3)


def test_a_chance_that_no_float_holds_is_none():
    assert sign_test(100_000, 0) == 0.0
