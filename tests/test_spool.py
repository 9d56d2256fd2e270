"""The spool protocol on real folders and a real ledger: where a file is after every step and every crash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from conftest import chat_rows
from finetuned.config import Config
from finetuned.errors import FinetunedError
from finetuned.home import Home
from finetuned.jobs import Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.spool import orders
from finetuned.spool.claim import claim, enqueue, files_to_hash, fingerprint, input_path, read_spec, write_spec
from finetuned.spool.inbox import Found
from finetuned.spool.publish import BadOutputError, archive, fail, publish
from finetuned.spool.recover import MOST_INTERRUPTIONS, recover
from finetuned.status import gather, render
from test_settle import without_privileges

CONTENT = "".join(json.dumps(row) + "\n" for row in chat_rows(3)).encode()
REASON = {"code": "bad_data", "what": "it broke", "where": "x.jsonl:3", "remedy": "Mend it."}
WEIGHTS = save({"lora_A": np.zeros((2, 4), np.float32), "lora_B": np.ones((4, 2), np.float32)})


def no_orphan(job: Job) -> None:
    raise AssertionError(f"{job.id} has no trainer")


class Spool:
    """The daemon's steps, one at a time."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.config = Config()
        self.ledger = Ledger.open(self.home.ledger)

    def reopen(self) -> None:
        """Forget all but what is on the disk, as a crash does."""
        self.ledger.close()
        self.ledger = Ledger.open(self.home.ledger)

    def lose_the_ledger(self) -> None:
        self.ledger.close()
        for path in self.home.machinery.glob("state.db*"):
            path.unlink()
        self.ledger = Ledger.open(self.home.ledger)

    def recover(self, stop_orphan: Callable[[Job], None] = no_orphan) -> None:
        """Recover after a crash; doing so once more must change nothing."""
        self.reopen()
        recover(self.ledger, self.home, stop_orphan=stop_orphan)
        after = self.snapshot()
        self.reopen()
        recover(self.ledger, self.home, stop_orphan=stop_orphan)
        assert self.snapshot() == after

    def snapshot(self) -> tuple[list[Job], dict[str, bytes]]:
        return self.ledger.jobs(*State), tree(self.home)

    def jobs(self) -> list[Job]:
        return self.ledger.jobs(*State)

    def drop(self, name: str | bytes = "x.jsonl", content: bytes = CONTENT, *, override: object = None) -> Found:
        path = self.home.inbox / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        found = Found(path, path.parent.name if path.parent != self.home.inbox else "")
        if override is not None:
            found.override.write_text(json.dumps(override))
        return found

    def claim(self, name: str | bytes = "x.jsonl", content: bytes = CONTENT, *, override: object = None) -> Job:
        return claim(self.ledger, self.home, self.drop(name, content, override=override), self.config)

    def enqueue(self, job: Job) -> Job:
        results = [fingerprint(path) for path in files_to_hash(self.home, job)]
        assert None not in results
        return enqueue(self.ledger, self.home, self.config, job, *(result[1] for result in results if result))

    def start(self, job: Job) -> Job:
        job = self.ledger.update(job.id, state=State.RUNNING, attempt=job.attempt + 1, started_at=time.time())
        write_spec(self.home, job)
        return job

    def train(self, job: Job, *, weights: bytes = WEIGHTS, manifest: object = None) -> Job:
        """Leave what a trainer leaves."""
        staged = self.home.job(job.id).staged_adapter(job.attempt)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        (staged / "adapter_config.json").write_text("{}")
        (staged / "adapter_model.safetensors").write_bytes(weights)
        (staged / "finetuned.json").write_text(json.dumps({"job_id": job.id} if manifest is None else manifest))
        return job

    def running(self, name: str | bytes = "x.jsonl", content: bytes = CONTENT, *, override: object = None) -> Job:
        return self.start(self.enqueue(self.claim(name, content, override=override)))

    def publish(self, job: Job) -> Job:
        return publish(self.ledger, self.home, job)

    def archive(self, job: Job) -> Job:
        return archive(self.ledger, self.home, job)

    def fail(self, job: Job, reason: dict[str, str] | None = None) -> Job:
        return fail(self.ledger, self.home, job, reason)

    def trained_and_archived(self, name: str | bytes = "x.jsonl", content: bytes = CONTENT) -> Job:
        return self.archive(self.publish(self.train(self.running(name, content))))

    def job_folder(self, job: Job) -> Path:
        return self.home.job(job.id).path

    def archived(self, job: Job) -> Path:
        """Where a finished job's input is."""
        (folder,) = self.home.archive.glob(f"*/{job.id}")
        return folder / os.fsdecode(job.name)


def tree(home: Home) -> dict[str, bytes]:
    """Every file and folder of the base directory but the ledger, with what is in it."""
    found = {}
    for path in home.root.rglob("*"):
        if path.is_symlink():
            found[str(path)] = os.fsencode(path.readlink())
        elif not path.name.startswith("state.db"):
            found[str(path)] = path.read_bytes() if path.is_file() else b"<folder>"
    return found


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def spool(home) -> Iterator[Spool]:
    spool = Spool(home)
    yield spool
    spool.ledger.close()


# -- from the inbox into the queue


def test_a_claimed_file_lies_in_its_jobs_folder_beside_its_job_json(spool, home):
    found = spool.drop()
    before = found.path.stat()
    job = claim(spool.ledger, home, found, spool.config)
    assert list(home.inbox.iterdir()) == []
    assert files(home.job(job.id).path) == ["input.jsonl", "job.json"]
    assert input_path(home, job).read_bytes() == CONTENT
    assert input_path(home, job).stat().st_ino == before.st_ino
    assert spool.jobs() == [job]
    assert job.state is State.CLAIMING
    assert (job.identity.inode, job.identity.size) == (before.st_ino, len(CONTENT))


def test_job_json_holds_all_that_a_trainer_needs(spool, home):
    spool.config = Config(epochs=2, profiles={"fast": {"epochs": 1}})
    job = spool.claim("fast/x.jsonl.gz", override={"seed": 7})
    spec = read_spec(home.job(job.id))
    assert (spec.name, spec.profile, spec.input) == ("x.jsonl.gz", "fast", "input.jsonl.gz")
    assert (spec.settings["epochs"], spec.settings["seed"]) == (1, 7)
    assert spec.settings == job.settings
    assert spec.rung == job.rung == spool.config.training().first_rung().as_dict()
    assert (spec.base_dir, spec.models) == (str(home.root), str(home.models))


@pytest.mark.parametrize("name", ["x.jsonl", "a b é漢字.jsonl.zst", b"caf\xe9\n.jsonl", b"-rf.json", "X.JSONL.GZ"])
def test_a_file_of_any_name_comes_through_and_back(spool, home, name):
    job = spool.trained_and_archived(name)
    assert os.fsencode(spool.archived(job).name) == os.fsencode(name)
    assert spool.archived(job).read_bytes() == CONTENT
    assert job.id.isascii()


