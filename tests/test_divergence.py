"""The divergence of two predictions: right, and without ever holding all logits of either model."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, softmax

from finetuned.trainer.capped import Capped
from finetuned.trainer.distill import divergence as room
from finetuned.trainer.distill.divergence import divergence, logits_of, summed_divergence

WIDTH, TEACHERS, VOCABULARY = 8, 12, 50


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(20, VOCABULARY) * 3, torch.randn(20, VOCABULARY) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_and_reverse_are_kullback_and_leibler_s_times_the_temperature_s_square(logits, temperature):
    student, teacher = logits
    q, p = (log_softmax(each / temperature, -1) for each in logits)
    for kind, wanted in (
        ("forward", kl_div(q, p, log_target=True, reduction="none")),
        ("reverse", kl_div(p, q, log_target=True, reduction="none")),
    ):
        found = divergence(kind, temperature=temperature, top_k=None)(student, teacher)
        torch.testing.assert_close(found, temperature**2 * wanted.sum(-1))


def test_jsd_is_symmetric_and_at_most_one_bit(logits):
    measure = divergence("jsd", temperature=1.0, top_k=None)
    found = measure(*logits)
    torch.testing.assert_close(found, measure(*reversed(logits)))
    assert (found > 0).all()
    assert (found <= math.log(2)).all()


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_student_that_says_the_same_is_at_no_distance(logits, kind):
    student, _ = logits
    torch.testing.assert_close(divergence(kind, temperature=2.0, top_k=5)(student, student), torch.zeros(20))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_more_tokens_are_compared_the_more_is_seen(logits, kind):
    """Tokens taken as one can only hide a difference, and all of them but one hide none."""
    found = [
        divergence(kind, temperature=1.0, top_k=k)(*logits).mean() for k in (1, 5, 20, VOCABULARY - 1, VOCABULARY, None)
    ]
    assert all(fewer <= more + 1e-5 for fewer, more in pairwise(found))
    torch.testing.assert_close(found[3], found[5])
    assert found[4] == found[5]


def test_at_a_high_temperature_the_gradient_is_that_of_the_logits_difference(logits):
    """Hinton, Vinyals and Dean, section 2.1: it is in proportion to (z - mean z) - (v - mean v)."""
    student, teacher = logits[0].requires_grad_(), logits[1]
    (slope,) = torch.autograd.grad(divergence("forward", temperature=1e3, top_k=None)(student, teacher).sum(), student)
    wanted = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    assert cosine_similarity(slope, wanted, dim=-1).min() > 0.999


def test_heads_that_are_padded_to_different_sizes_are_compared_over_what_both_have(logits):
    student, teacher = logits
    measure = divergence("forward", temperature=1.0, top_k=None)
    padded = torch.cat([teacher, torch.full((20, 6), 9.0)], dim=-1)
    torch.testing.assert_close(measure(student, padded), measure(student, teacher))


def inputs(positions: int, *, frozen: bool, dtype: torch.dtype = torch.float32):
    torch.manual_seed(2)
    hidden = torch.randn(positions, WIDTH, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(not frozen)
    theirs, other = torch.randn(positions, TEACHERS), torch.nn.Linear(TEACHERS, VOCABULARY).requires_grad_(False)
    return hidden, head, theirs, other


def gradients(value: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, [tensor for tensor in tensors if tensor.requires_grad]))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("positions", [0, 1, 16, 17, 40])
def test_chunks_give_the_divergence_and_gradient_of_the_whole(positions, frozen, kind, monkeypatch):
    monkeypatch.setitem(room._CHUNK, "cpu", 16 * VOCABULARY * 4)
    hidden, head, theirs, other = inputs(positions, frozen=frozen)
    measure = divergence(kind, temperature=2.0, top_k=7)
    found = summed_divergence(hidden, head, lambda where: other(theirs[where]), measure)
    wanted = measure(head(hidden), other(theirs)).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    if positions:
        torch.testing.assert_close(
            gradients(found, hidden, head.weight), gradients(wanted, hidden, head.weight), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_of_capped_logits_give_the_divergence_and_gradient_of_the_whole(frozen, monkeypatch):
    """As of Gemma 2, both models; each with a cap of its own."""
    monkeypatch.setitem(room._CHUNK, "cpu", 16 * VOCABULARY * 4)
    hidden, head, theirs, other = inputs(40, frozen=frozen)
    mine, yours = Capped(head, 0.5), Capped(other, 2.0)
    measure = divergence("forward", temperature=2.0, top_k=None)
    found = summed_divergence(hidden, mine, lambda where: yours(theirs[where]), measure)
    whole = (torch.tanh(head(hidden) / 0.5) * 0.5, torch.tanh(other(theirs) / 2.0) * 2.0)
    wanted = measure(*whole).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradients(found, hidden, head.weight), gradients(wanted, hidden, head.weight), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_at_no_time_is_there_more_than_a_chunk_of_either_model_s_logits(frozen, capped, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for one in result if isinstance(result, tuple | list) else [result]:
                if isinstance(one, torch.Tensor):
                    Largest.numel = max(Largest.numel, one.numel())
            return result

    monkeypatch.setitem(room._CHUNK, "cpu", 16 * VOCABULARY * 4)
    hidden, head, theirs, other = inputs(800, frozen=frozen)
    head, other = (Capped(one, 3.0) for one in (head, other)) if capped else (head, other)
    measure = divergence("forward", temperature=2.0, top_k=None)
    with Largest():
        summed_divergence(hidden, head, lambda where: other(theirs[where]), measure).backward()
    assert 16 * VOCABULARY <= Largest.numel <= max(hidden.numel(), theirs.numel())  # all logits would be 40000
    assert hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_head_takes_hidden_states_of_any_number_format(dtype):
    """The crash was: mat1 and mat2 must have the same dtype."""
    hidden, head, theirs, other = inputs(5, frozen=True, dtype=dtype)
    for given in (hidden, hidden.float(), hidden.bfloat16()):
        assert logits_of(head, given).dtype is torch.float32
    measure = divergence("forward", temperature=2.0, top_k=None)
    found = summed_divergence(hidden, head, lambda where: other(theirs[where]).half(), measure)
    assert found.dtype is torch.float32
    found.backward()
    assert hidden.grad.dtype is dtype


def test_learning_from_it_brings_the_student_to_the_teacher(logits):
    _, teacher = logits
    student = torch.nn.Parameter(torch.zeros(20, VOCABULARY))
    optimizer = torch.optim.Adam([student], lr=0.3)
    measure = divergence("forward", temperature=2.0, top_k=None)
    for _ in range(200):
        optimizer.zero_grad()
        measure(student, teacher).sum().backward()
        optimizer.step()
    torch.testing.assert_close(softmax(student, -1), softmax(teacher, -1), atol=0.02, rtol=0)
