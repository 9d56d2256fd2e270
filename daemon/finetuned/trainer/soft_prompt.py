"""A trainable prompt in an adapter's place: PEFT's prompt tuning (Lester et al., arXiv:2104.08691)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetuned.config import TrainingSettings
from finetuned.trainer.base import Base
from finetuned.trainer.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_soft_prompt(
    model: PreTrainedModel, base: Base, settings: TrainingSettings, *, precision: Precision
) -> PreTrainedModel:
    """Put a prompt before the model, which is frozen. It begins as the embeddings of tokens that the seed draws: far
    from those a model understands nothing.
    """
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(
        num_virtual_tokens=settings.soft_prompt, task_type="CAUSAL_LM", base_model_name_or_path=base.name
    )
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type, unused-ignore]
    wrapped.peft_config["default"].base_model_name_or_path = base.name
    table = model.get_input_embeddings().weight
    drawn = torch.randint(len(table), (settings.soft_prompt,), generator=torch.Generator().manual_seed(settings.seed))
    weight = soft_prompt(wrapped)
    weight.data = table[drawn.to(table.device)].detach().to(precision.trained).clone()
    return wrapped  # type: ignore[return-value, unused-ignore]


def soft_prompt(model: PreTrainedModel) -> torch.nn.Parameter:
    """Give the prompt, [tokens, width]."""
    weight: torch.nn.Parameter = model.prompt_encoder["default"].embedding.weight
    return weight


def soft_tokens(model: PreTrainedModel) -> int:
    """Give how many tokens of a soft prompt a model has."""
    return len(soft_prompt(model)) if getattr(model, "prompt_encoder", None) is not None else 0
