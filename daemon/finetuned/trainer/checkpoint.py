"""Checkpoints: staged in a hidden folder, the manifest with every file's hash last, one rename. What is half written
is never picked.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetuned.durable import has_room, make_folder, move, sync_tree, write_file

_MANIFEST = "manifest.json"
_WEIGHTS = "trained.safetensors"
_OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk. `step` optimizer steps are done."""

    folder: Path
    step: int
    plan: str  # fingerprint of the plan it belongs to
    extra: dict[str, Any]


def save(
    folder: Path,
    *,
    step: int,
    plan: str,
    trained: Mapping[str, torch.Tensor],
    optimizer: dict[str, Any],
    keep: int,
    extra: dict[str, Any],
    best: int | None = None,
) -> Path:
    """Write a checkpoint into `folder` and remove all but the newest `keep` and that of step `best`. `extra` is small
    and goes into the manifest.
    """
    make_folder(folder)
    target = _of(folder, step)
    staged = folder / f".{target.name}"
    for abandoned in folder.glob(".step-*"):  # by a crash, at whatever step
        shutil.rmtree(abandoned, ignore_errors=True)
    staged.mkdir()
    with full_disk_as_oserror(folder):
        save_file({name: tensor.detach().contiguous() for name, tensor in trained.items()}, staged / _WEIGHTS)
        torch.save(optimizer, staged / _OPTIMIZER)
    files = {name: _digest(staged / name) for name in (_WEIGHTS, _OPTIMIZER)}
    manifest = {"step": step, "plan": plan, "files": files, "extra": extra}
    write_file(staged / _MANIFEST, json.dumps(manifest, indent=2).encode())
    sync_tree(staged)
    shutil.rmtree(target, ignore_errors=True)  # damaged or of another plan, or it would have been resumed from
    move(staged, target)
    earlier = sorted(path for path in folder.glob("step-*") if path < target)
    later = [path for path in folder.glob("step-*") if path > target]
    for old in [*earlier[: max(0, len(earlier) + 1 - keep)], *later]:
        if best is None or old != _of(folder, best):
            shutil.rmtree(old, ignore_errors=True)
    return target


def _of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


@contextmanager
def full_disk_as_oserror(folder: Path) -> Iterator[None]:
    """Raise OSError where torch, safetensors and tokenizers say in their own ways that there is no room."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if "No space left" in str(error) or not has_room(folder):
            raise OSError(errno.ENOSPC, str(error), str(folder)) from error
        raise


def newest(folder: Path, *, plan: str, before: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Give the newest whole checkpoint of this plan, and a sentence for each newer one that was passed over.

    With `before` only those with fewer steps done count.
    """
    passed: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else ():
        found = _read(path, plan)
        if isinstance(found, Checkpoint) and before is not None and found.step >= before:
            continue
        if isinstance(found, Checkpoint):
            return found, passed
        passed.append(found)
    return None, passed


def of_step(folder: Path, step: int, *, plan: str) -> Checkpoint | str:
    """Give the checkpoint of a step, or a sentence that says why there is none."""
    return _read(_of(folder, step), plan)


def _read(path: Path, plan: str) -> Checkpoint | str:
    """Give a checkpoint if it is whole and of this plan, else a sentence."""
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        damaged = [name for name, digest in manifest["files"].items() if _digest(path / name) != digest]
        found = Checkpoint(path, int(manifest["step"]), str(manifest["plan"]), dict(manifest["extra"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path.name} is not whole ({error})"
    if damaged:
        return f"{path.name} is damaged ({', '.join(damaged)})"
    if found.plan != plan:
        return f"{path.name} belongs to another plan ({found.plan})"
    return found


def load(
    checkpoint: Checkpoint, *, device: torch.device, mapped: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint's trained weights, onto the device, and optimizer state, which the optimizer moves by itself:
    its step counts belong on the CPU. `mapped`: that state stays in its file until it is read.
    """
    weights = load_file(checkpoint.folder / _WEIGHTS, device=str(device))
    optimizer = torch.load(checkpoint.folder / _OPTIMIZER, map_location="cpu", weights_only=True, mmap=mapped)
    return weights, optimizer


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
