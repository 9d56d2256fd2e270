"""The line in which a training says, before its first step, what it will do; and the same as figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from finetuned.errors import counted
from finetuned.trainer.vision import tower

if TYPE_CHECKING:
    from finetuned.trainer.loop import Training


def start_line(training: Training) -> tuple[str, dict[str, Any]]:
    """Give the sentence and its figures."""
    task, plan, layout, rung = training.task, training.plan, training.layout, training.rung
    parameters = count(training.model.parameters())
    trainable = count(p for p in training.model.parameters() if p.requires_grad)
    beside = count(training.trained.values()) - trainable  # what the recipe trains with the model
    vision = count(tower(training.model.get_base_model() if hasattr(training.model, "peft_config") else training.model))
    tokens, supervised = sum(training.lengths), sum(example.targets for example in task.train)
    bound = training.bound
    most_tokens = bound.size(training.largest(bound), training.lengths)
    attention = training.model.config._attn_implementation  # noqa: SLF001, there is no public way to ask
    formats = {name: training.choices[name]["choice"] for name in ("weights", "trained", "dtype")}
    sentence = (
        f"plan: {counted(plan.total_steps, 'step')} of {counted(plan.effective_batch, 'row')} ({rung}), "
        f"micro-batches of at most {counted(rung.batch_size, 'row')} and {most_tokens} tokens; "
        f"{counted(plan.examples, 'row')}, {tokens} tokens of which {supervised} supervised; "
        f"{rung.tuning}: {trainable:,} of {parameters:,} parameters trainable"
        f"{f' in a soft prompt of {soft} tokens' if (soft := task.settings.soft_prompt) else ''}"
        f"{f', and {beside:,} beside them' if beside else ''}"
        f"{f', {vision:,} vision parameters frozen' if vision else ''}; "
        f"{task.device}{f', {ranks} processes' if (ranks := training.group.size) > 1 else ''}, "
        f"base in {formats['weights']}, trained in {formats['trained']}, "
        f"computed in {formats['dtype']}; {layout} rows, attention {attention}: {layout.reason}"
    )
    return sentence, {
        "total_steps": plan.total_steps,
        "rows": plan.examples,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "frozen_vision_parameters": vision,
        "method": rung.tuning,
        "micro_batch": {"rows": rung.batch_size, "tokens": most_tokens},
        "attention": attention,
        "device": str(task.device),
        "processes": training.group.size,
        "rung": rung.as_dict(),
        "choices": training.choices,
    }


def count(parameters: Iterable[torch.Tensor]) -> int:
    """Count parameters; a 4-bit one holds two in each byte."""
    return sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in parameters)
