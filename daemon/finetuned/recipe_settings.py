"""The settings of each recipe: a table of its own in config.json, at the top level or in a profile."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]
Weights = Weight | Annotated[list[Weight], Field(min_length=2)]
Shares = Share | Annotated[list[Share], Field(min_length=2)]
Temperatures = Temperature | Annotated[list[Temperature], Field(min_length=2)]
Layers = Annotated[list[tuple[PositiveInt, PositiveInt]], Field(min_length=1)]


class Strict(BaseModel):
    """A table that takes no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Shot(Strict):
    """An example of how to answer."""

    question: str = Field(min_length=1, description="As a row asks.")
    answer: str = Field(min_length=1, description="With its reasoning, and its end as the judge reads it.")


class Rft(Strict):
    """Rejection-sampling fine-tuning: the model answers, a judge chooses, and the model learns from what was right."""

    prompt: str = Field(
        "Think step by step. End with the result alone in <answer></answer>.",
        min_length=1,
        description="System prompt under which the model answers, and which it is trained with, in system_prompt's "
        "place.",
    )
    examples: list[Shot] = Field(
        default_factory=list, description="Shown before each question when answers are made; never trained on."
    )
    samples: PositiveInt = Field(4, description="Answers made to each question.")
    temperature: float = Field(0.8, ge=0, description="How freely they are drawn; 0: the likeliest (samples 1).")
    max_new_tokens: PositiveInt = Field(256, description="Longest answer, in tokens.")
    keep: PositiveInt = Field(2, description="Right answers that are kept of each question, at most.")
    pick: Literal["shortest", "varied"] = Field(
        "shortest", description="Which of them: the shortest, or those least like each other."
    )
    least_yield: float = Field(
        0.05, ge=0, le=1, description="Share of the questions that must have a right answer; with fewer the job fails."
    )
    rounds: PositiveInt = Field(
        1, description="Times that answers are made; from the second on by what the one before trained."
    )

    @model_validator(mode="after")
    def _draws_different_answers(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"temperature 0 gives {self.samples} times the same answer; raise it, or set samples to 1")
        return self


class Hybrid(Strict):
    """Labels and rewards in one step: the model learns the rows' answers, and from its own by what a judge says."""

    reward_weight: float = Field(
        0.3, ge=0, lt=1, description="Share of the reward in the loss, the rest is the labels'; 0 is sft and no more."
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


class Distill(Strict):
    """How a student learns from its teacher. Weights and temperature may be lists that are run through evenly."""

    alpha: Shares = Field(
        0.5, description="Weight of the teacher's predictions; the labels have the rest. A list runs over the steps."
    )
    temperature: Temperatures = Field(
        2.0, description="Both predictions are softened by it; 1 leaves them. A list runs over the steps."
    )
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward",
        description="forward: the student covers all that the teacher would say; reverse: it keeps to what the teacher "
        "would surely say; jsd: between the two.",
    )
    top_k: PositiveInt | None = Field(
        None, description="Compare the teacher's so many likeliest tokens and the rest as one; null: all tokens."
    )
    hidden_weight: Weights = Field(0.0, description="Weight of the likeness of hidden states, layer by layer.")
    hidden_layers: Layers | None = Field(
        None,
        description="Which are compared: pairs of student's and teacher's layer, from 1; null: all, spread evenly.",
    )
    attention_weight: Weights = Field(0.0, description="Weight of the likeness of attention between tokens.")
    attention_layers: Layers | None = Field(None, description="Likewise; null: the last of each.")
    contrastive_weight: Weights = Field(
        0.0, description="Weight of telling the teacher's state for a token from those for the row's other tokens."
    )
    contrastive_temperature: Temperature = Field(0.1, description="Of that: lower looks at the most alike alone.")
    projector_rate: float = Field(
        10.0,
        gt=0,
        description="Learning rate of what leads from one model's width to the other's: times learning_rate.",
    )
    norm_steps: PositiveInt | None = Field(
        10, description="Tell each term's gradient norm every so many steps, which takes a backward pass each."
    )

    @field_validator("alpha", "hidden_weight", "attention_weight", "contrastive_weight")
    @classmethod
    def _does_not_rest_at_zero(cls, course: float | list[float]) -> float | list[float]:
        if isinstance(course, list) and any(course[i] == course[i + 1] == 0 for i in range(len(course) - 1)):
            raise ValueError("is 0 twice in a row: nothing would be learned from the teacher in between")
        return course

    @model_validator(mode="after")
    def _learns_from_the_teacher(self) -> Self:
        if not any((self.alpha, self.hidden_weight, self.attention_weight, self.contrastive_weight)):
            raise ValueError("all weights of the teacher are 0; raise alpha, or take recipe sft")
        return self