def test_two_files_of_one_name_are_two_jobs(spool):
    first, second = spool.claim("x.jsonl"), spool.claim("x.jsonl.gz")
    assert first.id != second.id
    assert spool.claim("x.jsonl").id not in {first.id, second.id}


def test_a_hard_linked_file_is_copied_and_the_other_link_left_alone(spool, home, tmp_path):
    found = spool.drop()
    other = tmp_path / "other.jsonl"
    other.hardlink_to(found.path)
    before = other.stat()
    job = claim(spool.ledger, home, found, spool.config)
    assert list(home.inbox.iterdir()) == []
    assert files(home.job(job.id).path) == ["input.jsonl", "job.json"]
    assert (other.stat().st_ino, other.stat().st_mtime_ns, other.read_bytes()) == (
        before.st_ino,
        before.st_mtime_ns,
        CONTENT,
    )
    other.write_bytes(b"changed later")
    assert input_path(home, job).read_bytes() == CONTENT


def test_a_file_that_went_away_is_an_os_error_and_leaves_nothing(spool, home):
    found = spool.drop()
    found.path.unlink()
    with pytest.raises(OSError):
        claim(spool.ledger, home, found, spool.config)
    spool.recover()
    assert spool.jobs() == []
    assert list(home.jobs.iterdir()) == []


def test_the_hash_is_that_of_the_file(spool, home):
    job = spool.claim()
    result = fingerprint(input_path(home, job))
    assert result is not None
    identity, sha256 = result
    assert identity == job.identity
    assert sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert spool.enqueue(job) == replace(job, state=State.QUEUED, sha256=sha256)


def test_a_claimed_file_that_is_still_written_to_is_not_hashed(spool, home):
    """A rename does not stop a writer that has the file open."""
    found = spool.drop()
    with found.path.open("ab") as writer:
        job = claim(spool.ledger, home, found, spool.config)
        assert fingerprint(input_path(home, job)) is None
        writer.write(b"more")
    result = fingerprint(input_path(home, job))
    assert result is not None
    assert result[0].size == len(CONTENT) + 4


def test_an_override_travels_with_its_file(spool, home):
    job = spool.claim(override={"epochs": 1})
    assert list(home.inbox.iterdir()) == []
    assert job.settings["epochs"] == 1
    assert json.loads(home.job(job.id).overrides.read_text()) == {"epochs": 1}
    job = spool.archive(spool.publish(spool.train(spool.start(spool.enqueue(job)))))
    assert json.loads((spool.archived(job).parent / "overrides.json").read_text()) == {"epochs": 1}
    assert json.loads((spool.archived(job).parent / "job.json").read_text())["settings"]["epochs"] == 1


def test_the_override_of_another_file_stays(spool, home):
    (home.inbox / "y.config.json").write_text("{}")
    spool.claim("x.jsonl", override={})
    assert files(home.inbox) == ["y.config.json"]


@pytest.mark.parametrize("name", ["x.jsonl", b"caf\xe9.jsonl"])
@pytest.mark.parametrize("override", [{"epochs": 0}, [], {"trust_remote_code": True}])
def test_a_file_with_an_override_that_cannot_be_used_is_claimed_with_the_reason(spool, home, name, override):
    job = spool.claim(name, override=override)
    assert job.reason
    assert job.reason["code"] == "bad_settings"
    failed = spool.fail(job)
    assert (failed.state, failed.outcome) == (State.FINISHED, Outcome.FAILED)
    folder = home.failed / job.id
    assert files(folder) == sorted(["overrides.json", "reason.json", os.fsdecode(name)])
    assert json.loads((folder / "reason.json").read_text())["reason"]["code"] == "bad_settings"


def test_a_reason_to_fail_is_not_forgotten_by_a_crash(spool):
    """Else the file would be trained with settings that nobody asked for."""
    job = spool.claim(override={"epochs": 0})
    spool.recover()
    again = spool.enqueue(spool.ledger.job(job.id))
    assert again.state is State.FAILING
    assert again.reason == job.reason


# -- duplicates


@pytest.mark.parametrize(
    ("duplicates", "state"), [("skip", State.TRAINED), ("run", State.QUEUED), ("fail", State.FAILING)]
)
def test_a_file_that_was_trained_before(spool, duplicates, state):
    first = spool.trained_and_archived("x.jsonl")
    spool.config = Config(duplicates=duplicates)
    job = spool.enqueue(spool.claim("y.jsonl"))
    assert job.state is state
    assert job.sha256 == first.sha256
    if state is State.TRAINED:
        assert (job.duplicate_of, job.adapter) == (first.id, first.adapter)
    if state is State.FAILING:
        assert job.reason
        assert job.reason["code"] == "duplicate"
        assert first.id in job.reason["what"]


def test_a_duplicate_is_archived_with_the_job_that_trained_it(spool, home):
    first = spool.trained_and_archived("x.jsonl")
    job = spool.archive(spool.enqueue(spool.claim("y.jsonl")))
    assert (job.state, job.outcome) == (State.FINISHED, Outcome.SUCCEEDED)
    assert json.loads((spool.archived(job).parent / "job.json").read_text())["duplicate_of"] == first.id
    assert spool.archived(job).read_bytes() == CONTENT
    assert sorted(path.name for path in home.adapters.iterdir()) == ["latest", "x"]
    assert not spool.job_folder(job).exists()


@pytest.mark.parametrize("change", ["content", "settings", "failed before"])
def test_only_the_same_bytes_with_the_same_settings_and_success_are_a_duplicate(spool, change):
    if change == "failed before":
        spool.fail(spool.running("x.jsonl"), REASON)
    else:
        spool.trained_and_archived("x.jsonl", CONTENT + b"\n" if change == "content" else CONTENT)
    spool.config = Config(epochs=9 if change == "settings" else 3)
    assert spool.enqueue(spool.claim("y.jsonl")).state is State.QUEUED


def test_a_file_whose_adapter_was_thrown_away_is_trained_again(spool, home):
    first = spool.trained_and_archived("x.jsonl")
    shutil.rmtree(home.adapters / first.adapter)
    assert spool.enqueue(spool.claim("y.jsonl")).state is State.QUEUED


# -- publication and archive


def test_a_trained_job_goes_to_its_places(spool, home):
    job = spool.running()
    spool.train(job)
    assert list(home.adapters.iterdir()) == []
    job = spool.publish(job)
    assert (job.state, job.adapter) == (State.TRAINED, "x")
    assert files(home.adapters / "x") == ["adapter_config.json", "adapter_model.safetensors", "finetuned.json"]
    assert not home.job(job.id).staged_adapter(job.attempt).exists()
    assert input_path(home, job).read_bytes() == CONTENT
    job = spool.archive(job)
    assert (job.state, job.outcome) == (State.FINISHED, Outcome.SUCCEEDED)
    assert job.finished_at is not None
    month = time.strftime("%Y-%m", time.localtime(job.created_at))
    assert files(home.archive) == [f"{month}/{job.id}/job.json", f"{month}/{job.id}/x.jsonl"]
    assert spool.archived(job).read_bytes() == CONTENT
    assert list(home.jobs.iterdir()) == []
    assert json.loads((spool.archived(job).parent / "job.json").read_text())["adapter"] == "x"


