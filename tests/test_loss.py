"""The summed loss: right, and without ever holding all logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from finetuned.trainer import loss
from finetuned.trainer.loss import summed_loss

WIDTH, VOCABULARY = 8, 50


def inputs(positions: int, *, frozen: bool = False, dtype: torch.dtype = torch.float32):
    torch.manual_seed(1)
    hidden = torch.randn(positions, WIDTH, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(not frozen)
    return hidden, head, torch.randint(VOCABULARY, (positions,))


def gradients(value: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, [tensor for tensor in tensors if tensor.requires_grad]))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 32, 50])
def test_chunks_give_the_loss_and_gradient_of_the_whole(positions, frozen, monkeypatch):
    monkeypatch.setitem(loss._CHUNK, "cpu", 16 * VOCABULARY * 4)
    hidden, head, targets = inputs(positions, frozen=frozen)
    found = summed_loss(hidden, head, targets)
    wanted = cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradients(found, hidden, head.weight), gradients(wanted, hidden, head.weight), rtol=1e-5, atol=1e-6
    )


def test_it_is_a_sum_so_that_parts_add_up():
    hidden, head, targets = inputs(40)
    parts = sum(summed_loss(hidden[part], head, targets[part]) for part in (slice(0, 7), slice(7, 40)))
    torch.testing.assert_close(parts, summed_loss(hidden, head, targets))


def test_bf16_logits_are_summed_in_float32():
    hidden, head, targets = inputs(40, dtype=torch.bfloat16)
    found = summed_loss(hidden, head, targets)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, cross_entropy(head(hidden).float(), targets, reduction="sum"))


def test_no_positions_are_no_loss():
    hidden, head, targets = inputs(0)
    assert summed_loss(hidden, head, targets).item() == 0


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_logits(monkeypatch):
    """Of several chunks none keeps its logits; the largest tensor that is kept is the hidden states or the head."""
    monkeypatch.setitem(loss._CHUNK, "cpu", 16 * VOCABULARY * 4)
    hidden, head, targets = inputs(160)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        found = summed_loss(hidden, head, targets)
    assert kept, "the hooks saw nothing"
    assert max(kept) <= hidden.numel()
    assert sum(kept) < 160 * VOCABULARY / 2
    found.backward()
    assert head.weight.grad.any()


def test_at_no_time_is_there_more_than_one_chunk_of_logits(monkeypatch):
    """Neither forward nor backward makes a tensor that is larger than one chunk's logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.numel = max(Largest.numel, result.numel())
            return result

    monkeypatch.setitem(loss._CHUNK, "cpu", 16 * VOCABULARY * 4)
    hidden, head, targets = inputs(800)
    with Largest():
        summed_loss(hidden, head, targets).backward()
    assert 16 * VOCABULARY <= Largest.numel <= hidden.numel()  # all logits would be 40000


def test_without_gradients_nothing_is_kept(monkeypatch):
    monkeypatch.setitem(loss._CHUNK, "cpu", 16 * VOCABULARY * 4)
    hidden, head, targets = inputs(50)
    with torch.no_grad():
        found = summed_loss(hidden, head, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, summed_loss(hidden, head, targets))
