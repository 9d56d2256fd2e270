"""Labels and rewards in one step, for answers that can be checked.

The loss of a row is (1 - w) * EFE + w * RL. EFE, the expected free energy of active inference, is risk, the
cross-entropy of the wanted answer, plus ambiguity, the entropy of what is predicted in its place (Friston et al.,
doi:10.1080/17588928.2015.1020053). RL is REINFORCE (Williams, doi:10.1007/BF00992696) over two draws, control c, by
which a policy refines the prompt, and the answer y to the question behind the refined prompt:

    RL = -A (log p(y | refined prompt) + log p(c | question)) + (R - b)^2 / 2,    A = R - b without gradient

R, the reward, is how much better y is than the most probable answer to the plain prompt, by the judge: 1, 0 or -1;
that answer as a baseline is of Rennie et al., arXiv:1612.00563. b is the reward that the policy expects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuned.trainer.batches import Batch
from finetuned.trainer.contest import Contest, Drawn
from finetuned.trainer.layout import Layout
from finetuned.trainer.loss import summed_entropy, summed_loss, weighted_loss
from finetuned.trainer.parts import MODEL, Part
from finetuned.trainer.policy import Policy, log_probability
from finetuned.trainer.prompted import OWN, Prompted, parted
from finetuned.trainer.recipes.sft import trainable
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuned.trainer.loop import Task, Training

POLICY, PROMPT = "policy", "soft_prompt"  # parts beside the model
_SHARES = {
    "loss_risk": "targets",
    "loss_ambiguity": "targets",
    "reward": "rows",
    "reward_plain": "rows",
    "reward_refined": "rows",
}


def build(task: Task, model: PreTrainedModel, layout: Layout) -> Objective:
    """Take the model with its adapter or its prompt on, and how micro-batches go through it."""
    return Objective(task, model, layout)


class Objective(torch.nn.Module):
    """A model, and a policy that is paid for improving its prompt; without a weight for that, the model alone."""

    def __init__(self, task: Task, model: PreTrainedModel, layout: Layout) -> None:
        super().__init__()
        self.model = model
        self.settings = task.settings.hybrid
        self.layout = replace(layout, lead=task.settings.soft_prompt)
        self.prompted = Prompted(model, self.layout)
        self.policy = self._first_policy(task.settings.seed) if self.settings.reward_weight else None
        self._contest = Contest(task, model, self.prompted, self.policy) if self.policy else None
        self._step = 0
        self._told: defaultdict[str, float | torch.Tensor] = defaultdict(float)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Give the summed loss in nats, a float32 scalar; without a policy, and in evaluation, that of the labels."""
        weight = self.settings.reward_weight
        # First, while nothing of the loss is in memory.
        drawn = self._contest.draw(batch.examples, self._step) if self._contest and self.training else []
        hidden, head = self.prompted.plain(batch)
        risk = summed_loss(hidden, head, batch.targets)
        if not drawn:
            return risk
        ambiguity = summed_entropy(hidden, head)
        reinforce = self._reinforce(batch, drawn)
        terms = {"loss_risk": risk.detach().double(), "loss_ambiguity": ambiguity.detach().double()}
        self._tell(drawn, targets=len(batch.targets), **terms)
        return (1 - weight) * (risk + self.settings.ambiguity * ambiguity) + weight * reinforce

    def parts(self) -> dict[str, Part]:
        """Train the model or its prompt, and the policy."""
        named = trainable(self)
        policy = {name: named.pop(name) for name in list(named) if name.startswith("policy.")}
        prompt = {name: named.pop(name) for name in list(named) if ".prompt_encoder." in name}
        rates = self.settings
        return {MODEL: Part(named), PROMPT: Part(prompt, rates.prompt_rate), POLICY: Part(policy, rates.policy_rate)}

    def begin(self, step: int) -> None:
        """Forget what was told of the step before."""
        self._step = step
        self._told.clear()

    def figures(self) -> dict[str, float]:
        """Tell the terms in nats a token, the mean reward, and the shares of right answers, plain and refined."""
        return {name: float(self._told[name] / self._told[of]) for name, of in _SHARES.items() if self._told[of]}

    def metrics(self) -> dict[str, Any]:
        """Tell nothing beside the losses."""
        return {}

    def measured(self, _: Training) -> dict[str, float]:
        """Measure nothing beside the held-out loss."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the policy beside the adapter."""
        if self.policy is not None:
            self.policy.save(folder)

    def _first_policy(self, seed: int) -> Policy:
        table = next(self.prompted.table.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            size = table.detach().float().square().mean().sqrt()
            return Policy(table.shape[1], self.layout.lead or OWN, size).to(table.device)

    def _reinforce(self, batch: Batch, drawn: Sequence[Drawn]) -> torch.Tensor:
        """Give RL, summed over rows. One graph holds both draws and is walked once, with the rest of the loss."""
        assert self.policy is not None
        device = batch.targets.device
        questions = [parted(example)[0] for example in batch.examples]
        rewards = torch.tensor([one.reward for one in drawn], device=device)
        aim, expected = self.policy(torch.stack([one.features for one in drawn]))
        advantage = (rewards - expected).detach()

        rows = [_row(asked, one.answer) for asked, one in zip(questions, drawn, strict=True)]
        prompts = [
            self.policy.refine(self.prompted.prompt(asked), one.control, one.features)
            for asked, one in zip(questions, drawn, strict=True)
        ]
        # Rows have places for a soft prompt already, and share nothing once their prompts differ.
        answered = replace(self.layout, share=False, lead=0).collate(rows).to(device)
        hidden, head = self.prompted.hidden(answered, prompts)
        lengths = torch.tensor([len(one.answer) for one in drawn], device=device)
        each = advantage.repeat_interleave(lengths, output_size=len(answered.targets))
        surprise = weighted_loss(hidden, head, answered.targets, each, temperature=self.settings.temperature)
        chosen = log_probability(torch.stack([one.control for one in drawn]), aim)
        drawing = surprise - (advantage * chosen).sum()
        # Its gradient is REINFORCE's. Its value says nothing, and a reward that rises would pass for an explosion.
        found: torch.Tensor = drawing - drawing.detach() + 0.5 * (rewards - expected).square().sum()
        return found

    def _tell(self, drawn: Sequence[Drawn], **sums: float | torch.Tensor) -> None:
        sums |= {"rows": len(drawn), "reward": sum(one.reward for one in drawn)}
        sums |= {
            "reward_plain": sum(one.plain_right for one in drawn),
            "reward_refined": sum(one.right for one in drawn),
        }
        for name, value in sums.items():
            self._told[name] += value


def _row(question: list[int], answer: list[int]) -> Example:
    return Example(question + answer, [False] * len(question) + [True] * len(answer), 0)
