"""The tables that recipes have in config.json, a class each. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Weights = Weight | Annotated[list[Weight], Field(min_length=2)]
Shares = Share | Annotated[list[Share], Field(min_length=2)]
Temperatures = Temperature | Annotated[list[Temperature], Field(min_length=2)]
Layers = Annotated[list[tuple[Count, Count]], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Distill(_Strict):
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
    top_k: Count | None = Field(
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
    norm_steps: Count | None = Field(
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
