"""A job: which step may follow which, and job.json."""

from __future__ import annotations

import json
import os
from itertools import product

import pytest

from finetuned.jobs import FOLLOWS, FileIdentity, Job, JobSpec, State, Status, check_transition

# The spool protocol's steps; every other one is a bug.
LEGAL = {
    ("claiming", "queued"),
    ("claiming", "trained"),  # a duplicate
    ("claiming", "failing"),
    ("queued", "running"),
    ("queued", "trained"),  # by another job meanwhile
    ("queued", "failing"),
    ("running", "queued"),
    ("running", "trained"),
    ("running", "failing"),
    ("trained", "finished"),
    ("failing", "finished"),
    ("finished", "claiming"),  # the user wants it tried again
}


@pytest.mark.parametrize(("old", "new"), list(product(State, State)))
def test_a_state_is_followed_only_by_the_steps_of_the_protocol(old, new):
    if old is new or (old, new) in LEGAL:
        check_transition(old, new)
    else:
        with pytest.raises(ValueError, match=f"from {old} to {new}"):
            check_transition(old, new)


def test_every_state_ends_in_finished():
    for state in State:
        reached = {state}
        while (more := reached.union(*(FOLLOWS[one] for one in reached))) != reached:
            reached = more
        assert State.FINISHED in reached


def job_in(state: State) -> Job:
    return Job("x-1", b"x.jsonl", "", FileIdentity(1, 2, 3, 4), state, created_at=1.0)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.CLAIMING, Status.QUEUED),
        (State.QUEUED, Status.QUEUED),
        (State.RUNNING, Status.RUNNING),
        (State.TRAINED, Status.RUNNING),
        (State.FAILING, Status.RUNNING),
        (State.FINISHED, Status.FINISHED),
    ],
)
def test_the_status_is_the_state_in_the_users_words(state, status):
    assert job_in(state).status is status


SPEC = JobSpec(
    id="x-0a1b2c",
    name="x.jsonl",
    profile="fast",
    identity=FileIdentity(device=2**40, inode=2**50, size=0, mtime_ns=1_700_000_000_123_456_789),
    created_at=1_700_000_000.125,
    input="input.jsonl",
    settings={"epochs": 0.5, "system_prompt": None, "target_modules": ["q"], "predictions": {"samples": 1}},
    rung={"batch_size": 4},
    override_inode=77,
    sha256="ab" * 32,
    held_out="held-out.jsonl.gz",
    held_out_name="x.eval.jsonl.gz",
    held_out_identity=FileIdentity(device=1, inode=2, size=3, mtime_ns=4),
    held_out_sha256="cd" * 32,
    attempt=3,
    base_dir="/srv/é",
    models="/srv/é/.finetuned/models",
)


def test_job_json_gives_back_what_was_put_in():
    assert JobSpec.decode(SPEC.encode()) == SPEC


@pytest.mark.parametrize("name", [b"\xff\xfe.jsonl", b"caf\xe9.jsonl", "漢字 🎉.jsonl".encode(), b'a"b\\c\n.jsonl'])
def test_names_that_are_no_utf8_survive_job_json(name):
    spec = JobSpec(**{**vars(SPEC), "name": os.fsdecode(name)})
    content = spec.encode()
    content.decode("ascii")
    assert os.fsencode(JobSpec.decode(content).name) == name


def test_a_job_json_from_before_there_were_held_out_files_is_read():
    fields = {name: value for name, value in json.loads(SPEC.encode()).items() if not name.startswith("held_out")}
    spec = JobSpec.decode(json.dumps(fields).encode())
    assert (spec.id, spec.held_out, spec.held_out_identity) == (SPEC.id, None, None)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'"x"', b'{"identity": 3}', b"\xff"])
def test_what_is_no_job_json_is_refused(content):
    with pytest.raises((ValueError, TypeError, KeyError)):
        JobSpec.decode(content)


def test_a_job_json_cut_off_anywhere_is_refused():
    whole = SPEC.encode().rstrip()
    for length in range(len(whole)):
        with pytest.raises(ValueError):
            JobSpec.decode(whole[:length])


def test_job_json_is_for_people_too():
    assert json.loads(SPEC.encode())["settings"]["epochs"] == 0.5
    assert SPEC.encode().count(b"\n") > 10
