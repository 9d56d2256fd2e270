"""A small student that learns from the embedded model beside the same student that learns from the labels alone.
`make bench-distill` prints the table; some minutes on two cores that do nothing else.

The text is the language reference that comes with Python (`pydoc_data.topics`), plain text in rows of some 75 tokens.
The student begins from random weights: same weights, rows, order and steps for both. Once it has the teacher's
vocabulary, once a small one of its own, made here with the tokenizers library. What counts is the loss on rows that
neither trained on, in nats for each of the student's own tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pydoc_data.topics
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environments import CACHE

from finetuned.config import settings_from
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import Report, rows_of
from finetuned.home import Home

ROWS, HELD_OUT, WORDS = 96, 16, 40  # words in a row
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY = 4096  # of the other tokenizer
SETTINGS: dict[str, Any] = {
    "tuning": "full",
    "epochs": 1,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "system_prompt": None,
    "predictions": {"enabled": False},
    "checkpoint_minutes": 1000,
    "checkpoint_steps": 1000,
}
TAUGHT: dict[str, dict[str, Any]] = {
    "the teacher's": {"alpha": 0.5, "temperature": 1.0, "norm_steps": None},
    "one of its own": {"alpha": [0.0, 0.5], "temperature": 1.0, "norm_steps": None},
}
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95%, by the number of seeds


def main() -> None:
    """Train in pairs and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, choices=(1, *STUDENT_T))
    parser.add_argument("--only", choices=TAUGHT)
    parser.add_argument("--set", default="{}", help="settings of recipe distill in place of those here, as JSON")
    options = parser.parse_args()
    began = time.monotonic()
    print(
        f"| vocabulary | seed | teacher | labels alone | distilled | better by | retained |\n|{' --- |' * 7}",
        flush=True,
    )
    summary = []
    with tempfile.TemporaryDirectory(prefix="finetuned-bench-") as folder:
        for which, taught in TAUGHT.items():
            if options.only in {None, which}:
                pair = Pair(Path(folder), which, {**taught, **json.loads(options.set)})
                summary.append(sentence(which, [pair.gain(seed) for seed in range(options.seeds)]))
    print("\n" + "\n".join(summary) + f"\n{time.monotonic() - began:.0f} s", flush=True)


def sentence(which: str, gains: list[float]) -> str:
    """Give mean and interval of the seeds' differences, a pair each, by Student's t."""
    mean = statistics.mean(gains)
    if len(gains) == 1:
        return f"{which}: better by {mean:.4f}"
    half = STUDENT_T[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
    word = "better" if mean - half > 0 else "NOT SURELY BETTER"
    return f"{which}: {word} by {mean:.4f} nats a token, 95% interval {mean - half:.4f} to {mean + half:.4f}"


class Pair:
    """Both trainings with one vocabulary, whatever the seed. The teacher is loaded once."""

    def __init__(self, folder: Path, which: str, taught: dict[str, Any]) -> None:
        """Write the texts, make the tokenizer, find the teacher."""
        from finetuned.trainer.base import quiet_libraries
        from finetuned.trainer.distill.found import find_teacher
        from finetuned.trainer.distill.teacher import Teacher
        from finetuned.trainer.tokens import Example, tokenise

        quiet_libraries()
        self.folder, self.which = folder / which.replace(" ", "-"), which
        self.folder.mkdir()
        models = Home(CACHE).models
        models.mkdir(parents=True, exist_ok=True)
        files = write_text(self.folder)
        self.tokenizer = tokenizer_of(which, files[0], models)
        self.plain = {**SETTINGS, "model": "student"}
        self.distilled = {**self.plain, "recipe": "distill", "teacher": "smollm2-135m", "distill": taught}
        self.train, self.held_out = (
            [
                one
                for one in tokenise(
                    list(rows_of(RowFile(file, name=file.name), Report(), system_prompt=None)),
                    self.tokenizer,
                    max_length=512,
                )
                if isinstance(one, Example)
            ]
            for file in files
        )
        settings = settings_from(self.distilled, where="the benchmark")
        found = find_teacher(settings, self.tokenizer, models=models, base_dir=folder)
        self.teacher = Teacher(found) if found else None

    def gain(self, seed: int) -> float:
        """Train both from the same random weights: by how much the distilled one's held-out loss is lower."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        marks = {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.tokenizer.eos_token_id}
        config = LlamaConfig(vocab_size=len(self.tokenizer), tie_word_embeddings=True, **marks, **SIZES)
        student = self.folder / f"student-{seed}"
        LlamaForCausalLM(config).save_pretrained(student)
        plain, found = (
            self._trained(student, seed, name, values)
            for name, values in (("labels", self.plain), ("distilled", self.distilled))
        )
        gain = float(plain["valid_loss"] - found["valid_loss"])
        print(
            f"| {self.which} | {seed} | {found['teacher_valid_loss']:.4f} | {plain['valid_loss']:.4f} | "
            f"{found['valid_loss']:.4f} | {gain:.4f} | {found['retained']:.0%} |",
            flush=True,
        )
        return gain

    def _trained(self, student: Path, seed: int, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Train as a job does, in this process: the figures of the end. What it says goes to stderr."""
        import torch

        from finetuned.trainer.base import Base
        from finetuned.trainer.loop import Task, train
        from finetuned.trainer.reporter import Reporter

        settings = settings_from({**values, "seed": seed}, where="the benchmark")
        job = self.folder / f"{name}-{seed}"
        job.mkdir()
        task = Task(
            settings=settings,
            rung=settings.first_rung(),
            base=Base(str(student), "student"),
            tokenizer=self.tokenizer,
            train=self.train,
            held_out=self.held_out,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            checkpoints=job / "checkpoints",
            bounds=job / "bounds.json",
            say=Reporter(job / "events.jsonl"),
            asked_to_stop=lambda: False,
            teacher=self.teacher if settings.recipe == "distill" else None,
        )
        with contextlib.redirect_stdout(sys.stderr):
            return dict(train(task).metrics)


def write_text(folder: Path) -> tuple[Path, Path]:
    """Write rows for training and rows held out, which share no sentence: topics in a fixed order, cut by words."""
    topics = sorted(pydoc_data.topics.topics.items())
    random.Random(0).shuffle(topics)
    words = " ".join(text for _, text in topics).split()
    rows = [" ".join(words[at : at + WORDS]) for at in range(0, WORDS * (ROWS + HELD_OUT), WORDS)]
    files = folder / "text.jsonl", folder / "held-out.jsonl"
    for file, part in zip(files, (rows[HELD_OUT:], rows[:HELD_OUT]), strict=True):
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in part))
    return files


def tokenizer_of(which: str, text: Path, models: Path) -> Any:
    """Give the teacher's tokenizer, or make another: byte-level BPE, learned from the text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from finetuned.trainer import embedded

    if which == "the teacher's":
        return AutoTokenizer.from_pretrained(embedded.unpack(models))
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((json.loads(line)["text"] for line in text.read_text().splitlines()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
