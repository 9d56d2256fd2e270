"""Distillation from end to end: a third of the embedded model learns from the whole of it.

It makes a base directory, puts a student and a text there, drops the text into the inbox and lets the daemon train it.
The student is every third layer of SmolLM2-135M; the text is from the language reference that comes with Python.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from finetuned.home import Home

ROWS, HELD_OUT, WORDS = 192, 16, 40  # words in a row
EVERY = 3  # layer of the teacher is one of the student
SETTINGS = {
    "$schema": "./config.schema.json",
    "model": "student",
    "recipe": "distill",
    "teacher": "smollm2-135m",
    "distill": {"alpha": 0.5, "temperature": 2.0, "hidden_weight": [0.1, 0.0]},
    "tuning": "lora",
    "learning_rate": 1e-3,
    "epochs": 1,
    "batch_size": 8,
    "eval_steps": 12,
    "predictions": {"enabled": False},
    "web": {"enabled": False},
}


def main() -> None:
    """Make it all, train, and say what was retained."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="finetuned-distill-"))
    finetuned = [sys.executable, "-m", "finetuned"]
    subprocess.run([*finetuned, "init", str(root)], check=True)
    make_student(root)
    (root / "config.json").write_text(json.dumps(SETTINGS, indent=2))
    texts = write_texts(root / "text")
    subprocess.run([*finetuned, "check", str(texts), "--base-dir", str(root)], check=True)
    subprocess.run(
        [
            *finetuned,
            "add",
            str(texts),
            "--eval-file",
            str(texts.with_name("text.eval.jsonl")),
            "--base-dir",
            str(root),
        ],
        check=True,
    )
    subprocess.run([*finetuned, "run", "--once", "--base-dir", str(root)], check=True)
    metrics = json.loads((root / "adapters" / "text" / "finetuned.json").read_text())["metrics"]
    before, after, teacher = (metrics[name] for name in ("valid_loss_before", "valid_loss", "teacher_valid_loss"))
    print(f"\nHeld-out loss of the student: {before:.4f} before, {after:.4f} after; of its teacher: {teacher:.4f}")
    print(f"Retained of what the teacher is better by: {metrics['retained']:.0%}")
    print(f"The adapter: {root / 'adapters' / 'text'}, on {root / 'student'}")


def make_student(root: Path) -> None:
    """Write every third layer of the embedded model as a model of its own, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetuned.trainer import embedded

    folder = embedded.unpack(Home(root).models)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    kept = model.model.layers[EVERY - 1 :: EVERY]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = kept
    model.config.num_hidden_layers = len(kept)
    model.config.layer_types = None
    model.save_pretrained(root / "student")
    AutoTokenizer.from_pretrained(folder).save_pretrained(root / "student")


def write_texts(folder: Path) -> Path:
    """Write text.jsonl, and text.eval.jsonl beside it, which share no sentence."""
    folder.mkdir(exist_ok=True)
    topics = sorted(pydoc_data.topics.topics.items())
    random.Random(0).shuffle(topics)
    words = " ".join(text for _, text in topics).split()
    rows = [" ".join(words[at : at + WORDS]) for at in range(0, WORDS * (ROWS + HELD_OUT), WORDS)]
    for name, part in (("text.eval.jsonl", rows[:HELD_OUT]), ("text.jsonl", rows[HELD_OUT:])):
        (folder / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in part))
    return folder / "text.jsonl"


if __name__ == "__main__":
    main()
