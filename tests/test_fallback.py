"""The ladder against out-of-memory."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from finetuned.fallback import SHORTEST_ROW, Rung, next_rung

rungs = st.builds(
    Rung,
    batch_size=st.integers(1, 200),
    gradient_accumulation=st.integers(1, 50),
    activation_checkpointing=st.booleans(),
    tuning=st.sampled_from(["full", "lora", "lora-8bit", "qlora"]),
    max_length=st.integers(16, 20_000),
)


def ladder(rung: Rung, **allowed: bool) -> list[Rung]:
    """All rungs from this one to the foot."""
    rungs = [rung]
    while step := next_rung(rungs[-1], **allowed):
        rungs.append(step[0])
        assert len(rungs) < 100, "the ladder has no foot"
    return rungs


@given(rungs, st.booleans(), st.booleans())
@example(rung=Rung(3, 2, False, "lora", 512), bits=True, shorter=True)
def test_every_rung_keeps_the_rows_of_a_step(rung, bits, shorter):
    steps = ladder(rung, allow_4bit=bits, allow_shorter=shorter)
    assert {step.batch_size * step.gradient_accumulation for step in steps} == {rung.effective_batch}


@given(rungs, st.booleans(), st.booleans())
def test_the_ladder_ends_at_its_foot_and_never_comes_back(rung, bits, shorter):
    steps = ladder(rung, allow_4bit=bits, allow_shorter=shorter)
    assert len(set(steps)) == len(steps)
    foot = steps[-1]
    assert foot.batch_size == 1
    assert foot.activation_checkpointing
    assert not (bits and foot.tuning in {"lora", "lora-8bit"})
    assert not (shorter and foot.max_length >= 2 * SHORTEST_ROW)


@given(rungs, st.booleans(), st.booleans())
def test_each_step_down_saves_one_thing_in_the_order_batch_activations_bits_length(rung, bits, shorter):
    def needs(step: Rung) -> tuple:
        return step.batch_size, not step.activation_checkpointing, step.tuning != "qlora", step.max_length

    order = []
    for upper, lower in pairwise(ladder(rung, allow_4bit=bits, allow_shorter=shorter)):
        pairs = enumerate(zip(needs(upper), needs(lower), strict=True))
        (changed,) = [index for index, (before, after) in pairs if before != after]
        assert needs(lower)[changed] < needs(upper)[changed]
        order.append(changed)
    assert order == sorted(order)


@given(rungs)
def test_the_batch_is_at_least_halved_and_no_more_than_it_must(rung):
    steps = [step.batch_size for step in ladder(rung)]
    for upper, lower in pairwise(steps):
        if lower < upper:
            possible = [rows for rows in range(1, upper // 2 + 1) if rung.effective_batch % rows == 0]
            assert lower == max(possible)


@given(rungs, st.booleans())
def test_numbers_change_only_where_it_is_allowed(rung, shorter):
    steps = ladder(rung, allow_shorter=shorter)
    assert {step.tuning for step in steps} == {rung.tuning}
    if not shorter:
        assert {step.max_length for step in steps} == {rung.max_length}
    else:
        assert min(step.max_length for step in steps) >= min(SHORTEST_ROW, rung.max_length)


def test_eight_rows_climb_down_by_halves():
    top = Rung(batch_size=8, gradient_accumulation=1, activation_checkpointing=False, tuning="lora", max_length=1024)
    steps = ladder(top, allow_4bit=True, allow_shorter=True)
    assert [(s.batch_size, s.gradient_accumulation) for s in steps[:4]] == [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert [(s.activation_checkpointing, s.tuning, s.max_length) for s in steps[4:]] == [
        (True, "lora", 1024),
        (True, "qlora", 1024),
        (True, "qlora", 512),
        (True, "qlora", 256),
    ]


def test_full_tuning_never_becomes_an_adapter():
    """A job that asked for all weights must not be given an adapter."""
    top = Rung(batch_size=2, gradient_accumulation=1, activation_checkpointing=False, tuning="full", max_length=1024)
    assert {step.tuning for step in ladder(top, allow_4bit=True, allow_shorter=True)} == {"full"}


@given(rungs, st.booleans(), st.booleans())
def test_the_reason_names_the_rung_that_was_too_high(rung, bits, shorter):
    if step := next_rung(rung, allow_4bit=bits, allow_shorter=shorter):
        assert str(rung) in step[1]
        assert step[1].startswith("after ")  # why it was too high, the caller knows: memory, or a kill


@given(rungs)
def test_a_rung_survives_being_stored(rung):
    assert Rung(**rung.as_dict()) == rung
