"""Recipe rft in a job: answers are made and chosen (`rejection.py`), then learned from, in one round or several.

What a killed attempt has made stands in the folder of the checkpoints, and goes where they go. Each round trains anew
from the same first weights, on what the model of the round before answered: as in STaR, arXiv:2203.14465, so that the
errors of a round are not built upon.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finetuned.config import TrainingSettings
from finetuned.dataset import needs
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import Report, rows_of
from finetuned.dataset.rows import Row
from finetuned.durable import make_folder, sha256_of, write_file
from finetuned.events import EventType
from finetuned.fallback import Rung
from finetuned.findings import WARNINGS
from finetuned.trainer import memory
from finetuned.trainer.data import check_sides
from finetuned.trainer.door import Door
from finetuned.trainer.generate import key_of
from finetuned.trainer.loop import Task, Trained, fitting, load, train
from finetuned.trainer.precision import choose
from finetuned.trainer.rejection import Yield, ask_and_keep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLD_SECONDS = 2.0  # at most so often it is said how many answers there are


@dataclass(frozen=True)
class Questions:
    """The file whose questions are answered."""

    file: Path
    name: str
    learnable: frozenset[int]  # identities of the rows that may be trained on

    def rows(self, settings: TrainingSettings) -> list[Row]:
        """Read them; what is wrong has been told before. Raises DataError or OSError."""
        rows = rows_of(RowFile(self.file, name=self.name), Report(), system_prompt=None)
        return [row for row in needs.suited(rows, settings, Report()) if row.hashes()[0] in self.learnable]


class Round:
    """What a round keeps on disk."""

    def __init__(self, number: int, folder: Path, settings: TrainingSettings, rung: Rung) -> None:
        self.number = number
        # What a retry may have changed: then its answers are others, and are judged and chosen in another way.
        self._settings = key_of(settings.model_dump_json(exclude={"rft": {"least_yield", "rounds"}}))
        first = f"{settings.model} {settings.revision} {settings.resume_adapter} {rung.tuning} {rung.max_length}"
        self.made_by = first if number == 1 else self._settings
        self.answers = folder / f"round-{number}.answers.jsonl"  # as they come
        self.kept = folder / f"round-{number}.jsonl"  # what is learned from
        self._yield = folder / f"round-{number}.json"

    @property
    def done(self) -> bool:
        """Whether all its answers are made and chosen."""
        return self._yield.exists() and json.loads(self._yield.read_bytes())["settings"] == self._settings

    def conclude(self, found: Yield) -> None:
        """Keep what came of it, last."""
        write_file(self._yield, json.dumps({"settings": self._settings, "found": found.as_dict()}).encode())

    def found(self) -> Yield:
        """Give what came of it."""
        return Yield(**json.loads(self._yield.read_bytes())["found"])


def train_in_rounds(task: Task, questions: Questions, *, cache: Path) -> tuple[Task, Trained, Path]:
    """Make answers and train on them, round by round: the last round's task, what came out, and what it learned from.

    Raises what `train` raises, and DataError where too few answers are right.
    """
    settings, group = task.settings, task.group
    folder = task.checkpoints / "rft"
    make_folder(folder)
    rounds = [Round(number, folder, settings, task.rung) for number in range(1, settings.rft.rounds + 1)]
    door = Door(task.tokenizer, settings.model_copy(update={"recipe": "sft"}), cache=cache)
    # A round that is done does not need the one before it any more.
    number = group.told(lambda: max((one.number for one in rounds if one.done), default=1))
    of_round, trained = task, None
    for this in rounds[number - 1 :]:
        if not group.told(partial(getattr, this, "done")):
            if group.leads:
                _make_answers(this, of_round, questions, trained.model if trained else None)
            group.wait()
        trained = None  # its model leaves room for the next
        _give_back()
        found = this.found()
        task.say.say(EventType.MESSAGE, f"round {this.number} of {len(rounds)}: {found}", found=found.as_dict())
        found.judge(settings.rft, name=questions.name)
        with group.leader_first():
            examples, report = door.read(this.kept, name=f"{questions.name}, round {this.number}")
        if cut := report.warnings.get("rows_cut"):
            task.say.warn(cut.sentence("rows_cut", WARNINGS["rows_cut"].remedy, rows=report.good_rows))
        check_sides(examples.cut_to(of_round.rung.max_length), None, settings, name=questions.name)
        of_round = replace(
            of_round,
            train=examples.cut_to(of_round.rung.max_length),
            held_out=[],  # its loss is that of other answers than those that are learned
            checkpoints=task.checkpoints / f"round-{this.number}-{sha256_of(this.kept)[:8]}",
        )
        trained = train(of_round)
        trained.metrics["rft"] = [one.found().as_dict() for one in rounds if one.done]
        of_round = replace(of_round, rung=trained.rung)
    assert trained is not None
    return of_round, trained, this.kept


def _make_answers(this: Round, task: Task, questions: Questions, model: PreTrainedModel | None) -> None:
    """Ask all questions, by the model of the round before or the one that training begins with."""
    say, settings = task.say, task.settings
    rows, seed = questions.rows(settings), settings.seed * 1_000_003 + this.number
    judge, why = settings.judge.settle(row.messages[-1].content for row in rows)
    say.phase(
        "generating",
        f"round {this.number}: making answers to the questions of {questions.name}, judged by {judge.kind} ({why})",
        counted=f"round {this.number}",  # in place of how far another round was
    )
    if model is None:
        precision = choose(task.device, task.rung.tuning, settings.dtype)
        with fitting(task):
            model, _ = load(task, precision)
    told = time.monotonic()

    def tell(made: int, wanted: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _TOLD_SECONDS:
            told = time.monotonic()
            far = f"round {this.number}: {made:,} of {wanted:,}"
            say.phase("generating", f"{far} answers made", counted=far)

    with fitting(task):
        found = ask_and_keep(
            model,
            task.tokenizer,
            rows,
            settings,
            seed=seed,
            made_by=this.made_by,
            answers=this.answers,
            out=this.kept,
            tell=tell,
            asked_to_stop=task.asked_to_stop,
        )
    this.conclude(found)


def _give_back() -> None:
    gc.collect()
    memory.give_back()
