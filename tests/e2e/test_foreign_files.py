"""Files with names made to do harm, and who may read what comes of them: a real daemon."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.errors import harmless
from finetuned.home import safe_name
from finetuned.jobs import Outcome, State
from test_foreign import NAMES


def outside(root, base) -> set[str]:
    return {str(path) for path in root.rglob("*") if not path.is_relative_to(base)}


def test_files_of_any_name_come_through_and_stay_in_their_folders(home, daemon, standin, tmp_path):
    standin(seconds=0.001)
    write_config(home, rescan_seconds=1)
    before = outside(tmp_path, home.root)
    names = [name for name in NAMES if not name.startswith(b".")]
    for number, name in enumerate(names):
        staged = write_jsonl(home.root / "staged", chat_rows(2, start=10 * number))
        staged.rename(home.inbox / os.fsdecode(name))
    one = daemon()
    eventually(lambda: len([j for j in one.jobs() if j.state is State.FINISHED]) == len(names), why="all of them")
    for job in one.jobs():
        assert job.outcome is Outcome.SUCCEEDED
        [archived] = [path for path in home.archive.glob(f"20*/{job.id}/*") if path.name != "job.json"]
        assert os.fsencode(archived.name) == job.name
        assert (home.adapters / str(job.adapter) / "finetuned.json").is_file()
        assert home.job_log(job.id).is_file()
        assert job.id.startswith(safe_name(job.name))
    assert {job.name for job in one.jobs()} == set(names)
    assert len(list(home.adapters.iterdir())) == len(names) + 1  # and latest
    assert outside(tmp_path, home.root) == before
    command = [sys.executable, "-m", "finetuned", "status", "--json", "--base-dir", str(home.root)]
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for text in (status, one.log(), one.console.read_text()):
        assert harmless(text) == text
    assert "\\x1b[31m" in one.log()
    assert one.stop() == 0


def modes(root) -> dict[str, int]:
    found = {}
    for path in root.rglob("*"):
        try:
            facts = path.lstat()
        except OSError:  # gone in the meantime
            continue
        if not stat.S_ISLNK(facts.st_mode):
            found[str(path.relative_to(root))] = stat.S_IMODE(facts.st_mode)
    return found


def test_others_than_owner_and_group_may_read_nothing_of_what_is_made(daemon, home, tiny_model, tmp_path):
    base = tmp_path / "made"
    before = os.umask(0)
    try:
        subprocess.run([sys.executable, "-m", "finetuned", "init", str(base)], check=True, capture_output=True)
        home = type(home)(base)
        os.umask(0o022)
        write_config(home, model=str(tiny_model), checkpoint_steps=1)
        mine = write_jsonl(base / "staged", chat_rows(8)).rename(home.inbox / "x.jsonl")
        mine.chmod(0o644)
        write_jsonl(base / "staged", [1]).rename(home.inbox / "bad.jsonl")
        os.umask(0)
        seen: dict[str, int] = {}
        command = [sys.executable, "-m", "finetuned", "run", "--once", "--base-dir", str(base)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as one:
            while one.poll() is None:
                seen |= modes(base)
                time.sleep(0.1)
        seen |= modes(base)
    finally:
        os.umask(before)
    theirs = ("x.jsonl", "bad.jsonl", "config.json", "input.jsonl", "staged")  # made by users: their business
    wrong = {path: oct(mode) for path, mode in seen.items() if mode & 0o027 and not path.endswith(theirs)}
    assert wrong == {}
    kinds = ["adapters/x/adapter_model.safetensors", ".finetuned/state.db", "reason.json", "events.jsonl", "lock"]
    kinds += ["optimizer.pt", "checkpoints", "job.json", ".log", "out.1"]
    for kind in kinds:
        assert any(path.endswith(kind) for path in seen), kind