def test_latest_leads_to_the_newest_adapter(spool, home):
    for name in ("a", "b"):
        spool.trained_and_archived(f"{name}.jsonl", name.encode())
        assert (home.adapters / "latest").readlink() == Path(name)
        assert (home.adapters / "latest" / "finetuned.json").is_file()


def test_a_folder_of_the_users_called_latest_does_not_stop_publication(spool, home):
    (home.adapters / "latest").mkdir()
    (home.adapters / "latest" / "mine").touch()
    job = spool.publish(spool.train(spool.running()))
    assert job.state is State.TRAINED
    assert (home.adapters / "latest" / "mine").exists()
    assert (home.adapters / "x" / "finetuned.json").is_file()


def test_where_the_name_is_taken_the_adapter_has_the_jobs_id(spool, home):
    first = spool.trained_and_archived("x.jsonl", b"one\n")
    second = spool.trained_and_archived("x.jsonl", b"two\n")
    assert (first.adapter, second.adapter) == ("x", second.id)
    assert json.loads((home.adapters / "x" / "finetuned.json").read_text())["job_id"] == first.id
    assert json.loads((home.adapters / second.id / "finetuned.json").read_text())["job_id"] == second.id


@pytest.mark.parametrize("name", ["latest.jsonl", "x.jsonl"])
def test_no_adapter_takes_the_place_of_something_else(spool, home, name):
    if name == "x.jsonl":
        (home.adapters / "x").write_text("a file of the user's")
    job = spool.trained_and_archived(name)
    assert job.adapter == job.id
    assert (home.adapters / job.id / "finetuned.json").is_file()


def test_a_name_that_was_taken_while_the_adapter_waited_is_not_taken_from_it(spool, home):
    """The name is chosen before the move; what was free then may be taken when the move is tried again."""
    waiting = spool.train(spool.running("x.jsonl", b"one\n"))
    waiting = spool.ledger.update(waiting.id, adapter="x")
    other = spool.trained_and_archived("y.jsonl", b"two\n")
    (home.adapters / "y").rename(home.adapters / "x")
    job = spool.publish(waiting)
    assert job.adapter == job.id
    assert json.loads((home.adapters / "x" / "finetuned.json").read_text())["job_id"] == other.id
    assert json.loads((home.adapters / job.id / "finetuned.json").read_text())["job_id"] == job.id


HEADER = int.from_bytes(WEIGHTS[:8], "little")


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        WEIGHTS[:7],
        WEIGHTS[:8],
        WEIGHTS[: 8 + HEADER // 2],
        WEIGHTS[: 8 + HEADER],
        WEIGHTS[:-1],
        WEIGHTS + b"\0",
        b"\xff" * 100,
        (5).to_bytes(8, "little") + b"[1,2]",
        (2**62).to_bytes(8, "little") + WEIGHTS[8:],
    ],
)
def test_weights_that_are_not_whole_are_not_published(spool, home, weights):
    job = spool.train(spool.running(), weights=weights)
    with pytest.raises(BadOutputError):
        spool.publish(job)
    assert list(home.adapters.iterdir()) == []
    assert spool.ledger.job(job.id).state is State.RUNNING
    spool.fail(spool.ledger.job(job.id), REASON)
    assert (home.failed / job.id / "x.jsonl").read_bytes() == CONTENT


@pytest.mark.parametrize("missing", ["finetuned.json", "adapter_model.safetensors", ""])
def test_output_without_its_manifest_or_weights_is_not_published(spool, home, missing):
    job = spool.train(spool.running())
    staged = home.job(job.id).staged_adapter(job.attempt)
    if missing:
        (staged / missing).unlink()
    else:
        shutil.rmtree(staged)
    with pytest.raises(BadOutputError) as caught:
        spool.publish(job)
    assert isinstance(caught.value, FinetunedError)
    assert list(home.adapters.iterdir()) == []


@pytest.mark.parametrize("name", ["job.json", "reason.json", "overrides.json"])
@pytest.mark.parametrize("succeeds", [True, False])
def test_a_file_with_the_name_of_one_of_ours_costs_neither(spool, home, name, succeeds):
    job = spool.running(name, b"[]", override={"epochs": 1})
    job = spool.archive(spool.publish(spool.train(job))) if succeeds else spool.fail(job, REASON)
    (folder,) = home.archive.glob(f"*/{job.id}")
    contents = [path.read_bytes() for path in folder.iterdir()]
    assert b"[]" in contents
    assert b'{"epochs": 1}' in contents
    assert len(contents) == 3


# -- failure


def test_a_failed_job_leaves_its_input_and_the_reason(spool, home):
    job = spool.running(override={"epochs": 1})
    failed = spool.fail(job, REASON)
    assert (failed.state, failed.outcome, failed.reason) == (State.FINISHED, Outcome.FAILED, REASON)
    folder = home.failed / job.id
    assert files(folder) == ["overrides.json", "reason.json", "x.jsonl"]
    assert (folder / "x.jsonl").read_bytes() == CONTENT
    story = json.loads((folder / "reason.json").read_text())
    assert story["reason"] == REASON
    assert (story["job_id"], story["file"], story["adapter"]) == (job.id, "x.jsonl", None)
    assert not spool.job_folder(job).exists()
    assert list(home.adapters.iterdir()) == []


def test_hours_of_work_are_kept_beside_a_failed_input(spool, home):
    job = spool.running()
    checkpoint = home.job(job.id).checkpoints / "step-100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"much work")
    spool.fail(job, REASON)
    assert (home.failed / job.id / "checkpoints" / "step-100" / "weights").read_bytes() == b"much work"


@pytest.mark.parametrize("changed", [{}, {"seed": 7}, {"batch_size": 2}])
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_status_says_that_a_job_goes_on_from_its_checkpoint_if_its_settings_are_those_of_before(
    spool, home, changed, has_checkpoint
):
    job = spool.running()
    if has_checkpoint:
        (home.job(job.id).checkpoints / "step-100").mkdir(parents=True)
    spool.fail(job, orders.cancelled(job))
    config = spool.config.model_copy(update=changed)
    spool.enqueue(orders.retry(spool.ledger, home, config, spool.ledger.job(job.id)))
    says = f"queued    {job.id}: tried again, with a checkpoint to go on from" in render(gather(home))
    assert says is (has_checkpoint and not changed)


def test_an_adapter_that_can_again_not_be_published_does_not_push_out_the_first(spool, home):
    job = spool.train(spool.running())
    spool.fail(job, REASON)
    job = orders.retry(spool.ledger, home, spool.config, spool.ledger.job(job.id))
    job = spool.train(spool.start(spool.enqueue(job)), manifest={"job_id": job.id, "attempt": 2})
    spool.fail(job, REASON)
    kept = sorted((home.failed / job.id).glob("*/finetuned.json"))
    assert [path.parent.name for path in kept] == ["adapter", "adapter.before-2"]
    assert json.loads(kept[0].read_text())["attempt"] == 2


