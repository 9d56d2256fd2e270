"""The table `slurm` of config.json."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from finetuned.recipe_settings import Strict

# Said by the launcher itself: what a daemon finds its job by, and one job a trainer.
_OURS = frozenset(
    {"array", "chdir", "clusters", "comment", "error", "job-name", "open-mode", "output", "parsable", "test-only"}
    | {"wait", "wrap"}
)


def _an_option(option: str) -> str:
    name = option.removeprefix("--").partition("=")[0]
    if not option.startswith("--") or not name or name.split() != [name]:
        raise ValueError(f'{option!r} is no long option of sbatch; write it like "--partition=gpu"')
    if name in _OURS:
        raise ValueError(f"--{name} is set by finetuned itself; take it out")
    return option


class Slurm(Strict):
    """How trainers are submitted to Slurm, for `launcher` slurm."""

    options: list[Annotated[str, AfterValidator(_an_option)]] = Field(
        default_factory=list, description='Options of sbatch, such as "--partition=gpu" or "--time=4:00:00".'
    )
    template: str | None = Field(
        None,
        min_length=1,
        description="File of the script that is submitted, from the base directory on; null: finetuned's own.",
    )
    python: str | None = Field(
        None, min_length=1, description="Python with finetuned on the nodes; null: at the same path as the daemon's."
    )
    signal_seconds: int = Field(
        120,
        ge=1,
        le=65535,
        description="So long before the time limit the trainer is told to write a checkpoint; it then goes on in a new "
        "job.",
    )
