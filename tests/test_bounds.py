"""How many tokens a micro-batch may hold: found by trying, kept, and begun with the next time."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuned.config import settings_from
from finetuned.trainer import bounds
from finetuned.trainer.bounds import Found, largest_fitting
from finetuned.trainer.group import Group
from finetuned.trainer.steps import plan_steps


@given(st.integers(1, 4096), st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_bound_fits_with_a_margin_and_half_as_much_more_would_not(first, enough, memory):
    """A device where a micro-batch needs as much memory as it has tokens."""
    tried: list[int] = []

    def attempt(tokens: int) -> float | None:
        tried.append(tokens)
        return tokens / memory if tokens <= memory else None

    tokens, reason = largest_fitting(first, enough, attempt)
    assert reason
    assert tried == [first * 2**n for n in range(len(tried))]
    if tokens > 1:
        assert tokens <= memory or tokens == first // 2
    if tokens >= first:
        assert tokens >= enough or 2 * tokens > 0.9 * memory


def test_a_size_up_is_tried_when_memory_was_left_over():
    assert Found(2048, 0.4).next_size(9000) == 4096
    assert Found(2048, 0.4).next_size(2000) == 2048, "no row is there for more"
    assert Found(2048, 0.6).next_size(9000) == 2048


def training(folder, *, device: str = "cuda", tuning: str = "lora", tokens: list[int], **settings) -> SimpleNamespace:
    """As much of a training as the bound asks for; memory runs out above 5,000 tokens."""
    chosen = settings_from({"max_length": 4096, "tuning": tuning, **settings}, where="the test")
    rung = chosen.first_rung()

    def try_backward(bound: int) -> bool:
        tokens.append(bound)
        return bound <= 5000

    return SimpleNamespace(
        group=Group(),
        task=SimpleNamespace(
            settings=chosen,
            bounds=folder / "micro-batches.json",
            device=SimpleNamespace(type=device),
            base=SimpleNamespace(name="a/model"),
        ),
        rung=rung,
        lengths=[4096] * 8,
        plan=plan_steps(8, effective_batch=8, epochs=1, max_steps=None, seed=0),
        try_backward=try_backward,
    )


@pytest.fixture(autouse=True)
def little_used(monkeypatch):
    """Whatever is tried takes little of the memory, until it does not fit at all."""
    monkeypatch.setattr(bounds.memory, "peak_bytes", lambda: 1)
    monkeypatch.setattr(bounds.memory, "total_bytes", lambda: 10)


def test_what_was_found_is_where_the_next_training_begins(tmp_path):
    tried: list[int] = []
    first = training(tmp_path, tokens=tried, batch_size="auto")
    first.rung, choice = bounds.settle(first)
    assert tried == [2048, 4096, 8192]
    assert (first.rung.micro_batch_tokens, choice["choice"]) == (4096, "4096")
    assert "did not fit" in choice["reason"]
    bounds.remember(first)

    second = training(tmp_path, tokens=tried, batch_size="auto")
    second.rung, choice = bounds.settle(second)
    assert tried == [2048, 4096, 8192]  # nothing is tried again
    assert second.rung.micro_batch_tokens == 8192  # one size up: a tenth of the memory was enough
    assert "earlier" in choice["reason"]

    another = training(tmp_path, tokens=tried, batch_size="auto", activation_checkpointing=True)
    bounds.settle(another)
    assert len(tried) == 6  # it needs other memory, so it finds out for itself


def test_a_damaged_file_is_begun_anew(tmp_path):
    (tmp_path / "micro-batches.json").write_text("{torn")
    one = training(tmp_path, tokens=[], batch_size="auto")
    one.rung, _ = bounds.settle(one)
    bounds.remember(one)
    assert len(json.loads((tmp_path / "micro-batches.json").read_bytes())) == 1


@pytest.mark.parametrize(
    ("device", "settings", "tokens"),
    [
        ("cpu", {}, bounds.CPU_TOKENS),
        ("cpu", {"batch_size": "auto"}, bounds.CPU_TOKENS),
        ("cpu", {"micro_batch_tokens": 300}, 300),
        ("cuda", {}, 0),  # the rows decide
        ("cuda", {"micro_batch_tokens": 300, "batch_size": "auto"}, 300),
    ],
)
def test_where_nothing_needs_to_be_tried(tmp_path, device, settings, tokens):
    tried: list[int] = []
    one = training(tmp_path, device=device, tokens=tried, **settings)
    rung, choice = bounds.settle(one)
    assert rung.micro_batch_tokens == tokens
    assert choice["reason"]
    assert tried == []


def test_a_rung_that_was_climbed_down_to_stays(tmp_path):
    one = training(tmp_path, device="cpu", tokens=[])
    one.rung = bounds.replace(one.rung, micro_batch_tokens=128)
    assert bounds.settle(one)[0].micro_batch_tokens == 128
