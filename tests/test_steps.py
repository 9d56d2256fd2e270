"""Which rows each optimizer step sees, and how a step is cut."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetuned.trainer.steps import Bound, Plan, cut, cut_for_all, deal, largest_cut, learning_rate, plan_steps

sizes = st.integers(1, 60)
batches = st.integers(1, 17)
seeds = st.integers(0, 2**31 - 1)
epochs = st.floats(0.05, 4, allow_nan=False)
lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def plan_of(examples: int, effective_batch: int, *, epochs: float = 1, max_steps: int | None = None, seed: int = 0):
    return plan_steps(examples, effective_batch=effective_batch, epochs=epochs, max_steps=max_steps, seed=seed)


@given(sizes, batches, seeds, st.integers(1, 4))
@example(examples=8, batch=8, seed=0, rounds=2)
def test_every_epoch_sees_each_example_exactly_once(examples, batch, seed, rounds):
    plan = plan_of(examples, batch, epochs=rounds, seed=seed)
    assert plan.total_steps == rounds * math.ceil(examples / batch)
    for epoch in range(rounds):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = Counter(row for number in steps for row in plan.step(number))
        assert seen == Counter(range(examples))


@given(sizes, batches, seeds, epochs)
def test_no_step_is_empty_or_larger_than_the_effective_batch(examples, batch, seed, rounds):
    plan = plan_of(examples, batch, epochs=rounds, seed=seed)
    steps = [plan.step(number) for number in range(plan.total_steps)]
    assert all(1 <= len(rows) <= batch for rows in steps)
    # Only the last step of an epoch may be short.
    short = [number for number, rows in enumerate(steps) if len(rows) < min(batch, examples)]
    assert all((number + 1) % plan.steps_per_epoch == 0 for number in short)


@given(sizes, batches, seeds)
def test_the_same_seed_gives_the_same_plan(examples, batch, seed):
    first, second = (plan_of(examples, batch, epochs=2, seed=seed) for _ in range(2))
    # Asked out of order, as after a resume.
    backwards = {number: second.step(number) for number in reversed(range(second.total_steps))}
    assert {number: first.step(number) for number in range(first.total_steps)} == backwards


def test_another_seed_and_another_epoch_give_another_order():
    def order(plan: Plan, epoch: int) -> tuple[int, ...]:
        return tuple(row for n in range(plan.steps_per_epoch) for row in plan.step(epoch * plan.steps_per_epoch + n))

    orders = {order(plan_of(40, 8, epochs=2, seed=seed), epoch) for seed in range(5) for epoch in range(2)}
    assert len(orders) == 10


bounds = st.builds(Bound, st.integers(1, 12), st.integers(0, 400), st.booleans())


@given(lengths, bounds)
def test_cut_gives_every_row_once_longest_first_within_the_bound(lengths, bound):
    rows = list(reversed(range(len(lengths))))
    parts = cut(rows, lengths, bound)
    flat = [row for part in parts for row in part]
    assert sorted(flat) == sorted(rows)
    assert [lengths[row] for row in flat] == sorted(lengths, reverse=True)
    for part in parts:
        assert 1 <= len(part) <= bound.rows
        assert len(part) == 1 or not bound.tokens or bound.size(part, lengths) <= bound.tokens


@given(lengths, st.integers(1, 12))
def test_without_a_bound_on_tokens_there_are_as_few_parts_as_can_be(lengths, most_rows):
    assert len(cut(list(range(len(lengths))), lengths, Bound(most_rows))) == math.ceil(len(lengths) / most_rows)


@given(lengths, bounds)
def test_half_the_bound_is_never_larger(lengths, bound):
    rows = list(range(len(lengths)))
    half = Bound(max(1, bound.rows // 2), bound.tokens and max(1, bound.tokens // 2), bound.padded)
    whole, halved = (max(b.size(part, lengths) for part in cut(rows, lengths, b)) for b in (bound, half))
    assert halved <= whole


ranks = st.integers(1, 9)


@given(lengths, ranks)
@example(lengths=[7], ranks=3)
def test_every_row_is_dealt_to_one_rank_and_none_has_more_than_a_row_too_many(lengths, ranks):
    rows = list(range(len(lengths)))
    shares = deal(rows, lengths, ranks)
    assert len(shares) == ranks
    assert sorted(row for share in shares for row in share) == rows
    tokens = [sum(lengths[row] for row in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert shares[0], "rank 0 speaks for all"


@given(lengths, ranks, st.randoms())
def test_how_rows_are_dealt_follows_from_the_rows_alone(lengths, ranks, random):
    rows = list(range(len(lengths)))
    other = random.sample(rows, len(rows))
    assert deal(other, lengths, ranks) == deal(rows, lengths, ranks) or ranks == 1


@given(st.integers(1, 50), st.integers(1, 9), ranks)
def test_rows_of_one_length_are_dealt_evenly(length, each, ranks):
    shares = deal(list(range(each * ranks)), [length] * (each * ranks), ranks)
    assert [len(share) for share in shares] == [each] * ranks


@given(lengths, bounds, ranks)
def test_ranks_cut_their_shares_within_the_bound(lengths, bound, ranks):
    rows = list(range(len(lengths)))
    parts = cut_for_all(rows, lengths, bound, ranks)
    assert sorted(row for part in parts for row in part) == rows
    assert all(bound.allows(part, lengths) for part in parts)


def test_padding_counts_where_there_is_any():
    lengths = [10, 2, 2]
    assert cut([0, 1, 2], lengths, Bound(8, tokens=14)) == [[0, 1, 2]]
    assert cut([0, 1, 2], lengths, Bound(8, tokens=14, padded=True)) == [[0], [1, 2]]


@given(lengths, batches, bounds, epochs, seeds, ranks)
def test_no_micro_batch_of_the_training_is_larger_than_the_largest_cut(  # noqa: PLR0917, hypothesis gives them by name
    lengths, batch, bound, rounds, seed, ranks
):
    plan = plan_of(len(lengths), batch, epochs=rounds, seed=seed)
    every = [part for n in range(plan.total_steps) for part in cut_for_all(plan.step(n), lengths, bound, ranks)]
    largest = largest_cut(plan, lengths, bound, ranks)
    assert largest in every
    assert bound.size(largest, lengths) == max(bound.size(part, lengths) for part in every)


@given(sizes, batches, epochs, st.none() | st.integers(1, 200))
def test_the_number_of_steps_follows_epochs_and_stops_at_max_steps(examples, batch, rounds, most):
    per_epoch = math.ceil(examples / batch)
    plan = plan_of(examples, batch, epochs=rounds, max_steps=most)
    assert 1 <= plan.total_steps <= max(1, math.ceil(per_epoch * rounds))
    assert plan.total_steps >= min(per_epoch * rounds - 1e-6, most or math.inf)
    assert most is None or plan.total_steps <= most


@pytest.mark.parametrize(
    ("examples", "batch", "rounds", "most", "steps"),
    [
        (24, 8, 1, None, 3),
        (25, 8, 1, None, 4),  # the last step of the epoch has one row
        (24, 8, 0.5, None, 2),  # a started step is a whole one
        (24, 8, 1.5, None, 5),
        (25, 1, 0.28, None, 7),  # 7.000000000000001 in floats
        (3, 8, 0.01, None, 1),  # never none at all
        (24, 8, 3, 2, 2),
        (24, 8, 1, 99, 3),
    ],
)
def test_fractional_epochs_and_max_steps(examples, batch, rounds, most, steps):
    assert plan_of(examples, batch, epochs=rounds, max_steps=most).total_steps == steps


def test_epochs_done():
    plan = plan_of(25, 8, epochs=2)
    assert [plan.epoch_after(steps) for steps in (0, 1, 3, 4, 5, 8)] == [0, 0.32, 0.96, 1, 1.32, 2]


def test_the_fingerprint_tells_plans_apart():
    plan = plan_of(24, 8, seed=1)
    others = [replace(plan, examples=23), replace(plan, effective_batch=4), replace(plan, seed=2)]
    assert len({plan.fingerprint(), *(other.fingerprint() for other in others)}) == 4
    assert plan_of(24, 8, seed=1).fingerprint() == plan.fingerprint()


@given(st.integers(1, 300), st.floats(0, 1), st.floats(1e-6, 1))
def test_the_learning_rate_rises_to_its_peak_and_falls_from_it(total, ratio, peak):
    rates = [learning_rate(step, total_steps=total, warmup_ratio=ratio, peak=peak) for step in range(total)]
    warmup = math.ceil(ratio * total)
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == pytest.approx(peak)


def test_the_learning_rate_in_numbers():
    rates = [learning_rate(step, total_steps=12, warmup_ratio=0.3, peak=1.0) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0  # the cosine begins at the peak
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, total_steps=1, warmup_ratio=0, peak=0.1) == 0.1
