"""A full or read-only disk, a real one: the queue waits and says why, goes on by itself, and nothing is lost."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from conftest import chat_rows, eventually, make_home, write_config, write_jsonl
from finetuned.guard import why_waiting
from finetuned.home import Home
from finetuned.jobs import Outcome, State
from finetuned.status import gather, render
from standin_trainer import safetensors, weights_of

PAGE = 4096
_OWN_MOUNTS = 0x00020000  # CLONE_NEWNS


@pytest.fixture(scope="session")
def mounts() -> None:
    """Give this process mounts that nobody else sees and that end with it."""
    if (
        ctypes.CDLL(None).unshare(_OWN_MOUNTS)
        or subprocess.run(["mount", "--make-rprivate", "/"], check=False).returncode
    ):
        pytest.skip("mounting is not allowed here")


class Disk:
    """A disk in memory that can be filled, and whose folders can be made read-only."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
        self.filler = folder / "filler"

    @property
    def free(self) -> int:
        facts = os.statvfs(self.folder)
        return facts.f_bavail * facts.f_frsize

    def fill(self, *, leave: int = 0) -> None:
        """Leave so many bytes free."""
        with self.filler.open("ab", buffering=0) as file:
            try:
                while (size := self.free - leave) > 0:
                    file.write(bytes(min(size, 2**20)))
            except OSError:
                assert leave == 0

    def make_room(self) -> None:
        self.filler.unlink()

    def mount(self, *words: object) -> None:
        subprocess.run(["mount", *map(str, words)], check=True)

    def lock(self, folder: Path) -> None:
        """Make one folder read-only."""
        self.mount("--bind", folder, folder)
        self.mount("-o", "remount,bind,ro", folder)

    def unlock(self, folder: Path) -> None:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def disk(mounts, tmp_path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", 16 * 2**20)
    yield disk
    subprocess.run(["umount", "--lazy", disk.folder], check=True)


@pytest.fixture
def home(disk) -> Home:
    """A base directory on that disk."""
    return make_home(disk.folder / "base")


def staged(home: Home, name: str, count: int = 20, start: int = 0) -> Path:
    """Write a file that can be dropped without any room."""
    return write_jsonl(home.root / name, chat_rows(count, start=start))


FULL = ("No space left", "disk is full", "no room")


def waits(home: Home, *whats: str) -> bool:
    """Whether the daemon says that its queue waits, for one of these reasons."""
    why = why_waiting(home)
    return why is not None and any(what in why for what in whats or ("",))


def undisturbed(home: Home, name: str) -> bool:
    [archived] = home.archive.glob(f"20*/*/{name}")
    rows = archived.read_bytes().splitlines()
    weights = home.adapters / name.removesuffix(".jsonl") / "adapter_model.safetensors"
    return weights.read_bytes() == safetensors(weights_of(rows, len(rows)))


def test_wherever_on_a_jobs_way_the_disk_gets_full_the_job_waits_and_comes_through(disk, home, daemon, standin):
    """The room left decides which write is the first to fail: of the ledger, job.json, an event, the adapter, ..."""
    standin(seconds=0)
    seed = random.randrange(10**6)
    pages = random.Random(seed)
    one = daemon()
    one.says("finetuned starts")
    held = 0
    for number, most in enumerate((0, 1, 4, 12, 30, 50, 70, 90, 110)):
        name = f"x{number}.jsonl"
        file = staged(home, name, start=number)
        disk.fill(leave=PAGE * pages.randint(most // 2, most))
        file.rename(home.inbox / name)
        eventually(lambda n=number: waits(home) or len(list(home.adapters.glob("x*"))) == n + 1, why=f"seed {seed}")
        held += bool(why_waiting(home))
        disk.make_room()
        job = one.job(name)
        assert (job.outcome, job.interruptions, job.retries) == (Outcome.SUCCEEDED, 0, 0), f"seed {seed}"
        assert undisturbed(home, name), f"seed {seed}"
    assert held > 3
    eventually(lambda: not why_waiting(home), why="it goes on")
    eventually(lambda: not list(home.jobs.iterdir()), why="nothing is left behind")
    assert len(list(home.archive.glob("20*/*/x*.jsonl"))) == 9
    assert one.process.poll() is None


def test_a_disk_that_gets_full_while_it_trains_is_told_and_the_training_resumed(disk, home, daemon, standin):
    standin(seconds=0.05)
    one = daemon()
    staged(home, "x.jsonl", 60).rename(home.inbox / "x.jsonl")
    eventually(lambda: any(job.progress.get("step", 0) > 5 for job in one.jobs()), why="some steps")
    disk.fill()
    eventually(partial(waits, home, *FULL), why="it says why it waits")
    assert "waiting: " in render(gather(home))
    assert one.process.poll() is None
    disk.make_room()
    job = one.job("x.jsonl")
    assert job.outcome is Outcome.SUCCEEDED
    assert job.progress["step"] == 60
    assert undisturbed(home, "x.jsonl")
    one.says("the queue goes on")
    assert "waiting: " not in render(gather(home))


def test_an_adapter_that_finds_no_room_is_written_once_there_is_some(disk, home, daemon, standin):
    standin(weight=4 * 2**20)
    disk.fill(leave=3 * 2**20)
    one = daemon()
    staged(home, "x.jsonl").rename(home.inbox / "x.jsonl")
    eventually(partial(waits, home, *FULL), why="the trainer found no room")
    disk.make_room()
    job = one.job("x.jsonl")
    assert (job.outcome, job.retries) == (Outcome.SUCCEEDED, 0)
    assert undisturbed(home, "x.jsonl")


@pytest.mark.parametrize("name", ["jobs", "adapters", "archive"])
def test_a_folder_that_is_read_only_for_a_while_holds_the_queue(disk, home, daemon, standin, name):
    folder = getattr(home, name)
    one = daemon()
    one.says("finetuned starts")
    disk.lock(folder)
    file = staged(home, "x.jsonl")
    file.rename(home.inbox / "x.jsonl")
    eventually(partial(waits, home, "Read-only file system"), why="it says why it waits")
    one.says("Read-only file system")
    disk.unlock(folder)
    job = one.job("x.jsonl")
    assert (job.outcome, job.interruptions) == (Outcome.SUCCEEDED, 0)
    assert undisturbed(home, "x.jsonl")


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_daemon_that_starts_without_room_waits_for_it_and_goes_on_with_its_job(disk, home, daemon, standin, trouble):
    standin(seconds=0.05)
    (home.logs / "console.log").symlink_to(disk.folder.with_name("console.log"))
    one = daemon()
    staged(home, "x.jsonl").rename(home.inbox / "x.jsonl")
    trainer = eventually(lambda: one.job("x.jsonl", state=State.RUNNING).trainer_pid)
    one.stop(signal.SIGKILL)
    os.kill(trainer, signal.SIGKILL)
    if trouble == "full":
        disk.fill()
    else:
        eventually(lambda: subprocess.run(["mount", "-o", "remount,ro", disk.folder], check=False).returncode == 0)
    two = daemon()
    eventually(lambda: " waits" in two.console.read_text(), why="it says so")
    assert two.process.poll() is None
    if trouble == "full":
        disk.make_room()
    else:
        disk.mount("-o", "remount,rw", disk.folder)
    assert two.job("x.jsonl").outcome is Outcome.SUCCEEDED
    assert undisturbed(home, "x.jsonl")


def test_a_real_trainer_on_a_full_disk_waits_too(disk, home, daemon, tiny_model):
    write_config(home, model=str(tiny_model), epochs=30, checkpoint_steps=10, lora_r=2)
    one = daemon()
    staged(home, "x.jsonl", 24).rename(home.inbox / "x.jsonl")
    eventually(lambda: any(job.progress.get("step", 0) > 12 for job in one.jobs()), why="some steps")
    disk.fill()
    eventually(partial(waits, home, *FULL), why="it says why it waits")
    disk.make_room()
    job = one.job("x.jsonl")
    assert (job.outcome, job.retries, job.progress["step"]) == (Outcome.SUCCEEDED, 0, 180)
    assert json.loads((home.adapters / "x" / "finetuned.json").read_bytes())["job_id"] == job.id
