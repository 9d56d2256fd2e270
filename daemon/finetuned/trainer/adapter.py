"""The finished adapter: PEFT's folder, tokenizer and template, a model card, and finetuned.json last."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuned import __version__
from finetuned.adapters import LEARNED, MANIFEST
from finetuned.durable import sync_tree, write_file
from finetuned.errors import counted
from finetuned.jobs import JobSpec
from finetuned.scores import sentences, table
from finetuned.trainer.attention import without_flat
from finetuned.trainer.checkpoint import full_disk_as_oserror
from finetuned.trainer.loop import Task, Trained
from finetuned.trainer.rejection import Yield
from finetuned.trainer.vision import auto_class, copy_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors")


def write_adapter(
    folder: Path,
    spec: JobSpec,
    task: Task,
    trained: Trained,
    report: dict[str, Any],
    *,
    measured: dict[str, Any],
    learned: Path | None = None,
) -> None:
    """Write all of it into `folder`, which is made anew. `measured` is what its benchmark found, if it has one, and
    `learned` the file that was learned from, where that is not the user's own.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = trained.model
    model.config.use_cache = True
    with full_disk_as_oserror(folder):
        if hasattr(model, "peft_config"):
            model.save_pretrained(folder, save_embedding_layers=False)
        else:
            _plain(model).save_pretrained(folder, state_dict=trained.weights)
            copy_processor(task.base.source, task.settings.revision, folder)
        task.tokenizer.save_pretrained(folder)
        trained.save(folder)
        if learned is not None:
            shutil.copyfile(learned, folder / LEARNED)
    story = {
        "job_id": spec.id,
        "file": spec.name.encode("utf-8", "backslashreplace").decode(),
        "sha256": spec.sha256,
        "held_out_sha256": spec.held_out_sha256,
        "profile": spec.profile,
        "finished_at": time.time(),
        "chain": task.earlier.chain if task.earlier else [],
        "base_model": task.base.name,
        "base_model_note": task.base.note,
        "settings": task.settings.model_dump(),
        "rung": trained.rung.as_dict(),
        "choices": {**trained.choices, **_earlier(task)},
        "metrics": trained.metrics,
        **({"benchmark": measured} if measured else {}),
        "data": report,
        "versions": _versions(),
    }
    (folder / "README.md").write_text(_card(spec, task, trained, measured), encoding="utf-8")
    for path in folder.iterdir():  # transformers writes some files for the owner alone
        path.chmod(0o640)
    sync_tree(folder)  # with the manifest there, recovery takes the rest for whole
    write_file(folder / MANIFEST, json.dumps(story, indent=2, ensure_ascii=False, default=str).encode() + b"\n")


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation(without_flat(model))  # ours is not known where the model is loaded next
    return model


def _earlier(task: Task) -> dict[str, dict[str, str]]:
    return {"resume_adapter": {"choice": str(task.earlier), "reason": task.earlier.reason}} if task.earlier else {}


def _versions() -> dict[str, str]:
    versions = {"finetuned": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name()
    return versions


def _card(spec: JobSpec, task: Task, trained: Trained, measured: dict[str, Any]) -> str:
    """Give the model card, with the front matter that hubs read."""
    metrics = trained.metrics
    last, published = metrics.get("step", 0), metrics.get("published_step", 0)
    figures = [f"| {name} | {metrics[key]:.4f} |" for name, key in _FIGURES if key in metrics]
    whole = task.rung.tuning == "full"
    name = Path(os.fsencode(spec.name).decode("utf-8", "replace")).stem
    soft = task.settings.soft_prompt
    weights = "A full fine-tune" if whole else f"A soft prompt of {soft} tokens" if soft else "A LoRA adapter"
    a_step = counted(trained.rung.effective_batch, "row")
    own = [f"It learned its own answers that were right: {Yield(**one)}." for one in metrics.get("rft", [])[-1:]]
    prompt = json.dumps(task.settings.system_prompt, ensure_ascii=False)
    lines = [
        "---",
        f"base_model: {task.base.name}",
        f"library_name: {'transformers' if whole else 'peft'}",
        "pipeline_tag: text-generation",
        "tags:",
        "- finetuned",
        *([] if whole else ["- prompt-tuning" if soft else "- lora"]),
        "---",
        "",
        f"# {name}",
        "",
        f"{weights} of {task.base.name}, trained by finetuned {__version__} on `{name}`:",
        f"{counted(len(task.train), 'row')}, {counted(last, 'step')} of {a_step}.",
        *own,
        *_builds_on(task),
        *([f"This is step {published}, whose held-out loss was the lowest."] if published < last else []),
        *(["", task.base.note] if task.base.note else []),
        "",
        "| | |",
        "| --- | --- |",
        *figures,
        *_benchmark(measured),
        "",
        *_loading(task, auto_class(trained.model.config).__name__, whole=whole),
        "",
        f"System prompt in training: {prompt}. Use the same one with the model; another can cost much of what was",
        "learned. The chat template is saved beside the weights, and `finetuned.json` has every setting.",
        "",
    ]
    return "\n".join(lines)


def _builds_on(task: Task) -> list[str]:
    chain = task.earlier.chain if task.earlier else []
    if not chain:
        return []
    lines = [f"{n}. `{link['adapter']}`, on data with sha256 {link['sha256']}" for n, link in enumerate(chain, start=1)]
    return ["", "It goes on from these, the last of which gave its first weights:", "", *lines]


def _benchmark(measured: dict[str, Any]) -> list[str]:
    if "models" not in measured:
        return []
    header, *lines = (f"| {' | '.join(line)} |" for line in table(measured))
    data, judge = measured["data"], measured["judge"]["kind"]
    told = f"Measured on `{data['file']}` ({data['rows']} rows, answers judged by {judge}), with 95% intervals:"
    items = [f"- {sentence}" for sentence in sentences(measured)]
    return ["", told, "", header, "| --- " * len(table(measured)[0]) + "|", *lines, "", *items]


_FIGURES = (
    ("loss of the last step", "train_loss"),
    ("held-out loss before", "valid_loss_before"),
    ("held-out loss after", "valid_loss"),
    ("the teacher's held-out loss", "teacher_valid_loss"),
    ("share of the teacher's gain that was retained", "retained"),
)


def _loading(task: Task, auto: str, *, whole: bool) -> list[str]:
    """Give lines that run as they are, in the adapter's folder."""
    base, said = task.base.name, [{"role": "user", "content": "Hello"}]
    if task.settings.system_prompt:
        said.insert(0, {"role": "system", "content": task.settings.system_prompt})
    prompt = (
        [
            f"chat = {json.dumps(said, ensure_ascii=False)}",
            "prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)",
        ]
        if task.tokenizer.chat_template
        else ['prompt = "Once"  # it goes on with a text']
    )
    model = (
        [f"model = {auto}.from_pretrained(folder)"]
        if whole
        else [
            f'model = {auto}.from_pretrained("{base}")  # or the folder where you have it',
            "model = PeftModel.from_pretrained(model, folder)",
        ]
    )
    return [
        "```python",
        *([] if whole else ["from peft import PeftModel"]),
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'folder = "."  # this one',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *model,
        *prompt,
        'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        "```",
    ]
