"""A data file and its held-out file, dropped side by side: a real daemon whose trainer computes nothing."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import chat_rows, eventually, write_jsonl
from finetuned.control import order
from finetuned.drop import add
from finetuned.errors import HomeError
from finetuned.jobs import Outcome, State
from finetuned.spool.orders import Verb
from finetuned.status import gather, render


@pytest.fixture
def drop(home, standin):
    def put(name: str, count: int, *, start: int = 0) -> bytes:
        staged = write_jsonl(home.root / "staged", chat_rows(count, start=start))
        content = staged.read_bytes()
        staged.rename(home.inbox / name)
        return content

    return put


def finetuned(home, *words: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "finetuned", words[0], "--base-dir", str(home.root), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in {"job.json", "reason.json"}}


def test_both_files_end_beside_each_other_in_the_archive(home, daemon, drop):
    (home.inbox / "x.config.json").write_text('{"epochs": 2}')
    both = {"x.eval.jsonl": drop("x.eval.jsonl", 3, start=100), "x.jsonl": drop("x.jsonl", 5)}
    one = daemon("--once")
    assert one.process.wait(60) == 0
    [job] = one.jobs()
    assert job.outcome is Outcome.SUCCEEDED
    [folder] = home.archive.glob(f"20*/{job.id}")
    assert contents(folder) == {**both, "overrides.json": b'{"epochs": 2}'}
    with sqlite3.connect(home.ledger) as ledger:
        said = [row[0] for row in ledger.execute("SELECT message FROM events")]
    assert "3 rows held out" in said, "the trainer found it"
    assert list(home.inbox.iterdir()) == list(home.jobs.iterdir()) == []


def test_both_files_of_a_failed_job_are_tried_again(home, daemon, drop, standin):
    standin(end=65)
    both = {"x.eval.jsonl": drop("x.eval.jsonl", 3, start=100), "x.jsonl": drop("x.jsonl", 5)}
    one = daemon()
    job = one.job("x.jsonl")
    assert job.outcome is Outcome.FAILED
    assert contents(home.failed / job.id) == both
    one.stop()
    standin(end="")
    two = daemon()
    order(home, Verb.RETRY, job.id)
    done = eventually(
        lambda: (found := two.job("x.jsonl")).outcome is Outcome.SUCCEEDED and found, why="the second try"
    )
    [folder] = home.archive.glob(f"20*/{done.id}")
    assert contents(folder) == both
    assert not (home.failed / job.id).exists()


def test_a_held_out_file_that_waits_for_its_data_is_named_and_taken_when_that_comes(home, daemon, drop):
    drop("x.eval.jsonl", 3, start=100)
    one = daemon()
    one.says("waits for its data file")
    assert "x.eval.jsonl is held-out data by its name" in render(gather(home))
    assert one.jobs() == []
    drop("x.jsonl", 5)
    assert one.job("x.jsonl").held_out == b"x.eval.jsonl"


def test_the_same_data_with_other_held_out_data_is_trained_again(home, daemon, drop):
    one = daemon()
    for name, start in (("a", 100), ("b", 200), ("c", 200)):
        drop(f"{name}.eval.jsonl", 3, start=start)
        drop(f"{name}.jsonl", 5)
        one.job(f"{name}.jsonl")
    jobs = {job.name: job for job in one.jobs()}
    assert jobs[b"b.jsonl"].duplicate_of is None
    assert jobs[b"c.jsonl"].duplicate_of == jobs[b"b.jsonl"].id


def test_add_copies_both_under_names_that_are_free(home, daemon, standin, tmp_path):
    (tmp_path / "other").mkdir()
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(5))
    held_out = write_jsonl(tmp_path / "other" / "x.jsonl", chat_rows(3, start=100))
    words = ("add", str(data), "--eval-file", str(held_out))
    places = [finetuned(home, *words, "--set", "epochs=2").strip(), finetuned(home, *words).strip()]
    assert [Path(place).name for place in places] == ["x.jsonl", "x-2.jsonl"]
    assert sorted(path.name for path in home.inbox.iterdir()) == [
        "x-2.eval.jsonl",
        "x-2.jsonl",
        "x.config.json",
        "x.eval.jsonl",
        "x.jsonl",
    ]
    one = daemon("--once")
    assert one.process.wait(60) == 0
    for job in one.jobs():
        [folder] = home.archive.glob(f"20*/{job.id}")
        here = contents(folder)
        assert here[job.name.decode()] == data.read_bytes()
        assert here[job.held_out.decode()] == held_out.read_bytes()


def test_add_takes_back_what_lay_beside_where_another_file_came_first(home, tmp_path, monkeypatch):
    def came_first(partial: Path, target: Path, link=os.link) -> None:
        if target.name == "x.jsonl":
            target.write_text("theirs")
        link(partial, target)

    monkeypatch.setattr(os, "link", came_first)
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(1))
    assert add(home, data, profile="", settings={"epochs": 2}, held_out=data).name == "x-2.jsonl"
    theirs, ours = {"x.jsonl"}, {"x-2.jsonl", "x-2.eval.jsonl", "x-2.config.json"}
    assert {path.name for path in home.inbox.iterdir()} == theirs | ours


@pytest.mark.parametrize("which", ["x.eval.jsonl", "x.jsonl"])
def test_add_leaves_nothing_where_there_is_room_for_one_of_both_only(home, tmp_path, monkeypatch, which):
    def full(partial: Path, target: Path, link=os.link) -> None:
        if target.name == which:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        link(partial, target)

    monkeypatch.setattr(os, "link", full)
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(1))
    with pytest.raises(HomeError, match="No space left"):
        add(home, data, profile="", settings={"epochs": 2}, held_out=data)
    assert list(home.inbox.iterdir()) == []


@pytest.mark.parametrize("there", ["x.eval.json", "x.eval.jsonl", "x.config.json", "x.jsonl.gz"])
def test_add_pairs_nothing_with_what_lies_in_the_inbox_already(home, tmp_path, there):
    (home.inbox / there).write_text("{}")
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(1))
    finetuned(home, "add", str(data), "--eval-file", str(data))
    assert {path.name for path in home.inbox.iterdir()} == {there, "x-2.jsonl", "x-2.eval.jsonl"}


@pytest.mark.parametrize(
    ("data", "held_out", "said"),
    [
        ("x.jsonl", "notes.txt", "notes.txt: is not a file of rows"),
        ("x.eval.jsonl", "y.jsonl", "is held-out data by its name"),
    ],
)
def test_add_refuses_held_out_data_that_the_daemon_would_not_take(home, tmp_path, data, held_out, said):
    for name in (data, held_out):
        write_jsonl(tmp_path / name, chat_rows(1))
    assert said in finetuned(home, "add", str(tmp_path / data), "--eval-file", str(tmp_path / held_out), code=78)
    assert not list(home.inbox.iterdir())


def test_status_says_of_which_held_out_file_a_job_is(home, daemon, drop, standin):
    drop("x.eval.jsonl", 3, start=100)
    drop("x.jsonl", 5)
    lying = gather(home)["inbox"]
    assert [(Path(one["path"]).name, one["what"]) for one in lying] == [
        ("x.jsonl", "waits until it and x.eval.jsonl are whole and quiet")
    ]
    finetuned(home, "pause")
    one = daemon()
    job = one.job("x.jsonl", state=State.QUEUED)
    [queued] = json.loads(finetuned(home, "status", "--json"))["queue"]
    assert (queued["id"], queued["held_out"]) == (job.id, "x.eval.jsonl")
