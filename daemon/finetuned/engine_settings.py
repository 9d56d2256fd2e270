"""The tables `ray` and `slurm` of config.json: where jobs run that do not run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator

from finetuned.recipe_settings import Strict

Amount = Annotated[float, Field(ge=0)]

# Said by the launcher itself: what a daemon finds its job by, and one job a trainer.
_OURS = frozenset(
    {"array", "chdir", "clusters", "comment", "error", "job-name", "open-mode", "output", "parsable", "test-only"}
    | {"wait", "wrap"}
)


class Ray(Strict):
    """A Ray cluster, whose nodes see the base directory at the same path as the daemon."""

    address: str = Field("http://127.0.0.1:8265", description="Of its dashboard, where the Jobs API is.")
    token_file: Path | None = Field(
        None, description="File that holds its token, where it wants one; read each time that it is asked."
    )
    python: str | None = Field(
        None, description="The Python on its nodes that has finetuned; null: the path of the daemon's own."
    )
    across_nodes: bool = Field(
        False,
        description="Let the GPUs of one job be of several nodes, by Ray Train, which ray_python must have. Otherwise "
        "they are all of one.",
    )
    ray_python: str | None = Field(
        None, description="The Python on its nodes that has ray[train] and torch; null: the one that has finetuned."
    )
    resources: dict[str, Amount] = Field(
        default_factory=dict,
        description="What a trainer, or with across_nodes each rank of it, reserves beside its GPUs: CPU, memory in "
        "bytes, and what the cluster has names for.",
    )
    runtime_env: dict[str, Any] = Field(
        default_factory=dict, description="As Ray takes it; its env_vars are set for the trainer."
    )

    @field_validator("address")
    @classmethod
    def _is_a_web_address(cls, address: str) -> str:
        parts = urlsplit(address)
        sound = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
        if not sound or parts.query or parts.fragment:
            raise ValueError("is no address such as http://127.0.0.1:8265")
        return address.rstrip("/")

    @field_validator("resources")
    @classmethod
    def _gpus_are_named_elsewhere(cls, resources: dict[str, float]) -> dict[str, float]:
        if "GPU" in resources:
            raise ValueError("GPU is what gpus_per_job says; leave it out here")
        return resources

    @field_validator("runtime_env")
    @classmethod
    def _variables_are_text(cls, runtime_env: dict[str, Any]) -> dict[str, Any]:
        variables = runtime_env.get("env_vars", {})
        if not isinstance(variables, dict) or not all(isinstance(text, str) for text in variables.values()):
            raise ValueError("env_vars must hold names and texts")
        return runtime_env


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
