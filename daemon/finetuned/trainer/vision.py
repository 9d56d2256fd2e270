"""Models that also see: which class loads them, and what of them stays as it is. Rows are text, so the text decoder
alone is trained.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.utils import cached_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def auto_class(config: PreTrainedConfig) -> Any:
    """Give the class that loads a model with this configuration."""
    sees_alone = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForImageTextToText if sees_alone else AutoModelForCausalLM


def tower(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Give the parameters that are not the text decoder's, nor its embeddings' or head's. A text model has none."""
    if model.config.get_text_config() is model.config:
        return []
    text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(parameter) for module in text if module is not None for parameter in module.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in own]


def text_layers(model: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    """Give `target_modules` so that no layer outside the text decoder gets an adapter, whatever its name."""
    if model.config.get_text_config() is model.config:
        return targets
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    [prefix] = [name for name, module in model.named_modules() if module is decoder]
    layers = [
        f"{prefix}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    if isinstance(targets, str):
        return layers
    chosen = [layer for layer in layers if any(f".{layer}".endswith(f".{target}") for target in targets)]
    if not chosen:
        raise ValueError(f"the text decoder has no layer named {' or '.join(targets)}")
    return chosen


def copy_processor(source: str, revision: str | None, folder: Path) -> None:
    """Put what turns images into tokens beside a whole model's weights: it is the base model's own."""
    for name in _PROCESSOR:
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if found := cached_file(source, name, revision=revision or "main", **quiet):
            shutil.copyfile(found, folder / name)
