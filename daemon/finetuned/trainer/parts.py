"""What is trained: the model, and whatever a recipe trains beside it, each part with a learning rate, a norm and an
optimizer state of its own.

One AdamW holds them all, a group for each. Two would do the same sums, but not in fp16: accelerate updates the gradient
scaler after each optimizer's step, and the second one's gradients would be unscaled twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetuned.errors import UnhealthyError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from finetuned.trainer.group import Group
    from finetuned.trainer.shards import Shares

MODEL = "model"  # the part that every recipe has
_PATIENCE = 10  # steps in which a part's gradient may be exactly zero


@dataclass(frozen=True)
class Part:
    """Parameters by their names in the objective, and their learning rate as a multiple of the training's."""

    parameters: dict[str, torch.nn.Parameter]
    rate: float = 1.0


class Parts:
    """All parts of one training."""

    def __init__(self, parts: Mapping[str, Part], group: Group, *, spread: bool = False) -> None:
        """Take what a recipe trains; `spread`: some of it is spread over the ranks of the group."""
        self._parts = {name: part for name, part in parts.items() if part.parameters}
        self.parameters = {name: p for part in self._parts.values() for name, p in part.parameters.items()}
        self.stepped = self.whole = self.parameters  # what the optimizer has, and what is whole on every rank
        self.shares: Shares | None = None
        if spread:
            from finetuned.trainer.shards import Shares, is_whole  # slow to import, and most trainings go without

            self.shares = Shares(self.parameters, group)
            self.stepped = self.shares.parameters
            self.whole = {name: one for name, one in self.parameters.items() if is_whole(one)}
        self._idle = dict.fromkeys(self._parts, 0)  # steps since a part had a gradient

    def optimizer(self, *, rate: float, weight_decay: float) -> Optimizer:
        """Give AdamW over all of them."""
        groups = [{"params": self._stepped(part)} for part in self._parts.values()]
        return torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay, **self.options())

    def options(self) -> dict[str, Any]:
        """Give how the optimizer goes about its step, which changes nothing in what comes of it."""
        return {
            "foreach": True if self.shares else None
        }  # torch's own choice does not see what can be done with shares

    def _stepped(self, part: Part) -> list[torch.Tensor]:
        return [self.stepped[name] for name in part.parameters]

    def set_rate(self, optimizer: Optimizer, rate: float) -> None:
        """Tell the optimizer the learning rate of the step to come."""
        for group, part in zip(optimizer.param_groups, self._parts.values(), strict=True):
            group["lr"] = rate * part.rate

    def clip(self, accelerator: Accelerator, most: float) -> dict[str, float]:
        """Scale each part's gradient down to a norm of at most `most`; give the norms that they had."""
        norms: dict[str, float] = {}
        if self.shares is not None:
            accelerator.unscale_gradients()
            return {name: self.shares.clip(self._stepped(part), most) for name, part in self._parts.items()}
        for name, part in self._parts.items():
            # The first call takes a gradient scaler's factor out of all of them, and a second one would do so again.
            clip = torch.nn.utils.clip_grad_norm_ if norms else accelerator.clip_grad_norm_
            norms[name] = float(clip(part.parameters.values(), most))
        return norms

    def check(self, number: int, norms: Mapping[str, float]) -> None:
        """Raise UnhealthyError when a part beside the model has had no gradient for too long; `number` from 1."""
        for name, norm in norms.items():
            self._idle[name] = 0 if norm else self._idle[name] + 1
            if name != MODEL and self._idle[name] >= _PATIENCE:
                raise UnhealthyError(
                    f"the gradient of {name} has been exactly zero for {_PATIENCE} steps: it does not learn",
                    where=f"step {number}",
                    remedy="Look at the weights of its terms, and whether the reward differs from answer to answer.",
                    code="part_gradient_zero",
                )

    def state(self) -> dict[str, int]:
        """Give what a checkpoint must hold."""
        return dict(self._idle)

    def load(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint's state."""
        self._idle |= state


def joined(norms: Mapping[str, float]) -> float:
    """Give the norm of all parts' gradients together."""
    return math.hypot(*norms.values())
