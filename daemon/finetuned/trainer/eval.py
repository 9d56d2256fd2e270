"""`python -m finetuned.trainer.eval`: models measured. `finetuned.measure` asks and prints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetuned.adapters import read_story
from finetuned.config import TrainingSettings, settings_from
from finetuned.trainer import memory
from finetuned.trainer.base import choose_tuning, find_base, load_tokenizer, quiet_libraries
from finetuned.trainer.chatting import Voice, load
from finetuned.trainer.data import Source
from finetuned.trainer.exam import Candidate, Exam, Marks, facts_of, read_exam, sit
from finetuned.trainer.layout import Layout, choose_layout
from finetuned.trainer.model import causal, load_model
from finetuned.trainer.overlap import Learned, Seen, learned_by, overlapping
from finetuned.trainer.precision import choose
from finetuned.trainer.saying import answer, say

_TOLD_SECONDS = 0.2


def examine(order: dict[str, Any]) -> dict[str, Any]:
    """Measure what is ordered, and give the facts and what each model answered to each row.

    Raises FinetunedError, OSError, and RuntimeError where memory runs out.
    """
    quiet_libraries()
    settings, file = settings_from(order["settings"], where="the settings"), Path(order["file"])
    models, archive = Path(order["models"]), order["archive"] and Path(order["archive"])
    adapters = {name: Path(folder) for name, folder in order["adapters"].items()}
    learned = _together([learned_by(one, archive) for one in adapters.values()], map(Path, order["trained_on"]))
    told = _Teller()
    exams: list[Exam] = []  # each in its model's words
    marks: list[Marks] = []
    seen: dict[int, Seen] = {}
    for name, adapter in adapters.items() or [("", None)]:
        told("loading the model", 0.0)
        if adapter is None:
            voices = [_alone(settings, models=models, base_dir=Path(order["base_dir"]))]
        else:
            voices = load(adapter, compare=not exams, model=order["model"], models=models)
            voices[-1].name = name
        if not exams:  # all sit the first one's exam
            trained = {**settings.model_dump(), **(read_story(adapter).get("settings", {}) if adapter else {})}
        exam = read_exam(
            file,
            voices[-1].tokenizer,
            system_prompt=voices[-1].system,
            max_length=trained["max_length"],
            judged=settings_from({"judge": {**trained["judge"], **order["judge"]}}, where="the command line").judge,
            max_new_tokens=order["max_new_tokens"] or trained["benchmark_tokens"],
        )
        if not exams:
            seen = overlapping(exam.rows, learned.files, lambda share: told("looking into the training data", share))
        exams.append(exam)
        marks += [sit(exam, one, kept=models.parent / "evaluations", told=told) for one in _candidates(voices)]
        del voices
        memory.give_back()
    if len(adapters) > 1:
        marks[-2:] = reversed(marks[-2:])  # it is the first one's wins that count
    return {**facts_of(exams[0], marks, learned, seen), "answers": _answers(exams[0], marks, seen)}


def _together(learned: Sequence[Learned], more: Iterable[Path]) -> Learned:
    """Give what several adapters learned from. Files that the user names stand for those that are missing."""
    named = [Source(path, path.name) for path in more]
    files = dict.fromkeys([source for one in learned for source in one.files] + named)
    return Learned(list(files), [] if named else list(dict.fromkeys(name for one in learned for name in one.missing)))


def _alone(settings: TrainingSettings, *, models: Path, base_dir: Path) -> Voice:
    """Load a model without an adapter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuning, _ = choose_tuning(settings.tuning, gpu=device.type == "cuda")
    if tuning == "full" or device.type == "cpu":
        tuning = "lora"
    base = find_base(settings, models=models, base_dir=base_dir)
    tokenizer = load_tokenizer(base, settings)
    precision = choose(device, tuning, settings.dtype)
    model = load_model(base, settings, tuning=tuning, precision=precision, device=device).eval()
    return Voice(base.name, model, tokenizer, settings.system_prompt)


def _candidates(voices: Sequence[Voice]) -> list[Candidate]:
    """Find out once for each model how batches go through it; base and adapter may be one."""
    layouts: dict[int, Layout] = {}
    found = []
    for voice in voices:
        whole = causal(voice.model)
        if id(whole) not in layouts:
            layouts[id(whole)] = choose_layout(whole, whole.dtype, name=voice.name)
        layout = layouts[id(whole)]
        found.append(Candidate(voice.name, voice.model, voice.tokenizer, layout, plain=voice.plain))
    return found


def _answers(exam: Exam, marks: Sequence[Marks], seen: Mapping[int, Seen]) -> list[dict[str, Any]]:
    """Give each question with what was wanted and what came."""
    return [
        {
            "line": exam.rows[question.row].line,
            "question": question.asked,
            "expected": question.expected,
            "seen_in_training": question.row in seen,
            "models": {
                one.name: {
                    "answer": one.answers[place].text,
                    **one.verdicts[place]._asdict(),
                    "error": one.answers[place].error,
                }
                for one in marks
            },
        }
        for place, question in enumerate(exam.questions)
    ]


class _Teller:
    """Says now and then how far it is."""

    def __init__(self) -> None:
        self._last = ("", 0.0)

    def __call__(self, doing: str, share: float) -> None:
        """Say it if it is news."""
        now = time.monotonic()
        if doing != self._last[0] or now - self._last[1] >= _TOLD_SECONDS:
            self._last = (doing, now)
            say({"doing": doing, "share": round(share, 3)})


if __name__ == "__main__":
    answer(examine, if_memory="Take a smaller model, shorter rows, or add memory.")
