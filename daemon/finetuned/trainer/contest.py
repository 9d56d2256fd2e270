"""Each question answered twice, behind the plain prompt and behind one that a policy has refined, and both judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from finetuned.judges import Judge
from finetuned.trainer.generate import generating, turn_ends
from finetuned.trainer.lots import urn
from finetuned.trainer.policy import CONTROL, Policy
from finetuned.trainer.prompted import Prompted, parted
from finetuned.trainer.rollouts import answers, last_states
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuned.trainer.loop import Task

_JUDGED_BY = 256  # rows that the judge is chosen by, where it is left to us


@dataclass(frozen=True)
class Drawn:
    """What came of one row: control, [CONTROL], the features that it was drawn by, [width], and an answer.

    `plain_right` is the judge's word on the most probable answer to the plain prompt, `right` on the answer that was
    drawn behind the refined one.
    """

    control: torch.Tensor
    features: torch.Tensor
    answer: list[int]
    plain_right: bool
    right: bool

    @property
    def reward(self) -> float:
        """Give how much better the refined prompt was: 1, 0 or -1."""
        return float(self.right) - float(self.plain_right)


class Contest:
    """Lets a model answer, in its training's midst; nothing of it is changed by that."""

    def __init__(self, task: Task, model: PreTrainedModel, prompted: Prompted, policy: Policy) -> None:
        self._model, self._prompted, self._policy = model, prompted, policy
        self._tokenizer, self._seed, self._settings = task.tokenizer, task.settings.seed, task.settings.hybrid
        self._task = task

    @cached_property
    def _judge(self) -> Judge:
        rows = (self._task.train[place] for place in range(min(_JUDGED_BY, len(self._task.train))))
        return self._task.settings.judge.settle(self._text(parted(row)[1]) for row in rows)[0]

    def draw(self, rows: Sequence[Example], step: int) -> list[Drawn]:
        """Give what comes of rows in a step, all of them answered in one batch."""
        prompted, settings, count = self._prompted, self._settings, len(rows)
        questions, wanted = zip(*map(parted, rows), strict=True)
        urns = [urn(self._seed, step, row.line, row.ids) for row in rows]
        lots = torch.stack([torch.rand(settings.max_new_tokens, generator=one) for one in urns])
        noise = torch.stack([torch.randn(CONTROL, generator=one) for one in urns])
        with generating(self._model, self._tokenizer):
            plain = [prompted.embedded(asked, prompted.prompt(asked)) for asked in questions]
            features = last_states(prompted.model, plain)
            control = self._policy(features)[0] + noise.to(features.device)
            refined = [
                prompted.embedded(asked, self._policy.refine(prompted.prompt(asked), *drawn))
                for asked, *drawn in zip(questions, control, features, strict=True)
            ]
            found = answers(
                prompted.model,
                [*plain, *refined],
                torch.cat([-torch.ones_like(lots), lots]),
                temperature=settings.temperature,
                ends=turn_ends(self._model, self._tokenizer),
            )
        expected = [self._text(tokens) for tokens in wanted] * 2
        right = [self._judge.verdict(self._text(one), best).right for one, best in zip(found, expected, strict=True)]
        return [Drawn(*one) for one in zip(control, features, found[count:], right[:count], right[count:], strict=True)]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()
