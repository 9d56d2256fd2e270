"""A micro-batch through the real objective, forward and backward, on tensors that have a shape and no content: every
storage is counted while it lives.

Seconds, and no memory to speak of, whatever the model's size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from finetuned.trainer import attention, understudy
from finetuned.trainer.batches import Batch
from finetuned.trainer.layout import Layout
from finetuned.trainer.model import causal
from finetuned.trainer.tokens import Example
from finetuned.trainer.understudy import Make

# What a model may raise that does not run on such tensors, or not in a layout.
_REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
COUNTED, BY_FORMULA = "counted on the model itself", "by a formula, as the model does not run without content"


@dataclass(frozen=True)
class Run:
    """What a micro-batch needs, in bytes, beside weights and optimizer."""

    trained: int  # parameters
    kept: int  # from the forward to the backward pass
    upper: int  # at most until the backward pass is half-way down the layers, gradients among it
    lower: int  # at most from there on
    largest: int  # trained parameter, in numbers
    method: str = COUNTED

    @property
    def peak(self) -> int:
        """Give the most at any time."""
        return max(self.upper, self.lower)


class Stage:
    """A model whose tensors have lost their content, and the micro-batches that go through it."""

    def __init__(self, model: Any, device: torch.device, compute: torch.dtype, *, share: bool, make: Make) -> None:
        """Take a model on the meta device, which is changed in place, and what makes its objective."""
        self.model, self.device, self.compute, self.share, self._make = model, device, compute, share, make
        self._mode = FakeTensorMode()
        _place(model, self._mode, device)

    def run(self, rows: Sequence[Example], *, accumulated: bool) -> Run:
        """Run them as one micro-batch, with gradients of others of its step there already if `accumulated`."""
        plain = self.model.config._attn_implementation  # noqa: SLF001, there is no public way to ask
        attention.register()
        try:
            for layout in self._layouts(plain):
                attention.forget()
                try:
                    return self._count(rows, layout, accumulated=accumulated)
                except _REFUSALS:
                    continue
        finally:
            attention.forget()
            self.model.zero_grad(set_to_none=True)
        numbers, largest = _sizes(self.model)
        kept = self._by_formula(sum(len(row.ids) for row in rows))
        return Run(numbers, kept, kept + 4 * numbers, 4 * numbers, largest, BY_FORMULA)

    def answers(self, rows: int, *, prompt: int, longest: int) -> int:
        """Give the bytes that so many answers take, made at once to prompts of so many tokens, beside the weights."""
        model, live = causal(self.model), Live(self.device)
        live.leave_out([*self.model.parameters(), *self.model.buffers()])
        try:
            with self._mode, live, understudy.generating(model):
                ids = torch.empty(rows, prompt, dtype=torch.long, device=self.device)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                understudy.answer(model, inputs, longest, torch.float32)
        except _REFUSALS:
            config = model.config.get_text_config()
            # Keys and values of every token and layer, at their full width.
            return int(
                2 * rows * (prompt + longest) * config.num_hidden_layers * config.hidden_size * self.compute.itemsize
            )
        return live.peak

    def _layouts(self, plain: str) -> Iterator[Layout]:
        """Give the layouts best first. The trainer tries them out on the weights; here the first that runs is taken."""
        for name, reason in attention.functions(self.device, self.compute):
            yield Layout(flat=True, head_apart=True, reason=reason, attention=name, share=self.share)
        for apart in (True, False):
            yield Layout(flat=False, head_apart=apart, reason="flat batches are refused", attention=plain)

    def _count(self, rows: Sequence[Example], layout: Layout, *, accumulated: bool) -> Run:
        model, mode = self.model, self._mode
        causal(model).set_attn_implementation(layout.attention)

        def place(other: Any, device: torch.device) -> None:
            _place(other, mode, device)

        objective = self._make(model, layout, place).train()
        place(objective, self.device)  # what it has made for itself
        objective.begin(0)
        batch = _without_content(objective.layout.collate(rows), mode, self.device)
        live = Live(self.device)
        own = [*objective.parameters(), *objective.buffers()]
        live.leave_out([*own, *batch.inputs.values(), batch.positions, batch.targets])
        with mode, live, _half_way(causal(model), live.divide):
            for parameter in objective.parameters():
                parameter.grad = torch.empty_like(parameter) if accumulated and parameter.requires_grad else None
            before = live.now
            with torch.autocast(self.device.type, self.compute, enabled=self.compute is not torch.float32):
                loss = objective(batch)
            kept = live.now - before
            (loss / len(rows)).backward()
        live.divide()
        numbers, largest = _sizes(objective)
        # A recipe may go backward more than once.
        return Run(numbers, kept, max(live.peaks[:-1] or live.peaks), live.peaks[-1], largest)

    def _by_formula(self, tokens: int) -> int:
        """Give 34 bytes a token, layer and unit of width in 16 bits (Korthikanti et al., arXiv:2205.05198, table 2,
        without the attention matrix); with activation checkpointing 2, and one layer whole.
        """
        config = self.model.config.get_text_config()
        unit = tokens * config.hidden_size * self.compute.itemsize // 2
        layers = config.num_hidden_layers
        twice = getattr(self.model, "is_gradient_checkpointing", False)
        return int(unit * (2 * layers + 34 if twice else 34 * layers))


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self, device: torch.device) -> None:
        """Begin at nothing. Elsewhere than on the device nothing counts."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind = device.type
        self.now = self.peak = 0
        self.peaks: list[int] = []  # of the stretches that are over
        self._known: dict[int, weakref.ref[Any]] = {}

    def divide(self) -> None:
        """End a stretch: the next has a peak of its own."""
        self.peaks.append(self.peak)
        self.peak = self.now

    def leave_out(self, tensors: Sequence[Any]) -> None:
        """Do not count what is there already."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._known[id(storage)] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what an operation gives."""
        found = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, found)
        return found

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._kind:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known and self._known[key]() is storage:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _sizes(module: Any) -> tuple[int, int]:
    """Give the numbers that are trained, and those of the largest parameter among them."""
    numbers = [p.numel() for p in module.parameters() if p.requires_grad]
    return sum(numbers), max(numbers, default=0)


