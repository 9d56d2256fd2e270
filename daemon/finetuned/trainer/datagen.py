"""`python -m finetuned.trainer.datagen`: answers made and chosen. `finetuned.datagen` asks and prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from finetuned.config import settings_from
from finetuned.dataset import needs
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import Report, judge, rows_of
from finetuned.trainer.base import choose_tuning, find_base, load_tokenizer, quiet_libraries
from finetuned.trainer.model import load_model
from finetuned.trainer.precision import choose
from finetuned.trainer.rejection import ask_and_keep
from finetuned.trainer.saying import answer, say

_TOLD_SECONDS = 0.2  # at most so often it is said how far the asking is
IF_MEMORY = (  # in batches of one question
    "Set rft.max_new_tokens lower, shorten rft.examples or the longest questions, or take a smaller model or qlora."
)


def make(order: dict[str, Any]) -> dict[str, Any]:
    """Ask all questions and keep what is right.

    Raises FinetunedError, OSError, and RuntimeError where memory runs out.
    """
    quiet_libraries()
    file, out = Path(order["file"]), Path(order["out"])
    settings = settings_from({**order["settings"], "recipe": "rft"}, where="the settings").settled()
    report = Report()
    rows = list(needs.suited(rows_of(RowFile(file, name=file.name), report, system_prompt=None), settings, report))
    judge(report, name=file.name, max_bad_rows=settings.max_bad_rows, fail_on=settings.fail_on)
    say({"doing": f"loading {settings.model}"})
    base = find_base(settings, models=Path(order["models"]), base_dir=Path(order["base_dir"]))
    tokenizer = load_tokenizer(base, settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuning, _ = choose_tuning(settings.tuning, gpu=device.type == "cuda")
    precision = choose(device, "lora" if tuning == "full" else tuning, settings.dtype)
    model = load_model(base, settings, tuning=precision.tuning, precision=precision, device=device)
    told = 0.0

    def tell(made: int, wanted: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _TOLD_SECONDS:
            told = time.monotonic()
            say({"doing": "making answers", "share": made / wanted, "counted": f"{made:,} of {wanted:,}"})

    by, why = settings.judge.settle(row.messages[-1].content for row in rows)
    answers = out.with_name(f"{out.name}.answers")
    made_by = f"{settings.model} {settings.revision}"
    found = ask_and_keep(
        model, tokenizer, rows, settings, seed=settings.seed, made_by=made_by, answers=answers, out=out, tell=tell
    )
    if found.kept:
        answers.unlink(missing_ok=True)
    sentence = f"{found}, judged by {by.kind} ({why})"
    advice = "" if found.kept else f"{found.advice} What it answered is in {answers.name}."
    return {"found": found.as_dict(), "sentence": sentence, "advice": advice, "bad_rows": report.bad_rows}


if __name__ == "__main__":
    answer(make, if_memory=IF_MEMORY)
