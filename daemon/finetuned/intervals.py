"""How sure a figure is that was measured on some rows. Pure: counts and sums in, 95% intervals and chances out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

_Z = 1.959963984540054  # the normal distribution holds 95% within so many standard deviations

_LARGEST = 700.0  # whose exponential is still a number
_NOTHING = 1e-18  # of a sum, which no float tells


class Interval(NamedTuple):
    """A figure, and where with 95% confidence the true one lies. The ends are None where one row tells nothing."""

    value: float
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, Any]:
        """Give it as it is stored."""
        return {name: part if part is None else round(part, 6) for name, part in self._asdict().items()}


def share(count: int, of: int) -> Interval:
    """Give the share that `count` is `of` so many rows, at least 1, with Wilson's score interval.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22, 1927. It holds for
    few rows and for shares near 0 and 1, where the usual one does not.
    """
    p, z = count / of, _Z
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    wide = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return Interval(p, max(0.0, min(p, middle - wide)), min(1.0, max(p, middle + wide)))


def mean_loss(rows: Sequence[tuple[float, int]]) -> Interval:
    """Give the mean loss a token of rows that each have a summed loss and a number of tokens, at least 1.

    The tokens of a row stand together, so rows are what is drawn: with loss L and tokens T of each of n rows,
    R = sum L / sum T, and its variance is n / (n - 1) * sum (L - R T)^2 / (sum T)^2.
    Source: Cochran, Sampling Techniques, 1977, 2.11 (ratio estimates); Miller, Adding Error Bars to Evals,
    arXiv:2411.00640, 2.2 (clusters).
    """
    total = sum(tokens for _, tokens in rows)
    ratio = sum(loss for loss, _ in rows) / total
    if len(rows) < 2:
        return Interval(ratio, None, None)
    squares = sum((loss - ratio * tokens) ** 2 for loss, tokens in rows)
    wide = _Z * math.sqrt(len(rows) / (len(rows) - 1) * squares) / total
    return Interval(ratio, max(0.0, ratio - wide), ratio + wide)


def perplexity(loss: Interval) -> Interval:
    """Give e to the power of a loss in nats, ends included."""
    low, high = (None if end is None else math.exp(min(end, _LARGEST)) for end in (loss.low, loss.high))
    return Interval(math.exp(min(loss.value, _LARGEST)), low, high)


def sign_test(wins: int, losses: int) -> float:
    """Give the chance that two equally good models differ at least so much: two-sided, without ties, to ten digits.

    Source: Dixon and Mood, The Statistical Sign Test, JASA 41, 1946. Of n = wins + losses, twice the sum of
    C(n, k) / 2^n over k up to the smaller one: its last term by logarithms, as 2^n is no number for a thousand, and
    those before it by C(n, k - 1) = C(n, k) * k / (n - k + 1), until they add nothing.
    """
    n, fewer = wins + losses, min(wins, losses)
    last = math.lgamma(n + 1) - math.lgamma(fewer + 1) - math.lgamma(n - fewer + 1) - n * math.log(2)
    terms, added = 1.0, 1.0  # as multiples of the last
    for k in range(fewer, 0, -1):
        added *= k / (n - k + 1)
        if added < _NOTHING * terms:
            break
        terms += added
    return min(1.0, 2 * terms * math.exp(last))