def shorten(model: Any, depth: int) -> None:
    """Leave a model its first layers only; 0 leaves it all."""
    if depth:
        decoder = model.get_decoder()
        decoder.layers = decoder.layers[:depth]


def at_depth(runs: Sequence[tuple[int, Run]], layers: int) -> Run:
    """Draw straight lines through runs of two depths to that of the whole model.

    The peak itself is none: in the upper half it grows with what all layers keep, in the lower with their gradients.
    """
    trained, kept, upper, lower = (
        line([(depth, getattr(run, name)) for depth, run in runs], layers)
        for name in ("trained", "kept", "upper", "lower")
    )
    deepest = runs[0][1]
    return Run(trained, kept, upper, lower, deepest.largest, deepest.method)


def line(found: Sequence[tuple[int, int]], layers: int) -> int:
    """Give what a figure, found at one depth or at two, is at that of the whole model."""
    if len(found) == 1:
        return found[0][1]
    (more, high), (fewer, low) = found
    return round(low + (layers - fewer) / (more - fewer) * (high - low))


@contextmanager
def _half_way(model: Any, say: Callable[[], None]) -> Iterator[None]:
    """Call when the backward pass has gone through the upper half of a model's layers."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or len(layers) < 2:
        yield
        return

    def hook(_: object, __: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not said and hidden.requires_grad:
            said.append(hidden.register_hook(lambda _: say()))

    said: list[Any] = []  # activation checkpointing comes by twice
    handle = layers[len(layers) // 2 - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _place(model: Any, mode: FakeTensorMode, device: torch.device) -> None:
    """Put tensors without content in the place of a model's own; what was shared stays shared."""
    placed: dict[int, torch.Tensor] = {}

    def place(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in placed:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            own = isinstance(tensor, torch.nn.Parameter)
            placed[id(tensor)] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad) if own else empty
        return placed[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):  # noqa: SLF001, Module._apply swaps contents, of which there are none
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = place(tensor)


def _without_content(batch: Batch, mode: FakeTensorMode, device: torch.device) -> Batch:
    def take(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    inputs = {name: take(value) for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs, positions=take(batch.positions), targets=take(batch.targets))
