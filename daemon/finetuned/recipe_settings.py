"""The settings of each recipe: a table of its own in config.json, at the top level or in a profile."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A table that takes no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Hybrid(Strict):
    """Labels and rewards in one step: the model learns the rows' answers, and from its own by what a judge says."""

    reward_weight: float = Field(
        0.3, ge=0, le=1, description="Share of the reward in the loss, the rest is the labels'; 0 is sft and no more."
    )
    ambiguity: float = Field(
        0.1, ge=0, description="Weight of the predicted answer's entropy beside its cross-entropy, both in nats."
    )
    prompt_tokens: int = Field(
        0, ge=0, le=1024, description="Train a soft prompt of so many tokens in LoRA's place; 0: LoRA, or all weights."
    )
    temperature: float = Field(1.0, gt=0, description="How freely the answers are drawn that the reward is for.")
    max_new_tokens: PositiveInt = Field(64, description="Longest answer, in tokens.")
    policy_rate: float = Field(10.0, gt=0, description="Learning rate of the policy, in multiples of learning_rate.")
    prompt_rate: float = Field(
        50.0, gt=0, description="Learning rate of the soft prompt, in multiples of learning_rate."
    )