def test_a_trainer_that_a_cluster_begins_only_after_its_job_was_put_away_finds_the_word_to_stop_in_the_job_of_a_retry(
    spool, home
):
    job = spool.running()
    spool.fail(job, REASON)
    orders.retry(spool.ledger, home, spool.config, spool.ledger.job(job.id))
    assert home.job(job.id).stop(job.attempt).exists()


@pytest.mark.parametrize(("code", "kept"), [("bug", True), ("bad_data", False)])
def test_a_bug_keeps_the_last_lines_of_its_log(spool, home, code, kept):
    job = spool.running()
    home.job_log(job.id).write_bytes(b"".join(b"line %d \xff\n" % n for n in range(500)))
    spool.fail(job, {**REASON, "code": code})
    story = json.loads((home.failed / job.id / "reason.json").read_text())
    assert ("log" in story) is kept
    if kept:
        assert len(story["log"]) == 200
        assert story["log"][-1].startswith("line 499 ")


def test_a_reason_can_hold_any_text(spool, home):
    job = spool.running(b"caf\xe9.jsonl")
    where = os.fsdecode(b"caf\xe9.jsonl")
    spool.fail(job, {**REASON, "where": where, "what": "é 漢字"})
    assert json.loads((home.failed / job.id / "reason.json").read_text())["reason"]["what"] == "é 漢字"


# -- recovery: every row of the table in docs/protocol.md


def test_no_row_and_the_file_in_the_inbox_is_left_to_discovery(spool, home):
    spool.drop(override={})
    before = tree(home)
    spool.recover()
    assert spool.jobs() == []
    assert tree(home) == before


def test_no_row_and_the_file_in_its_jobs_folder_the_ledger_was_lost(spool, home):
    spool.config = Config(profiles={"fast": {"epochs": 1}})
    job = spool.running(b"fast/caf\xe9.jsonl", override={"seed": 7})
    spool.lose_the_ledger()
    spool.recover()
    (restored,) = spool.jobs()
    assert (restored.state, restored.interruptions) == (State.QUEUED, 1)
    for name in ("id", "name", "profile", "identity", "created_at", "settings", "rung", "attempt", "sha256"):
        assert getattr(restored, name) == getattr(job, name), name
    again = spool.archive(spool.publish(spool.train(spool.start(restored))))
    assert again.attempt == 2
    assert spool.archived(again).read_bytes() == CONTENT


def test_a_lost_ledger_is_rebuilt_from_all_folders_wherever_the_jobs_were(spool, home):
    claimed = spool.claim("a.jsonl", b"a\n")
    queued = spool.enqueue(spool.claim("b.jsonl", b"b\n"))
    running = spool.running("c.jsonl", b"c\n")
    published = spool.publish(spool.train(spool.running("d.jsonl", b"d\n")))
    whole = spool.train(spool.running("e.jsonl", b"e\n"))
    failing = spool.running("f.jsonl", b"f\n")
    (home.failed / failing.id).mkdir()
    (home.failed / failing.id / "reason.json").write_text(json.dumps({"reason": REASON}))
    done = spool.trained_and_archived("g.jsonl", b"g\n")
    spool.lose_the_ledger()
    spool.recover()
    jobs = {job.id: job for job in spool.jobs()}
    assert {job_id: (job.state, job.outcome) for job_id, job in jobs.items()} == {
        claimed.id: (State.CLAIMING, None),
        queued.id: (State.CLAIMING, None),  # it is hashed again
        running.id: (State.QUEUED, None),
        published.id: (State.FINISHED, Outcome.SUCCEEDED),
        whole.id: (State.FINISHED, Outcome.SUCCEEDED),
        failing.id: (State.FINISHED, Outcome.FAILED),
        done.id: (State.FINISHED, Outcome.SUCCEEDED),
    }
    assert sorted(path.name for path in home.adapters.iterdir()) == ["d", "e", "g", "latest"]  # none of them twice
    assert jobs[failing.id].reason == REASON
    for job in (published, whole, done):
        assert spool.archived(job).read_bytes() == jobs[job.id].name[:1] + b"\n"


FINISHED = ("name", "profile", "settings", "rung", "outcome", "sha256", "adapter", "duplicate_of", "reason", "attempt")


@pytest.mark.parametrize("name", ["x.jsonl", b"caf\xe9.jsonl", "job.json", "input-x.json"])
def test_finished_jobs_are_known_again_when_the_ledger_was_lost(spool, home, name):
    spool.trained_and_archived(name)
    spool.archive(spool.enqueue(spool.claim("again.jsonl")))
    spool.fail(spool.running("bad.jsonl", b"bad\n"), REASON)
    spool.fail(spool.running("cancelled.jsonl", b"c\n"), {**REASON, "code": "cancelled"})
    before = spool.jobs()
    assert len({(job.outcome, job.duplicate_of) for job in before}) == 4
    spool.lose_the_ledger()
    spool.recover()
    for job, known in zip(before, spool.jobs(), strict=True):
        assert {name: getattr(known, name) for name in FINISHED} == {name: getattr(job, name) for name in FINISHED}
        assert abs(known.finished_at - job.finished_at) < 60
    assert spool.enqueue(spool.claim("third.jsonl")).duplicate_of == before[0].id


def test_an_adapter_is_known_again_though_the_archive_was_cleared(spool, home):
    settings = Config().training().model_dump()
    story = {
        "file": "x.jsonl",
        "profile": "",
        "finished_at": 7.0,
        "settings": settings,
        "rung": {},
        "metrics": {"a": 1},
    }
    job = spool.running()
    story |= {"job_id": job.id, "sha256": job.sha256}
    spool.archive(spool.publish(spool.train(job, manifest=story)))
    shutil.rmtree(home.archive / time.strftime("%Y-%m"))
    spool.lose_the_ledger()
    spool.recover()
    (known,) = spool.jobs()
    assert (known.id, known.outcome, known.adapter) == (job.id, Outcome.SUCCEEDED, "x")
    assert (known.progress, known.finished_at) == ({"a": 1}, 7.0)
    assert spool.enqueue(spool.claim("again.jsonl")).duplicate_of == job.id


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"job_id": 1}', b"\xff"])
def test_an_archive_with_foreign_things_in_it_does_not_stop_the_daemon(spool, home, content):
    done = spool.trained_and_archived()
    for folder in (home.archive / "2026-01" / "theirs", home.failed / "theirs", home.adapters / "theirs"):
        folder.mkdir(parents=True)
        for name in ("job.json", "reason.json", "finetuned.json"):
            (folder / name).write_bytes(content)
    spool.lose_the_ledger()
    spool.recover()
    assert [job.id for job in spool.jobs()] == [done.id]


