"""What Slurm prints and what follows from it, and the script that is submitted; no Slurm is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetuned.engine_settings import Slurm
from finetuned.errors import ConfigError
from finetuned.home import JobFolder
from finetuned.launchers.slurm import last_word
from finetuned.launchers.slurm_queue import Entry, outcome, parse_accounting, parse_queue
from finetuned.launchers.slurm_script import TEMPLATE, fill, read_template
from finetuned.lifesigns import exit_code, leave_exit_code, sign

HERE = Path("slurm.sh")

# As Slurm 22.05 prints them, asked by `Queue`.
SQUEUE = """\
11|COMPLETED|0|None|wrap|(null)|
7|FAILED|1|BadConstraints|t.sh|(null)|
12|FAILED|33280|NonZeroExitCode|t.sh|(null)|
16|FAILED|9|JobLaunchFailure|finetuned-x-1|finetuned /srv/a base/.finetuned/jobs/x-1 12|
9|PENDING|4294967294|Nodes required for job are DOWN|odd|name|(null)|
"""
SACCT = """\
3|CANCELLED by 1000|0:15|finetuned-x-1
4|OUT_OF_MEMORY|0:125|finetuned-x-1
5|FAILED|70:0|finetuned-x-1
7|FAILED|9:0|finetuned-x-1
8|FAILED|1:0|finetuned-x-1
6|RUNNING|0:0|finetuned-x-1
"""


def ended(state: str, status: int = 0) -> Entry:
    return Entry("1", state, status, "None", "finetuned-x-1", "")


@pytest.mark.parametrize(
    ("state", "status", "said", "end", "why"),
    [
        ("COMPLETED", 0, 0, 0, ""),
        ("COMPLETED", 0, None, 0, ""),
        ("COMPLETED", 0, 70, 70, ""),  # a template that does something after the trainer
        ("FAILED", 65, 65, 65, ""),
        ("FAILED", 75, None, 75, ""),  # the lock was held
        ("FAILED", -9, None, -9, ""),
        ("FAILED", 137, None, -9, ""),  # by a shell, or srun
        ("FAILED", 130, 130, 130, "Slurm asked it to stop"),
        ("FAILED", 143, 130, 130, "Slurm asked it to stop"),
        ("OUT_OF_MEMORY", -125, None, -9, ""),
        ("OUT_OF_MEMORY", 1, 70, 70, ""),  # it knows better which rung it was on
        ("OUT_OF_MEMORY", 0, 0, 0, ""),  # only a process beside it was killed
        ("TIMEOUT", 0, None, -15, "its time limit was reached"),
        ("TIMEOUT", 0, 130, 130, "its time limit was reached"),
        ("TIMEOUT", 0, 0, 0, ""),  # it was done, and something else hung
        ("PREEMPTED", 0, 65, 65, ""),
        ("PREEMPTED", 130, 130, 130, "another job was preferred to it"),
        ("NODE_FAIL", 1, None, -15, "its node failed"),
        ("BOOT_FAIL", 0, None, -15, "its node could not be started"),
        ("DEADLINE", 0, None, -15, "its deadline passed"),
        ("CANCELLED", -15, None, -15, "somebody cancelled it in Slurm"),
    ],
)
def test_an_end_in_slurm_means(state, status, said, end, why):
    given, taken = outcome(ended(state, status), said)
    assert given == end
    assert taken.startswith(why) if why else not taken


def test_a_job_that_no_node_can_run_any_more_is_submitted_anew_so_that_sbatch_says_why():
    assert outcome(parse_queue(SQUEUE)["7"], None) == (-15, "Slurm has no node any more that meets its options")


@pytest.mark.parametrize(
    "state", ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED"]
)
def test_a_job_in_slurms_hands_has_not_ended(state):
    assert not ended(state).ended


def test_the_queue_is_read_with_wait_statuses_and_what_our_jobs_are_called():
    found = parse_queue(SQUEUE)
    assert [found[job].status for job in ("11", "7", "12", "16")] == [0, -1, 130, -9]
    assert found["16"].comment == "finetuned /srv/a base/.finetuned/jobs/x-1 12"
    assert found["9"].state == "PENDING"  # whatever else somebody calls his job


def test_the_accounting_is_read_with_exit_codes_and_signals():
    found = parse_accounting(SACCT)
    assert {job: (entry.state, entry.status) for job, entry in found.items()} == {
        "3": ("CANCELLED", -15),
        "4": ("OUT_OF_MEMORY", -125),
        "5": ("FAILED", 70),
        "7": ("FAILED", -9),  # 137 it was
        "8": ("FAILED", 1),
        "6": ("RUNNING", 0),
    }


def test_the_word_of_a_run_before_the_one_that_signed_last_does_not_count(tmp_path):
    folder = JobFolder(tmp_path)
    assert last_word(folder, 1) is None
    leave_exit_code(folder, 1, 130)
    assert last_word(folder, 1) == 130
    sign(folder, 1)
    os.utime(folder.exit_code(1), ns=(0, folder.lock.stat().st_mtime_ns - 1))
    assert exit_code(folder, 1) == 130
    assert last_word(folder, 1) is None
    leave_exit_code(folder, 1, 0)
    assert last_word(folder, 1) == 0


def test_placeholders_are_filled_and_the_shells_own_braces_are_left():
    template = "#!/bin/bash\n# {job}: ${HOME} { true; } {a,b} {} \\{job}\nexec {command}\n"
    filled = fill(template, {"job": "x-1", "command": "python -m it"}, where=HERE)
    assert filled == "#!/bin/bash\n# x-1: ${HOME} { true; } {a,b} {} \\{job}\nexec python -m it\n"


def test_all_that_is_wrong_in_a_template_is_said_at_once():
    with pytest.raises(ConfigError) as error:
        fill("{job} {gpu} {comand}\n", {"job": "x-1", "command": "python -m it"}, where=HERE)
    for said in ("{gpu} is no placeholder", "{comand} is no", "{command}, which starts", "#!/bin/bash", "{job}"):
        assert said in error.value.sentence()


def test_the_template_that_comes_along_can_be_filled():
    values = dict.fromkeys(("command", "gpus", "signal_seconds"), "1")
    assert "{" not in fill(read_template(TEMPLATE), values, where=TEMPLATE)


def test_a_template_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.sh: the template for Slurm cannot be read: No such file"):
        read_template(tmp_path / "gone.sh")


@pytest.mark.parametrize("option", ["--partition=gpu", "--exclusive", "--time=4:00:00", "--constraint=a100|h100"])
def test_long_options_of_sbatch_are_taken(option):
    assert Slurm(options=[option]).options == [option]


@pytest.mark.parametrize("option", ["-p gpu", "--partition gpu", "partition=gpu", "--", "--output=x", "--array=0-3"])
def test_what_is_no_long_option_or_is_the_launchers_own_is_refused(option):
    with pytest.raises(ValidationError):
        Slurm(options=[option])
