"""The settings of what stands beside the training itself: a table of its own in config.json each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from finetuned.judges import LETTERS, TOLERANCE, Judge, Kind, judge, suits
from finetuned.recipe_settings import PositiveInt, Strict


class Predictions(Strict):
    """What the model is asked while it learns, so that one can read what it learns."""

    enabled: bool = Field(True, description="Ask held-out questions while the model learns, where rows are held out.")
    samples: int = Field(5, ge=0, description="How many held-out rows are asked; the same ones each time.")
    frequency: Literal["eval", "epoch"] | PositiveInt = Field(
        "eval",
        description="When, beside before the first step and after the last: eval, epoch, or every so many steps.",
    )
    max_new_tokens: PositiveInt = Field(64, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 takes the most probable answer; above, answers are drawn.")


class JudgeSettings(Strict):
    """How an answer is told to be right (`judges.py`)."""

    kind: Kind | Literal["auto"] = Field(
        "auto",
        description="exact (the same text), number (the last one), contains, regex, json (equal as JSON), choice; "
        "auto: what suits the expected answers.",
    )
    tolerance: float = Field(
        TOLERANCE, ge=0, description="number: how far it may be from the expected one, as a share of that."
    )
    pattern: str | None = Field(None, description="regex: its first group, or all of it, is the answer.")
    choices: list[Annotated[str, Field(min_length=1)]] = Field(
        list(LETTERS), min_length=2, description="choice: the answers that there are."
    )

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _regex_has_one(self) -> Self:
        if self.kind == "regex" and not self.pattern:
            raise ValueError("kind regex needs a pattern")
        return self

    def settle(self, expected: Iterable[str]) -> tuple[Judge, str]:
        """Give the judge and why it is that one."""
        kind, why = suits(expected) if self.kind == "auto" else (self.kind, "as set")
        return judge(kind, tolerance=self.tolerance, pattern=self.pattern, choices=self.choices), why


class OnFinish(Strict):
    """How others hear of the end of a job."""

    command: str | None = Field(
        None,
        description="For the shell; FINETUNED_JOB, FINETUNED_FILE, FINETUNED_RESULT (succeeded, failed, cancelled) and "
        "FINETUNED_LINE are in its environment.",
    )
    urls: list[str] = Field(default_factory=list, description="Services as apprise names them: ntfy://, mailto://, ...")
    seconds: float = Field(30.0, gt=0, description="How long the command, and the services, may take.")


class Web(Strict):
    """The control centre in the browser."""

    enabled: bool = Field(True, description="Whether the daemon starts it; `finetuned web` starts it by hand.")
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. With any but this machine's own, a token is asked for.",
    )
    port: int = Field(7860, ge=0, le=65535, description="Port to listen on; 0: any that is free.")
