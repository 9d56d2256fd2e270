"""The adapter on the base model: LoRA, rank-stabilised or DoRA as the settings say, or a soft prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuned.adapters import WEIGHTS
from finetuned.config import TrainingSettings
from finetuned.errors import ConfigError
from finetuned.trainer.base import Base
from finetuned.trainer.chain import Earlier
from finetuned.trainer.precision import Precision
from finetuned.trainer.soft_prompt import add_soft_prompt
from finetuned.trainer.vision import text_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapter(
    model: PreTrainedModel,
    base: Base,
    settings: TrainingSettings,
    *,
    precision: Precision,
    earlier: Earlier | None = None,
) -> PreTrainedModel:
    """Wrap the model's layers in LoRA, or put a soft prompt before them; LoRA's first weights are those of an earlier
    adapter, or follow from the seed.

    Raises ConfigError for unknown layers, or where the earlier adapter has others.

    peft's own preparation for quantised training is not used: it raises embeddings and head to float32.
    """
    if "bitsandbytes" not in sys.modules:
        # None hides it: peft imports it wherever it is installed, a second of start-up for nothing on a dense base.
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    from peft import LoraConfig, get_peft_model

    if settings.use_dora and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
        raise ConfigError(  # each pass of peft 0.21 loses the scales of bitsandbytes' 8-bit weights there
            "DoRA on 8-bit weights needs a GPU", where="use_dora", remedy='Set "tuning" to "lora" or "qlora".'
        )
    if settings.soft_prompt:
        return add_soft_prompt(model, base, settings, precision=precision)
    torch.manual_seed(settings.seed)
    try:
        targets = text_layers(model, settings.target_modules)
        config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,  # type: ignore[arg-type, unused-ignore]
            lora_dropout=settings.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_dora=settings.use_dora,
            use_rslora=settings.use_rslora,
            task_type="CAUSAL_LM",
            base_model_name_or_path=base.name,
        )
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type, unused-ignore]
    except ValueError as error:
        raise ConfigError(
            f"no adapter can be put on this model: {error}",
            where="target_modules",
            remedy='Name its layers in "target_modules"; "all-linear" fits most models.',
        ) from error
    wrapped.peft_config["default"].base_model_name_or_path = base.name
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(precision.trained)
    if earlier is not None and earlier.folder is not None:
        _load(wrapped, earlier.folder, str(earlier))
    return wrapped  # type: ignore[return-value, unused-ignore]


def _load(wrapped: Any, folder: Path, name: str) -> None:
    """Put an earlier adapter's weights in place, in the number formats of those that are there."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS)
    has = {name: tensor.shape for name, tensor in weights.items()}
    wants = {n: t.shape for n, t in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()}
    if other := sorted(name for name, _ in has.items() ^ wants.items()):
        raise ConfigError(
            f"is on other layers: {len(other)} weights are not in both, or of another size, the first {other[0]}",
            where=f"resume_adapter {name}",
            remedy="Set target_modules as they were, or set resume_adapter to null to start fresh.",
        )
    set_peft_model_state_dict(wrapped, weights)
