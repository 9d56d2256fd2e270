"""The settings of each launcher: a table of its own in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

Amount = Annotated[float, Field(ge=0)]


class Strict(BaseModel):
    """A table that takes no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
