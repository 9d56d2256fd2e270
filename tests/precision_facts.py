"""Train a model for a few steps in every number format, and print what its tensors really are, as JSON.

A process of its own, as bitsandbytes may be imported or hidden once in a process:
`python precision_facts.py MODEL_FOLDER TUNING DEVICE SCRATCH_FOLDER`.
"""

import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer

from conftest import chat_rows
from finetuned.config import settings_from
from finetuned.dataset.formats import check_row
from finetuned.section_settings import Predictions
from finetuned.trainer import loop
from finetuned.trainer.base import Base
from finetuned.trainer.precision import choose
from finetuned.trainer.predictions import predict
from finetuned.trainer.reporter import Reporter
from finetuned.trainer.tokens import tokenise

SETTINGS = ("auto", "bf16", "fp16", "float32")
STEPS = 8


@contextmanager
def formats(module: torch.nn.Module):
    """Collect the number formats of what a module gives."""
    seen: set[str] = set()
    hook = module.register_forward_hook(lambda _, __, output: seen.add(name(output.dtype)))
    yield seen
    hook.remove()


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gradients(training: loop.Training) -> dict[str, torch.Tensor]:
    """The gradients that a step would be taken with."""
    training._gradient(training.plan.step(0))
    found = {name: p.grad.clone() for name, p in training.trained.items() if p.grad is not None}
    training.optimizer.zero_grad(set_to_none=True)
    return found


def facts(model: str, tuning: str, setting: str, device: torch.device, folder: Path) -> dict:
    settings = settings_from(
        {"tuning": tuning, "dtype": setting, "batch_size": 8, "max_steps": STEPS, "warmup_ratio": 0}
        | {"epochs": 10, "learning_rate": 1e-3 if tuning == "full" else 5e-3},
        where="the test",
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [check_row(number, row)[1] for number, row in enumerate(chat_rows(8))]
    task = loop.Task(
        settings=settings,
        rung=settings.first_rung(),
        base=Base(model, model),
        tokenizer=tokenizer,
        train=list(tokenise(rows, tokenizer, max_length=200)),
        held_out=[],
        device=device,
        checkpoints=folder / "checkpoints",
        bounds=folder / "micro-batches.json",
        say=Reporter(folder / f"{tuning}-{setting}.jsonl"),
        asked_to_stop=lambda: False,
    )
    precision = choose(device, tuning, setting)
    training = loop.begin(task, precision)
    base = training.model
    training.settle()
    training.prepare()
    layer = next(module for path, module in base.named_modules() if path.endswith("q_proj"))
    losses, scaled_steps = [], 0
    with formats(layer) as in_training:
        for _ in range(STEPS):
            training.step()
            losses.append(training.metrics["train_loss"])
            scaled_steps += not training.optimizer.step_was_skipped
    scaler = training.accelerator.scaler
    before = gradients(training)
    with formats(layer) as in_generation:
        answers = predict(base, tokenizer, rows[:2], Predictions(max_new_tokens=4, temperature=0.5), seed=1)
    after = gradients(training)
    # A GPU adds up in another order each time.
    same = torch.equal if device.type == "cpu" else partial(torch.allclose, rtol=1e-2, atol=1e-4)
    training.step()  # after an evaluation it still trains
    frozen = {name(p.dtype) for p in base.parameters() if not p.requires_grad}
    state = [value for values in training.optimizer.state.values() for value in values.values() if value.dim()]
    AcceleratorState._reset_state(reset_partial_state=True)
    return {
        "stored": sorted(frozen),
        "trained": sorted({name(p.dtype) for p in training.trained.values()}),
        "computed": sorted(in_training),
        "optimizer": sorted({name(value.dtype) for value in state}),
        "scale": scaler.get_scale() if scaler else None,
        "generated": sorted(in_generation),
        "answers": sum(answer.error is None for answer in answers),
        "repacked": [
            path
            for path, module in base.named_modules()
            if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False)
        ],
        "unchanged": before.keys() == after.keys() and all(same(before[name], after[name]) for name in before),
        "steps_taken": scaled_steps,
        "losses": [*losses, training.metrics["train_loss"]],
        "choices": precision.choices(),
    }


if __name__ == "__main__":
    model, tuning, device, folder = sys.argv[1:]
    found = {setting: facts(model, tuning, setting, torch.device(device), Path(folder)) for setting in SETTINGS}
    sys.stdout.write("\n" + json.dumps(found) + "\n")
