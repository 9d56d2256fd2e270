"""What settings there are, for people: name, meaning, choices and default, out of the schema of config.json. Pure."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from finetuned.config import NOT_IN_OVERRIDES, Config, TrainingSettings


def fields(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Give each setting of a table of config.json. `choices` is empty where anything may be written."""
    schema = model.model_json_schema()
    return [
        {
            "name": name,
            "description": part.get("description", ""),
            "choices": _choices(part),
            "default": _default(model, name),
        }
        for name, part in schema["properties"].items()
        if name != "$schema"
    ]


def override_fields() -> list[dict[str, Any]]:
    """Give the settings that a single file may bring."""
    left_out = NOT_IN_OVERRIDES | {"use_qlora"}  # an alias of tuning
    return [field for field in fields(TrainingSettings) if field["name"] not in left_out]


def config_fields() -> list[dict[str, Any]]:
    """Give all of config.json."""
    return fields(Config)


def _default(model: type[BaseModel], name: str) -> Any:
    default = model.model_fields[name].get_default(call_default_factory=True)
    return default.model_dump() if isinstance(default, BaseModel) else default


def _choices(part: dict[str, Any]) -> list[Any]:
    if part.get("type") == "boolean":
        return [True, False]
    branches = part.get("anyOf", [part])
    found = [branch.get("enum", [branch["const"]] if "const" in branch else None) for branch in branches]
    return [] if None in found else [choice for choices in found for choice in choices or ()]