def test_a_ledger_that_knows_a_job_is_not_filled_from_the_archive(spool, home):
    done = spool.trained_and_archived()
    (story,) = home.archive.glob("*/*/job.json")
    other = story.parent.with_name("other")
    other.mkdir()
    (other / "job.json").write_bytes(story.read_bytes().replace(done.id.encode(), b"other"))
    spool.recover()
    assert [job.id for job in spool.jobs()] == [done.id]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"identity": null}', b"\xff"])
def test_an_input_without_a_readable_job_json_is_never_deleted(spool, home, content):
    folder = home.jobs / "x-000000"
    folder.mkdir()
    (folder / "input.jsonl").write_bytes(CONTENT)
    if content is not None:
        (folder / "job.json").write_bytes(content)
    spool.recover()
    assert spool.jobs() == []
    assert (folder / "input.jsonl").read_bytes() == CONTENT


def test_a_copy_of_a_jobs_folder_does_not_stop_the_daemon(spool, home):
    job = spool.enqueue(spool.claim())
    shutil.copytree(spool.job_folder(job), home.jobs / "backup")
    spool.recover()
    assert spool.ledger.job(job.id).state is State.QUEUED
    assert (home.jobs / "backup" / "input.jsonl").exists()


def described(spool: Spool, found: Found) -> Job:
    """A job as it is after D2: in the ledger, with its folder, its file still in the inbox."""
    job = claim(spool.ledger, spool.home, found, spool.config)
    input_path(spool.home, job).rename(found.path)
    if spool.home.job(job.id).overrides.exists():
        spool.home.job(job.id).overrides.rename(found.override)
    return job


@pytest.mark.parametrize("reached", ["D1", "D2"])
@pytest.mark.parametrize("name", ["x.jsonl", b"caf\xe9.jsonl", "fast/x.jsonl"])
def test_claiming_and_the_file_still_in_the_inbox_forgets_the_claim(spool, home, reached, name):
    spool.config = Config(profiles={"fast": {}})
    found = spool.drop(name, override={"epochs": 1})
    job = described(spool, found)
    if reached == "D1":
        shutil.rmtree(spool.job_folder(job))
    spool.recover()
    assert spool.jobs() == []
    assert list(home.jobs.iterdir()) == []
    assert found.path.read_bytes() == CONTENT
    assert found.override.exists()
    assert claim(spool.ledger, home, found, spool.config).settings["epochs"] == 1


@pytest.mark.parametrize("reached", ["half a copy", "the copy", "the rename"])
def test_claiming_a_hard_linked_file_ends_with_one_of_it(spool, home, tmp_path, reached):
    found = spool.drop()
    job = described(spool, found)
    (tmp_path / "other.jsonl").hardlink_to(found.path)
    if reached == "half a copy":
        (spool.job_folder(job) / "copy.partial").write_bytes(CONTENT[:10])
    elif reached == "the copy":
        (spool.job_folder(job) / "copy.partial").write_bytes(CONTENT)
    else:
        input_path(home, job).write_bytes(CONTENT)
    spool.recover()
    assert spool.jobs() == []
    assert files(home.inbox) == ["x.jsonl"]
    assert list(home.jobs.iterdir()) == []
    assert (tmp_path / "other.jsonl").read_bytes() == CONTENT


def test_claiming_and_the_file_in_its_jobs_folder_goes_on_to_be_hashed(spool, home):
    job = spool.claim()
    spool.recover()
    assert spool.jobs() == [job]
    assert input_path(home, job).read_bytes() == CONTENT
    assert spool.enqueue(job).state is State.QUEUED


def test_claiming_with_the_override_left_behind_takes_it_along(spool, home):
    job = spool.claim(override={"epochs": 1})
    home.job(job.id).overrides.rename(home.inbox / "x.config.json")
    spool.recover()
    assert files(home.inbox) == []
    assert json.loads(home.job(job.id).overrides.read_text()) == {"epochs": 1}


def test_a_retry_that_was_cut_off_after_the_input_was_moved_leaves_no_old_reason_behind(spool, home):
    job = spool.fail(spool.running(), REASON)
    orders.retry(spool.ledger, home, spool.config, job)
    (home.failed / job.id).mkdir()
    (home.failed / job.id / "reason.json").write_text("{}")
    spool.recover()
    assert [job.state for job in spool.jobs()] == [State.CLAIMING]
    assert (spool.job_folder(job) / "input.jsonl").read_bytes() == CONTENT
    assert list(home.failed.iterdir()) == []


def test_claiming_leaves_a_newer_override_to_the_file_that_it_was_dropped_for(spool, home):
    job = spool.claim(override={"epochs": 1})
    spool.drop(content=b"newer\n", override={"epochs": 2})
    spool.recover()
    assert files(home.inbox) == ["x.config.json", "x.jsonl"]
    assert json.loads(home.job(job.id).overrides.read_text()) == {"epochs": 1}


def test_claiming_does_not_take_a_newer_file_of_the_same_name_for_its_own(spool, home):
    job = spool.claim()
    found = spool.drop(content=b"newer\n")
    spool.recover()
    assert spool.jobs() == [job]
    assert input_path(home, job).read_bytes() == CONTENT
    assert found.path.read_bytes() == b"newer\n"


def test_claiming_is_not_deceived_by_an_inode_number_that_was_given_anew(spool, home):
    """A copied input leaves its inode free for the next file, which may have the same name."""
    job = spool.claim()
    found = spool.drop(content=b"newer and of another size\n")
    spool.ledger.update(job.id, inode=found.path.stat().st_ino)
    spool.recover()
    assert input_path(home, job).read_bytes() == CONTENT
    assert found.path.exists()


def test_claiming_and_the_file_nowhere_the_user_took_it_back(spool, home):
    found = spool.drop()
    described(spool, found)
    found.path.unlink()
    spool.recover()
    assert spool.jobs() == []
    assert list(home.jobs.iterdir()) == []


def test_queued_is_kept_as_it_is(spool, home):
    job = spool.enqueue(spool.claim())
    before = tree(home)
    spool.recover()
    assert spool.jobs() == [job]
    assert tree(home) == before


def test_running_without_an_adapter_was_interrupted_and_is_queued_again(spool, home):
    job = spool.ledger.update(spool.running().id, retries=1, trainer_pid=4_000_000)
    checkpoint = home.job(job.id).checkpoints / "step-3"
    checkpoint.mkdir(parents=True)
    home.job(job.id).lock.touch()
    spool.recover()
    (again,) = spool.jobs()
    assert again == replace(job, state=State.QUEUED, interruptions=1, trainer_pid=None)
    assert checkpoint.is_dir()
    assert input_path(home, job).read_bytes() == CONTENT


def test_running_with_half_an_output_is_queued_again(spool, home):
    job = spool.train(spool.running())
    (home.job(job.id).staged_adapter(1) / "finetuned.json").unlink()
    spool.recover()
    assert spool.ledger.job(job.id).state is State.QUEUED
    assert list(home.adapters.iterdir()) == []


