"""A small network that refines a prompt for each question, and is paid for what that changes.

It reads features of the question and says how control, a few numbers, is to be drawn; control and features together
make the change to the prompt's embeddings. Everything here is float32: autocast would round the probabilities away.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

CONTROL = 8  # numbers that are drawn
FILE = "policy.safetensors"
_HIDDEN = 64
_REACH = 0.5  # most that an embedding's number is changed by, in typical sizes of one


class Policy(nn.Module):
    """How to refine a prompt of at most `tokens` embeddings of `width` numbers, whose typical size is `size`.

    At first control is drawn around zero and no reward is expected.
    """

    reach: torch.Tensor

    def __init__(self, width: int, tokens: int, size: float | torch.Tensor) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, _HIDDEN), nn.Tanh())
        self.aim = nn.Linear(_HIDDEN, CONTROL)
        self.expect = nn.Linear(_HIDDEN, 1)
        self.change = nn.Sequential(
            nn.Linear(_HIDDEN + CONTROL, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, tokens * width), nn.Tanh()
        )
        self.register_buffer("reach", torch.as_tensor(_REACH * size))
        for layer in (self.aim, self.expect):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read features of questions, [rows, width]: where control is aimed at, [rows, CONTROL], and the reward that is
        expected, [rows].
        """
        with torch.autocast(features.device.type, enabled=False):
            read = self.read(features.float())
            return self.aim(read), self.expect(read).squeeze(-1)

    def refine(self, prompt_embedding: torch.Tensor, control: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Give a prompt for one question: [tokens or fewer, width], with gradient for everything that it is made of.

        control: [CONTROL]; features: [width].
        """
        with torch.autocast(features.device.type, enabled=False):
            change = self.change(torch.cat([self.read(features.float()), control.float()])).view(
                self.tokens, self.width
            )
            refined: torch.Tensor = prompt_embedding.float() + self.reach * change[: len(prompt_embedding)]
            return refined

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, folder / FILE
        )


def log_probability(control: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """Give the logarithm of the density with which control is drawn: normal around `aim` with a deviation of 1, without
    its constant. [rows, CONTROL] both; gives [rows].
    """
    return -0.5 * (control - aim).square().sum(-1)


def load_policy(folder: str | Path) -> Policy:
    """Read one that was saved. Raises OSError."""
    weights = load_file(Path(folder) / FILE)
    width = len(weights["read.0.weight"])
    policy = Policy(width, len(weights["change.2.bias"]) // width, 1.0)
    policy.load_state_dict(weights)
    return policy.eval()