def test_a_live_orphan_is_stopped_before_anything_is_done(spool, home):
    job = spool.running()
    trainer = home.job(job.id).lock.open("w")
    fcntl.flock(trainer, fcntl.LOCK_EX)
    stopped = []

    def stop(orphan: Job) -> None:
        assert spool.ledger.job(orphan.id).state is State.RUNNING
        stopped.append(orphan.id)
        trainer.close()

    spool.recover(stop)
    assert stopped == [job.id]
    assert spool.ledger.job(job.id).state is State.QUEUED


def test_an_orphan_that_was_done_when_it_was_stopped_has_succeeded(spool, home):
    job = spool.running()
    trainer = home.job(job.id).lock.open("w")
    fcntl.flock(trainer, fcntl.LOCK_EX)

    def stop(orphan: Job) -> None:
        spool.train(orphan)
        trainer.close()

    spool.recover(stop)
    assert spool.ledger.job(job.id).outcome is Outcome.SUCCEEDED
    assert (home.adapters / "x" / "finetuned.json").is_file()


def finished_once(spool: Spool, job: Job) -> None:
    done = spool.ledger.job(job.id)
    assert (done.state, done.outcome) == (State.FINISHED, Outcome.SUCCEEDED)
    assert sorted(path.name for path in spool.home.adapters.iterdir()) == ["latest", "x"]
    assert (spool.home.adapters / "x" / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert spool.archived(done).read_bytes() == CONTENT
    assert list(spool.home.jobs.iterdir()) == []
    assert list(spool.home.inbox.iterdir()) == []


def test_running_with_a_whole_output_is_published(spool):
    job = spool.train(spool.running())
    spool.recover()
    finished_once(spool, job)


def test_running_with_an_output_of_an_earlier_attempt_is_queued_again(spool, home):
    job = spool.train(spool.running())
    job = spool.start(spool.ledger.update(job.id, state=State.QUEUED))
    spool.recover()
    assert spool.ledger.job(job.id).state is State.QUEUED
    assert list(home.adapters.iterdir()) == []


def test_running_with_an_output_that_is_not_whole_fails(spool, home):
    job = spool.train(spool.running(), weights=WEIGHTS[:-1])
    spool.recover()
    done = spool.ledger.job(job.id)
    assert (done.state, done.outcome) == (State.FINISHED, Outcome.FAILED)
    assert done.reason
    assert done.reason["code"] == "bad_output"
    assert (home.failed / job.id / "x.jsonl").read_bytes() == CONTENT
    assert list(home.adapters.iterdir()) == []


def test_running_with_its_adapter_published_is_finished_and_not_trained_again(spool, home):
    job = spool.train(spool.running())
    job = spool.ledger.update(job.id, adapter="x")
    home.job(job.id).staged_adapter(1).rename(home.adapters / "x")
    spool.recover()
    finished_once(spool, job)


def test_running_does_not_take_another_jobs_adapter_for_its_own(spool, home):
    spool.trained_and_archived("x.jsonl", b"one\n")
    job = spool.running("x.jsonl", b"two\n")
    spool.ledger.update(job.id, adapter="x")
    spool.recover()
    assert spool.ledger.job(job.id).state is State.QUEUED


def test_trained_and_the_file_in_its_jobs_folder_is_archived(spool):
    job = spool.publish(spool.train(spool.running()))
    spool.recover()
    finished_once(spool, job)


def test_trained_and_the_file_in_the_archive_is_finished(spool, home):
    job = spool.publish(spool.train(spool.running()))
    month = time.strftime("%Y-%m", time.localtime(job.created_at))
    folder = home.archive / month / job.id
    folder.mkdir(parents=True)
    input_path(home, job).rename(folder / "x.jsonl")
    spool.recover()
    finished_once(spool, job)


@pytest.mark.parametrize("reached", ["the ledger", "the reason", "the checkpoints", "the input"])
def test_failing_goes_on_wherever_it_stopped(spool, home, reached):
    job = spool.running(override={"epochs": 1})
    home.job(job.id).checkpoints.mkdir()
    (home.job(job.id).checkpoints / "weights").write_bytes(b"much work")
    job = spool.ledger.update(job.id, state=State.FAILING, reason=REASON)
    folder = home.failed / job.id
    if reached != "the ledger":
        folder.mkdir()
        (folder / "reason.json").write_text("{}")
    if reached in {"the checkpoints", "the input"}:
        home.job(job.id).checkpoints.rename(folder / "checkpoints")
    if reached == "the input":
        home.job(job.id).overrides.rename(folder / "overrides.json")
        input_path(home, job).rename(folder / "x.jsonl")
    spool.recover()
    done = spool.ledger.job(job.id)
    assert (done.state, done.outcome, done.reason) == (State.FINISHED, Outcome.FAILED, REASON)
    assert files(folder) == ["checkpoints/weights", "overrides.json", "reason.json", "x.jsonl"]
    assert json.loads((folder / "reason.json").read_text())["reason"] == REASON
    assert list(home.jobs.iterdir()) == []


def test_finished_and_its_folder_still_there_is_swept(spool, home):
    job = spool.trained_and_archived()
    (spool.job_folder(job) / "out.1").mkdir(parents=True)
    (spool.job_folder(job) / "job.json").touch()
    before = spool.jobs()
    spool.recover()
    assert list(home.jobs.iterdir()) == []
    assert spool.jobs() == before


def test_a_job_that_takes_the_machine_down_again_and_again_fails(spool, home):
    job = spool.running()
    for number in range(1, MOST_INTERRUPTIONS):
        spool.recover()
        queued = spool.ledger.job(job.id)
        assert (queued.state, queued.interruptions, queued.retries) == (State.QUEUED, number, 0)
        spool.start(queued)
    spool.recover()
    done = spool.ledger.job(job.id)
    assert (done.state, done.outcome) == (State.FINISHED, Outcome.FAILED)
    assert done.reason
    assert done.reason["code"] == "interrupted_too_often"
    assert (home.failed / job.id / "x.jsonl").read_bytes() == CONTENT


def test_recovery_puts_many_jobs_right_at_once(spool, home):
    states: dict[str, Any] = {
        "a": spool.claim("a.jsonl", b"a\n"),
        "b": spool.enqueue(spool.claim("b.jsonl", b"b\n")),
        "c": spool.running("c.jsonl", b"c\n"),
        "d": spool.train(spool.running("d.jsonl", b"d\n")),
        "e": spool.publish(spool.train(spool.running("e.jsonl", b"e\n"))),
        "f": spool.ledger.update(spool.running("f.jsonl", b"f\n").id, state=State.FAILING, reason=REASON),
    }
    spool.recover()
    after = {name: spool.ledger.job(job.id).state for name, job in states.items()}
    assert after == {
        "a": State.CLAIMING,
        "b": State.QUEUED,
        "c": State.QUEUED,
        "d": State.FINISHED,
        "e": State.FINISHED,
        "f": State.FINISHED,
    }
    assert sorted(path.name for path in home.adapters.iterdir()) == ["d", "e", "latest"]


def test_no_two_jobs_have_one_id(spool, monkeypatch):
    tokens = iter(["aaaaaa", "aaaaaa", "bbbbbb"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    assert [spool.claim("x.jsonl", b"1\n").id, spool.claim("x.jsonl", b"2\n").id] == ["x-aaaaaa", "x-bbbbbb"]


def test_a_pipe_in_place_of_a_claimed_file_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / "input.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        fingerprint(tmp_path / "input.jsonl")


# -- a held-out file beside the data

HELD_OUT = "".join(json.dumps(row) + "\n" for row in chat_rows(2, start=500)).encode()


def dropped_both(
    spool: Spool, name: str | bytes = "x.jsonl", held_out: str | bytes = "x.eval.jsonl", *, rows: bytes = HELD_OUT
) -> Found:
    found = spool.drop(name)
    path = found.path.with_name(os.fsdecode(held_out))
    path.write_bytes(rows)
    return replace(found, held_out=path)


def claimed_both(spool: Spool, name: str | bytes = "x.jsonl", held_out: str | bytes = "x.eval.jsonl", **more) -> Job:
    return claim(spool.ledger, spool.home, dropped_both(spool, name, held_out, **more), spool.config)


def finished_with(spool: Spool, folder: Path, job: Job) -> None:
    """The job has ended, its two files lie side by side and nowhere else."""
    done = spool.ledger.job(job.id)
    assert done.state is State.FINISHED
    assert (folder / os.fsdecode(job.name)).read_bytes() == CONTENT
    assert (folder / os.fsdecode(job.held_out or b"")).read_bytes() == HELD_OUT
    assert done.held_out_sha256 == hashlib.sha256(HELD_OUT).hexdigest()
    assert files(spool.home.inbox) == files(spool.home.jobs) == []


def test_a_held_out_file_travels_with_its_data(spool, home):
    job = claimed_both(spool)
    assert files(home.inbox) == []
    assert files(spool.job_folder(job)) == ["held-out.jsonl", "input.jsonl", "job.json"]
    assert read_spec(home.job(job.id)).held_out == "held-out.jsonl"
    job = spool.archive(spool.publish(spool.train(spool.start(spool.enqueue(job)))))
    finished_with(spool, spool.archived(job).parent, job)
    story = json.loads((spool.archived(job).parent / "job.json").read_text())
    assert (story["held_out"], story["held_out_sha256"]) == ("x.eval.jsonl", job.held_out_sha256)


def test_the_trainer_is_told_of_the_held_out_file_at_every_attempt(spool, home):
    job = spool.start(spool.enqueue(claimed_both(spool, "x.jsonl", "x.eval.jsonl.gz")))
    spec = read_spec(home.job(job.id))
    assert (spec.attempt, spec.held_out) == (1, "held-out.jsonl.gz")
    assert (spool.job_folder(job) / spec.held_out).read_bytes() == HELD_OUT
    assert spec.held_out_sha256 == hashlib.sha256(HELD_OUT).hexdigest()


@pytest.mark.parametrize(
    "names",
    [
        ("x.jsonl.zst", "x.eval.json"),
        ("fast/é b.json", "é b.eval.jsonl"),
        (b"caf\xe9.jsonl", b"caf\xe9.eval.jsonl"),
        ("X.JSONL", "X.EVAL.JSONL"),
        ("overrides.json", "overrides.eval.json"),
        ("job.json", "job.eval.json"),
    ],
)
@pytest.mark.parametrize("succeeds", [True, False])
@pytest.mark.parametrize("ledger_lost", [True, False])
def test_held_out_files_of_any_name_come_through_and_back(spool, home, names, succeeds, ledger_lost):
    name, held_out = names
    spool.config = Config(profiles={"fast": {}})
    job = spool.start(spool.enqueue(claimed_both(spool, name, held_out)))
    job = spool.archive(spool.publish(spool.train(job))) if succeeds else spool.fail(job, REASON)
    (folder,) = home.archive.glob(f"*/{job.id}")
    assert (folder / os.fsdecode(held_out)).read_bytes() == HELD_OUT
    assert CONTENT in {path.read_bytes() for path in folder.iterdir()}
    if ledger_lost:
        spool.lose_the_ledger()
        spool.recover()
    known = spool.ledger.job(job.id)
    assert (known.name, known.held_out) == (job.name, os.fsencode(held_out))
    assert known.held_out_sha256 == job.held_out_sha256
    if not succeeds:
        again = orders.retry(spool.ledger, home, spool.config, known)
        assert [path.read_bytes() for path in files_to_hash(home, again)] == [CONTENT, HELD_OUT]
        assert not folder.exists()
        again = spool.archive(spool.publish(spool.train(spool.start(spool.enqueue(again)))))
        assert (spool.archived(again).parent / os.fsdecode(held_out)).read_bytes() == HELD_OUT


def test_a_cancelled_job_keeps_its_held_out_file_beside_its_data(spool, home):
    job = spool.enqueue(claimed_both(spool))
    spool.fail(job, orders.cancelled(job))
    finished_with(spool, home.failed / job.id, job)


def test_an_older_archive_with_data_of_such_a_name_is_still_known(spool, home):
    """Before there were held-out files, x.eval.jsonl was trained on like any other."""
    job = spool.trained_and_archived("x.eval.jsonl")
    spool.lose_the_ledger()
    spool.recover()
    known = spool.ledger.job(job.id)
    assert (known.name, known.held_out) == (b"x.eval.jsonl", None)


def test_a_hard_linked_held_out_file_is_copied_and_the_other_link_left_alone(spool, tmp_path):
    found = dropped_both(spool)
    other = tmp_path / "other.jsonl"
    other.hardlink_to(found.held_out)
    job = claim(spool.ledger, spool.home, found, spool.config)
    assert files(spool.home.inbox) == []
    other.write_bytes(b"changed later")
    assert files_to_hash(spool.home, job)[1].read_bytes() == HELD_OUT


def test_a_held_out_file_that_is_no_longer_there_leaves_the_data_in_the_inbox(spool, home):
    found = dropped_both(spool)
    found.held_out.unlink()
    with pytest.raises(OSError):
        claim(spool.ledger, home, found, spool.config)
    assert files(home.inbox) == ["x.jsonl"]
    assert spool.jobs() == []


def test_another_held_out_file_makes_another_training(spool):
    def enqueued(name: str, **more) -> State:
        return spool.enqueue(claimed_both(spool, f"{name}.jsonl", f"{name}.eval.jsonl", **more)).state

    first = spool.enqueue(claimed_both(spool))
    spool.archive(spool.publish(spool.train(spool.start(first))))
    assert enqueued("same") is State.TRAINED
    assert enqueued("other", rows=b'{"messages": []}\n') is State.QUEUED
    assert spool.enqueue(spool.claim("none.jsonl")).state is State.QUEUED


@pytest.mark.parametrize("reached", ["nothing", "half a copy", "the copy", "the rename"])
@pytest.mark.parametrize("ledger_lost", [True, False])
def test_claiming_with_the_held_out_file_left_behind_takes_it_along(spool, home, tmp_path, reached, ledger_lost):
    found = dropped_both(spool)
    facts = found.held_out.stat()
    job = claim(spool.ledger, home, found, spool.config)
    place = files_to_hash(home, job)[1]
    if reached != "the rename":
        place.rename(found.held_out)
    if "copy" in reached:
        (tmp_path / "other.jsonl").hardlink_to(found.held_out)
        partial = spool.job_folder(job) / "copy.partial"
        partial.write_bytes(HELD_OUT[:10] if reached == "half a copy" else HELD_OUT)
        if reached == "the copy":
            partial.rename(place)
    if ledger_lost:
        spool.lose_the_ledger()
    spool.recover()
    assert [path.read_bytes() for path in files_to_hash(home, spool.ledger.job(job.id))] == [CONTENT, HELD_OUT]
    assert files(home.inbox) == []
    assert facts.st_size == len(HELD_OUT)
    assert spool.enqueue(spool.ledger.job(job.id)).state is State.QUEUED


def cut_off_between(spool: Spool) -> tuple[Job, Path]:
    """A crash came when the data was taken and its held-out file not yet."""
    found = dropped_both(spool)
    job = claim(spool.ledger, spool.home, found, spool.config)
    files_to_hash(spool.home, job)[1].rename(found.held_out)
    return job, found.held_out


def test_a_job_that_was_moved_in_the_queue_still_knows_its_held_out_file(spool, home):
    spool.enqueue(spool.claim("other.jsonl", b"other\n"))
    job, held_out = cut_off_between(spool)
    orders.change_turn(spool.ledger, home, job, orders.Verb.FIRST)
    spool.recover()
    assert not held_out.exists()
    assert [path.read_bytes() for path in files_to_hash(home, spool.ledger.job(job.id))] == [CONTENT, HELD_OUT]


@pytest.mark.parametrize("content", [b"{}", b"", b"[]"])
def test_a_claim_with_a_damaged_job_json_leaves_the_held_out_file_where_it_is_and_says_so(spool, home, content):
    job, held_out = cut_off_between(spool)
    home.job(job.id).spec.write_bytes(content)
    spool.recover()
    assert spool.ledger.job(job.id).reason["code"] == "no_held_out"
    assert held_out.read_bytes() == HELD_OUT


@pytest.mark.parametrize("how", ["another file", "the same inode, written anew", "taken away"])
def test_a_held_out_file_that_was_replaced_meanwhile_is_not_taken_for_the_jobs_own(spool, home, how):
    job, held_out = cut_off_between(spool)
    before = held_out.stat()
    if how == "another file":
        held_out.rename(home.root / "mine")  # its inode stays in use
    if how == "taken away":
        held_out.unlink()
    else:
        held_out.write_bytes(b"newer\n")
        os.utime(held_out, ns=(0, before.st_mtime_ns + (how != "another file")))
    spool.recover()
    job = spool.enqueue(spool.ledger.job(job.id))
    assert job.state is State.FAILING
    assert job.reason
    assert (job.reason["code"], job.reason["where"]) == ("no_held_out", "x.eval.jsonl")
    spool.fail(job)
    assert files(home.failed / job.id) == ["reason.json", "x.jsonl"]
    assert files(home.inbox) == ([] if how == "taken away" else ["x.eval.jsonl"])
    with pytest.raises(FinetunedError, match=r"x\.eval\.jsonl of job .* is no longer there"):
        orders.retry(spool.ledger, home, spool.config, spool.ledger.job(job.id))
    (home.failed / job.id / "x.eval.jsonl").write_bytes(HELD_OUT)  # as the remedy says
    again = spool.enqueue(orders.retry(spool.ledger, home, spool.config, spool.ledger.job(job.id)))
    assert (again.state, again.reason) == (State.QUEUED, None)
    assert again.held_out_sha256 == hashlib.sha256(HELD_OUT).hexdigest()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_held_out_file_that_may_not_be_moved_fails_the_job_and_stays_where_it_is(spool, home):
    found = dropped_both(spool)
    home.inbox.chmod(0o1777)  # sticky: everybody may remove what is his own
    for path in (home.inbox, found.held_out):
        os.chown(path, 65534, -1)

    def taken() -> Job:
        ledger = Ledger.open(home.ledger)  # of this thread
        try:
            return claim(ledger, home, found, spool.config)
        finally:
            ledger.close()

    job = without_privileges(taken)
    assert job.reason
    assert (job.reason["code"], job.reason["what"]) == (
        "no_held_out",
        "the held-out file cannot be taken: Operation not permitted",
    )
    spool.fail(job)
    assert files(home.inbox) == ["x.eval.jsonl"]
    assert files(home.failed / job.id) == ["reason.json", "x.jsonl"]


def test_claiming_leaves_a_newer_pair_of_the_same_names_in_the_inbox(spool, home):
    job = claimed_both(spool)
    spool.drop(content=b"newer\n")
    (home.inbox / "x.eval.jsonl").write_bytes(b"newer too\n")
    spool.recover()
    assert [path.read_bytes() for path in files_to_hash(home, job)] == [CONTENT, HELD_OUT]
    assert files(home.inbox) == ["x.eval.jsonl", "x.jsonl"]


def test_claiming_and_both_files_still_in_the_inbox_forgets_the_claim(spool, home):
    found = dropped_both(spool)
    job = claim(spool.ledger, home, found, spool.config)
    for place, path in zip(files_to_hash(home, job), (found.path, found.held_out), strict=True):
        place.rename(path)
    spool.recover()
    assert (spool.jobs(), files(home.jobs)) == ([], [])
    assert (found.path.read_bytes(), found.held_out.read_bytes()) == (CONTENT, HELD_OUT)


@pytest.mark.parametrize("reached", ["the ledger", "the held-out file", "the input"])
@pytest.mark.parametrize("succeeds", [True, False])
def test_putting_both_away_goes_on_wherever_it_stopped(spool, home, reached, succeeds):
    job = spool.start(spool.enqueue(claimed_both(spool)))
    if succeeds:
        job = spool.publish(spool.train(job))
        folder = home.archive / time.strftime("%Y-%m", time.localtime(job.created_at)) / job.id
    else:
        job = spool.ledger.update(job.id, state=State.FAILING, reason=REASON)
        folder = home.failed / job.id
    folder.mkdir(parents=True)
    place, held_out = files_to_hash(home, replace(job, reason=None))
    if reached != "the ledger":
        held_out.rename(folder / "x.eval.jsonl")
    if reached == "the input":
        place.rename(folder / "x.jsonl")
    spool.recover()
    finished_with(spool, folder, job)


def test_settings_that_cannot_be_used_put_both_files_aside(spool, home):
    found = dropped_both(spool)
    found.override.write_text('{"epochs": 0}')
    job = spool.fail(claim(spool.ledger, home, found, spool.config))
    assert files(home.failed / job.id) == ["overrides.json", "reason.json", "x.eval.jsonl", "x.jsonl"]
    assert files(home.inbox) == []
